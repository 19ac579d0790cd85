"""What do experts mean? Figures and pages that answer it.

`write_report` turns a run directory into one self-contained page that opens offline; `explore` compares what models'
routers do with labelled documents.
"""

from emo_jax.analysis.clusters import Clusters, cluster
from emo_jax.analysis.compare import compare_runs
from emo_jax.analysis.exploration import explore
from emo_jax.analysis.reading import Reading, Text, choose_documents, read_routers, read_texts
from emo_jax.analysis.report import write_page, write_report
from emo_jax.analysis.retention import EVALUATION_FILE, retention_page
from emo_jax.analysis.run import human, read_metrics
from emo_jax.analysis.structure import domain_structure

__all__ = [
    "EVALUATION_FILE",
    "Clusters",
    "Reading",
    "Text",
    "choose_documents",
    "cluster",
    "compare_runs",
    "domain_structure",
    "explore",
    "human",
    "read_metrics",
    "read_routers",
    "read_texts",
    "retention_page",
    "write_page",
    "write_report",
]

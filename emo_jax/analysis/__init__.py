"""What do experts mean? Figures and pages that answer it.

`write_report` turns a run directory into one self-contained page that opens offline.
"""

from emo_jax.analysis.compare import compare_runs
from emo_jax.analysis.report import write_page, write_report
from emo_jax.analysis.retention import EVALUATION_FILE, retention_page
from emo_jax.analysis.run import human, read_metrics

__all__ = [
    "EVALUATION_FILE",
    "compare_runs",
    "human",
    "read_metrics",
    "retention_page",
    "write_page",
    "write_report",
]

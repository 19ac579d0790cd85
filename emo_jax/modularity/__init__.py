"""Which experts matter? Router statistics of some text, criteria that rank experts by them, and subsets of experts.

A subset is applied as a mask, cut out into a smaller model, composed with others, and merged back.
"""

from emo_jax.modularity import emergent, tables
from emo_jax.modularity.calibration import Statistics, calibrate
from emo_jax.modularity.criteria import CRITERIA, score
from emo_jax.modularity.retention import Retention, SubsetLosses, measure_retention, specificity
from emo_jax.modularity.selection import METHODS, select
from emo_jax.modularity.subset import Subset, compose, cut, fingerprint, kept_masks, merge_back

__all__ = [
    "CRITERIA",
    "METHODS",
    "Retention",
    "Statistics",
    "Subset",
    "SubsetLosses",
    "calibrate",
    "compose",
    "cut",
    "emergent",
    "fingerprint",
    "kept_masks",
    "measure_retention",
    "merge_back",
    "score",
    "select",
    "specificity",
    "tables",
]

"""The routed experts of a mixture layer: rows to their experts, three matrix products, and back.

`routed_experts` is the operation; `reference` the oracle it is tested against.
"""

from emo_jax.kernels.experts.op import (
    IMPLEMENTATIONS,
    best_implementation,
    default_implementation,
    expert_norms,
    routed_experts,
)
from emo_jax.kernels.experts.reference import reference

__all__ = [
    "IMPLEMENTATIONS",
    "best_implementation",
    "default_implementation",
    "expert_norms",
    "reference",
    "routed_experts",
]

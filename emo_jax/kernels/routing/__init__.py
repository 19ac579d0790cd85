"""Document pools, top-k and their sums from a router's logits, in one pass over them.

`fused_routing` is the operation; the specification and the oracle it is tested against is `model.routing.route`.
"""

from emo_jax.kernels.routing.op import (
    IMPLEMENTATIONS,
    FusedRouting,
    default_implementation,
    fits,
    fused_routing,
)

__all__ = ["IMPLEMENTATIONS", "FusedRouting", "default_implementation", "fits", "fused_routing"]

"""What the backward pass keeps of a layer, and what it computes again."""

from collections.abc import Callable

import jax

from emo_jax.model.routing import DECISIONS
from emo_jax.parallel import COMBINED, DISPATCHED, GATHERED

_named = jax.checkpoint_policies.save_only_these_names
REMAT: dict[str, Callable[..., bool]] = {
    "none": jax.checkpoint_policies.save_anything_except_these_names(GATHERED),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _named(DECISIONS)
    ),
    "exchange": _named(DECISIONS, DISPATCHED, COMBINED),
    "full": _named(DECISIONS),
}
"""What the backward pass keeps of a layer. What the router decided is always kept: decided again, a near tie could fall
the other way."""

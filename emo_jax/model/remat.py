"""What the backward pass keeps of a layer, and what it computes again."""

from collections.abc import Callable
from typing import Any

import jax

from emo_jax.model.routing import DECISIONS
from emo_jax.parallel import COMBINED, DISPATCHED, GATHERED

_GATHERS = (jax.lax.all_gather_p, jax.lax.all_to_all_p)


def _but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """Everything but gathered weights, and what is on its way to them; tokens that crossed have a name of their own.

    JAX's `save_anything_except_these_names` saves whatever it is given (0.12).
    """
    return primitive not in _GATHERS and not (primitive.name == "name" and params["name"] == GATHERED)


_named = jax.checkpoint_policies.save_only_these_names
REMAT: dict[str, Callable[..., bool]] = {
    "none": _but_gathered,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _named(DECISIONS)
    ),
    "exchange": _named(DECISIONS, DISPATCHED, COMBINED),
    "full": _named(DECISIONS),
}
"""What the backward pass keeps of a layer. What the router decided is always kept: decided again, a near tie could fall
the other way."""

"""Rows to expert order and back, as gathers whose backward passes are gathers too.

Letters: T tokens, C choices a token, R routed experts, M slots (rows in expert order), D width.
Autodiff of a plain gather would emit a scatter, and on TPU a sort of its indices, per direction.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Plan(NamedTuple):
    """Where each choice goes. `slot_TC` and `choice_M` are inverse to each other; M and T·C mean nowhere."""

    slot_TC: jax.Array
    choice_M: jax.Array
    counts_R: jax.Array
    starts_R: jax.Array

    @property
    def token_M(self) -> jax.Array:
        """The token in each slot; T where it is empty."""
        return self.choice_M // self.slot_TC.shape[1]


def num_slots(choices: int, experts: int, block: int) -> int:
    """Slots that suffice for any routing when each expert's rows are padded to a multiple of `block`."""
    return (choices + min(experts, choices) * (block - 1)) // block * block


def plan(indices_TC: jax.Array, experts: int, block: int, filled: int | None = None) -> Plan:
    """Orders choices by expert, each expert's rows starting at a multiple of `block`.

    Args:
      indices_TC: int32, the experts of each token; `experts` (one past the last) for a token without.
      experts: R.
      block: 1 for groups without padding.
      filled: the most choices that have an expert, where the caller knows; None: all may.
    """
    choices = indices_TC.size
    slots = num_slots(choices if filled is None else min(filled, choices), experts, block)
    # Expert and place in one key: unique, so an unstable sort of a single operand is exact, and cheap on TPU.
    assert (experts + 1) * choices < 2**31, "too many choices on one device for int32 sort keys"
    keys = jax.lax.sort(indices_TC.reshape(-1) * choices + jnp.arange(choices, dtype=jnp.int32), is_stable=False)
    expert_sorted, order = keys // choices, keys % choices
    bounds = jnp.searchsorted(expert_sorted, jnp.arange(experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    counts_R = jnp.diff(bounds)
    ends_R = jnp.cumsum((counts_R + block - 1) // block * block, dtype=jnp.int32)
    starts_R = ends_R - (counts_R + block - 1) // block * block
    # From an expert's place in the sorted choices to its place among the slots; choices without expert: nowhere.
    shift = jnp.concatenate([starts_R - bounds[:-1], jnp.full((1,), slots, jnp.int32)])
    slot_sorted = jnp.minimum(jnp.arange(choices, dtype=jnp.int32) + shift[expert_sorted], slots)
    # The inverse permutation, applied.
    _, slot_flat = jax.lax.sort((order, slot_sorted), num_keys=1, is_stable=False)
    slot_ids = jnp.arange(slots, dtype=jnp.int32)
    expert_M = jnp.minimum(jnp.searchsorted(ends_R, slot_ids, side="right"), experts - 1)
    rank_M = slot_ids - starts_R[expert_M]
    filled_M = (rank_M < counts_R[expert_M]) & (slot_ids < ends_R[-1])
    source_M = jnp.clip(bounds[expert_M] + rank_M, 0, choices - 1)
    choice_M = jnp.where(filled_M, order[source_M], choices)
    return Plan(slot_flat.reshape(indices_TC.shape), choice_M, counts_R, starts_R)


def _rows(x_TD: jax.Array, index: jax.Array) -> jax.Array:
    """x_TD[index], with zeros where the index is one past the end."""
    return x_TD.at[index].get(mode="fill", fill_value=0)


def _choices(y_MD: jax.Array, plan: Plan) -> Iterator[jax.Array]:
    """The slots of every token's first choice, of its second, and so on: [T, D] each, never all of them at once."""
    return (_rows(y_MD, slot_T) for slot_T in plan.slot_TC.T)


def _int_zeros(tree: Plan) -> Plan:
    return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), tree)


@jax.custom_vjp
def dispatch(x_TD: jax.Array, plan: Plan) -> jax.Array:
    """Each slot's token row, [M, D]. Its transpose is `combine`.

    An empty slot holds some token's row, so that no pass writes zeros: its weight is 0.
    """
    return x_TD.at[plan.token_M].get(mode="clip")


@jax.custom_vjp
def combine(y_MD: jax.Array, plan: Plan) -> jax.Array:
    """The sum of each token's slots, in float32 or wider: [T, D] of y's dtype. Its transpose is `dispatch`."""
    accumulate = jnp.promote_types(y_MD.dtype, jnp.float32)
    return functools.reduce(jnp.add, (rows.astype(accumulate) for rows in _choices(y_MD, plan))).astype(y_MD.dtype)


@jax.custom_vjp
def dispatch_weights(weights_TC: jax.Array, plan: Plan) -> jax.Array:
    """Each slot's weight, 0 where a slot is empty: [M]."""
    return _rows(weights_TC.reshape(-1), plan.choice_M)


def _keep_plan(op: Callable[[jax.Array, Plan], jax.Array]) -> Callable[..., tuple[jax.Array, Plan]]:
    return lambda rows, plan: (op(rows, plan), plan)


dispatch.defvjp(_keep_plan(dispatch), lambda plan, g_MD: (combine(g_MD, plan), _int_zeros(plan)))
combine.defvjp(_keep_plan(combine), lambda plan, g_TD: (dispatch(g_TD, plan), _int_zeros(plan)))
dispatch_weights.defvjp(_keep_plan(dispatch_weights), lambda plan, g_M: (_rows(g_M, plan.slot_TC), _int_zeros(plan)))

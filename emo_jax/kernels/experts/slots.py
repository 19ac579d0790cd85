"""Where choices go when each expert's rows begin a tile of their own: by counting, without a sort.

Letters: T tokens, C choices a token, R routed experts, M slots, N tiles, Q rows a tile, P tokens counted together.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

RANKED = 128
"""Tokens that are counted together, by one product with a triangle of ones; assigned slots are of whole such blocks."""


class Tiles(NamedTuple):
    """What a kernel does to which block of slots; read by its scalar core.

    Attributes:
      expert_N: int32, whose rows they are; of tiles that are not used, the last one's that is.
      rows_N: int32, how many of a tile's Q rows are filled; the others hold anything.
      used_1: int32 [1], how many tiles are used.
    """

    expert_N: jax.Array
    rows_N: jax.Array
    used_1: jax.Array


class Slots(NamedTuple):
    """Where choices go.

    Attributes:
      slot_CT: int32, by choice and token, T filled up to whole blocks; −1 for a choice without an expert.
      tiles: which expert's rows each tile of slots holds.
    """

    slot_CT: jax.Array
    tiles: Tiles


def num_tiles(choices: int, experts: int, rows: int) -> int:
    """Tiles that suffice for any routing of so many choices, where each expert has one at least."""
    return choices // rows + experts


def assign(indices_TC: jax.Array, experts: int, rows: int, filled: int | None = None) -> Slots:
    """Slots by counting: those of an expert follow one another in the order of tokens, from a tile's first row on.

    Args:
      indices_TC: int32, R for a choice without an expert; the experts of a token differ.
      experts: R.
      rows: Q.
      filled: the most choices that have an expert, where the caller knows; None: all may.
    """
    tokens = len(indices_TC)
    padded = -(-tokens // RANKED) * RANKED
    indices_TC = jnp.pad(indices_TC, ((0, padded - tokens), (0, 0)), constant_values=experts)
    expert_R = jnp.arange(experts, dtype=jnp.int32)
    chosen_TR = (indices_TC[:, :, None] == expert_R.reshape(1, 1, -1)).any(1)
    # Running counts by blocks, as products: exact, since a block counts no further than 128.
    blocks_NPR = chosen_TR.reshape(-1, RANKED, experts).astype(jnp.bfloat16)
    triangle_PP = jnp.tri(RANKED, dtype=jnp.bfloat16)
    within_NPR = jnp.einsum("pq,nqr->npr", triangle_PP, blocks_NPR, preferred_element_type=jnp.float32)
    of_blocks_NR = within_NPR[:, -1].astype(jnp.int32)
    ends_NR = jnp.cumsum(of_blocks_NR, axis=0)
    count_R = ends_NR[-1]
    tiles_R = jnp.maximum(-(-count_R // rows), 1)
    last_R = jnp.cumsum(tiles_R)
    first_R = last_R - tiles_R
    base_NR = (first_R * rows)[None] + ends_NR - of_blocks_NR - 1
    slot_TR = (within_NPR.astype(jnp.int32) + base_NR[:, None]).reshape(padded, experts)
    picked_CTR = indices_TC.T[:, :, None] == expert_R.reshape(1, 1, -1)
    slot_CT = jnp.where(picked_CTR, slot_TR[None], 0).sum(-1, dtype=jnp.int32)
    slot_CT = jnp.where(picked_CTR.any(-1), slot_CT, -1)

    choices = indices_TC.shape[1] * tokens
    n_N = jnp.arange(num_tiles(choices if filled is None else min(filled, choices), experts, rows), dtype=jnp.int32)
    used = last_R[-1]
    expert_N = (jnp.minimum(n_N, used - 1)[:, None] >= last_R[None]).sum(1, dtype=jnp.int32)
    here_NR = expert_N[:, None] == expert_R[None]
    left_N = jnp.where(here_NR, count_R[None] - (n_N[:, None] - first_R[None]) * rows, 0).sum(1, dtype=jnp.int32)
    return Slots(slot_CT, Tiles(expert_N, jnp.clip(left_N, 0, rows), used[None]))


def like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A result's shape, which varies over the mesh axes that `x` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)

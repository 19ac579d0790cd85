"""Rows to their slots and back on GPU, 16 bytes a thread: Pallas kernels, and how all of them here are called.

Letters: T tokens, C choices a token, D width, M slots, P tokens a program.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from emo_jax.kernels.experts.slots import like

MOVED = 4096
"""Most values of its tokens that a program of `push` or `pull` holds at once."""


def triton() -> Any:
    """Pallas' Triton backend, imported only where it is used: it is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas import triton
    return triton


def call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    out_shape: list[jax.ShapeDtypeStruct],
    interpret: bool,
    warps: int,
    stages: int = 1,
) -> Callable[..., list[jax.Array]]:
    """A kernel, which sees its arguments whole; programs of the first grid axis are neighbours."""
    params = triton().CompilerParams(num_warps=warps, num_stages=stages)
    return pl.pallas_call(kernel, grid=grid, out_shape=out_shape, compiler_params=params, interpret=interpret)


def _moves(width: int, tokens: int) -> tuple[int, int, tuple[int, int]]:
    """Tokens and columns of a program that moves rows, and the grid of them."""
    columns = min(width & -width, MOVED)
    few = MOVED // columns
    return few, columns, (width // columns, -(-tokens // few))


def span(start: jax.Array, size: int) -> jax.Array:
    """Indices from `start` on."""
    return start + jnp.arange(size, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=("slots", "interpret"))
def push(
    x_TD: jax.Array, weights_TC: jax.Array | None, slot_CT: jax.Array, *, slots: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Each token's row, and its weights, in the slots of its choices: [M, D] and float32 [M]; others hold anything.

    Reads every token once and writes every choice once: the fewest bytes possible.

    Args:
      x_TD: bfloat16 or float32.
      weights_TC: float32, or None.
      slot_CT: int32, T or more; negative for a choice without a slot. No two are equal.
      slots: M.
      interpret: of `pallas_call`.
    """
    (tokens, width), choices, gpu = x_TD.shape, len(slot_CT), triton()
    few, columns, grid = _moves(width, tokens)

    weights = [] if weights_TC is None else [weights_TC]

    def push_rows(slot_ref: Any, x_ref: Any, *refs: Any) -> None:
        out, *weight_refs = refs[len(weights) :] + refs[: len(weights)]
        token_P, column_1D = span(pl.program_id(1) * few, few), span(pl.program_id(0) * columns, columns)[None]
        there_P = token_P < tokens
        x_PD = gpu.load(x_ref.at[token_P[:, None], column_1D], mask=there_P[:, None], other=0.0)
        for choice in range(choices):
            slot_P = gpu.load(slot_ref.at[choice, token_P], mask=there_P, other=-1)
            sent_P = slot_P >= 0
            gpu.store(out.at[slot_P[:, None], column_1D], x_PD, mask=sent_P[:, None])
            if weight_refs:  # written by each part of a row's columns, the same
                to, source = weight_refs
                gpu.store(to.at[slot_P], gpu.load(source.at[token_P, choice], mask=there_P, other=0.0), mask=sent_P)

    shapes = [like(x_TD, (slots, width), x_TD.dtype), *(like(x_TD, (slots,), jnp.float32) for _ in weights)]
    rows_MD, *weight = call(push_rows, grid, shapes, interpret, warps=4)(slot_CT, x_TD, *weights)
    return rows_MD, weight[0] if weight else None


@functools.partial(jax.jit, static_argnames=("tokens", "interpret"))
def pull(
    y_MD: jax.Array, scalar_NM: jax.Array | None, slot_CT: jax.Array, *, tokens: int, interpret: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """The sum over each token's choices of the rows in their slots, in float32: [T, D] of y's dtype.

    Reads every choice once and writes every token once: the fewest bytes possible.

    Args:
      y_MD: bfloat16 or float32.
      scalar_NM: float32 [any number, M], or None.
      slot_CT: int32, T or more; negative for a choice without a slot, which adds nothing.
      tokens: T.
      interpret: of `pallas_call`.

    Returns:
      The sums, and the sum of each choice's scalars, [T, C], 0 without a slot.
    """
    width, choices, gpu = y_MD.shape[1], len(slot_CT), triton()
    few, columns, grid = _moves(width, tokens)

    scalars = [] if scalar_NM is None else [scalar_NM]

    def pull_rows(slot_ref: Any, y_ref: Any, *refs: Any) -> None:
        out, *scalar_refs = refs[len(scalars) :] + refs[: len(scalars)]
        token_P, column_1D = span(pl.program_id(1) * few, few), span(pl.program_id(0) * columns, columns)[None]
        there_P = token_P < tokens
        total_PD = jnp.zeros((few, columns), jnp.float32)
        for choice in range(choices):
            slot_P = gpu.load(slot_ref.at[choice, token_P], mask=there_P, other=-1)
            held_P = slot_P >= 0
            y_PD = gpu.load(y_ref.at[slot_P[:, None], column_1D], mask=held_P[:, None], other=0.0)
            total_PD += y_PD.astype(jnp.float32)
            if scalar_refs:  # by each part of a row's columns, the same
                to, source = scalar_refs
                parts = (gpu.load(source.at[i, slot_P], mask=held_P, other=0.0) for i in range(source.shape[0]))
                gpu.store(to.at[token_P, choice], functools.reduce(jnp.add, parts), mask=there_P)
        gpu.store(out.at[token_P[:, None], column_1D], total_PD.astype(out.dtype), mask=there_P[:, None])

    shapes = [like(y_MD, (tokens, width), y_MD.dtype), *(like(y_MD, (tokens, choices), jnp.float32) for _ in scalars)]
    y_TD, *scalar = call(pull_rows, grid, shapes, interpret, warps=4)(slot_CT, y_MD, *scalars)
    return y_TD, scalar[0] if scalar else None

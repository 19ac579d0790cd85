"""Products of rows with their experts' weights on GPU: Pallas kernels over tiles of rows that have one expert each.

Neighbouring programs share a tile's rows, and an expert's weights stay in the L2 cache while its tiles are computed,
one after another.

Letters: M slots, N tiles, Q rows a tile, R routed experts, D width, F expert hidden, K depth of a product at once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from emo_jax.kernels.experts.gpu_rows import call, span, triton
from emo_jax.kernels.experts.slots import Tiles, like

LEAST = 64
"""D and F are multiples of this: fewer columns a program would leave tensor cores idle."""
PIECES = 4
"""Pieces of a program's columns that `gated_backward` finishes one after another: with fewer, compiled for Hopper, its
registers spill (1) or leave room for one program a multiprocessor (2)."""


class Sizes(NamedTuple):
    """How products are cut, and what the compiler is told; all but `stages` powers of two, 16 or more but for `warps`.

    The defaults were the fastest of six on an H100 (BUILD_NOTES.md): all products are `wgmma`, and no register
    spills, of which a program's sums take half.

    Attributes:
      rows: Q, a multiple of `depth`.
      hidden: columns of F of a program, which sums two products of so many where it can.
      width: columns of D of a program, which sums one product.
      depth: K.
      warps: of a program.
      stages: steps of a product of which the operands are in shared memory, or on their way.
    """

    rows: int = 128
    hidden: int = 128
    width: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 3


def best_sizes(width: int, hidden: int, dtype: Any) -> Sizes | None:
    """For a D, an F and a dtype; None where the kernels do not take them."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32) or width % LEAST or hidden % LEAST:
        return None
    sizes, (d, f) = Sizes(), (width & -width, hidden & -hidden)
    depth = min(sizes.depth * 2 // jnp.dtype(dtype).itemsize, d, f)
    return sizes._replace(hidden=min(sizes.hidden, f), width=min(sizes.width, d), depth=depth)


def _dots(
    total: tuple[jax.Array, ...], lefts: tuple[jax.Array, ...], rights: tuple[jax.Array, ...], axes: tuple[int, int]
) -> tuple[jax.Array, ...]:
    """Products over these axes, added to what there is, in float32."""
    numbers = (((axes[0],), (axes[1],)), ((), ()))
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=numbers, preferred_element_type=jnp.float32)
    return tuple(t + dot(a, b) for t, a, b in zip(total, lefts, rights, strict=True))


@functools.partial(jax.jit, static_argnames=("sizes", "saved", "interpret"))
def gated(
    x_MD: jax.Array,
    weight_M: jax.Array,
    gate_RDF: jax.Array,
    up_RDF: jax.Array,
    tiles: Tiles,
    *,
    sizes: Sizes,
    saved: bool,
    interpret: bool = False,
) -> list[jax.Array]:
    """Weight · silu(gate x) ⊙ up x of each row, [M, F]; and if `saved`, gate x and up x: both in one pass over x."""
    (_, width, hidden), (q, f, k) = gate_RDF.shape, (sizes.rows, sizes.hidden, sizes.depth)

    def gated_product(
        expert_ref: Any, rows_ref: Any, x_ref: Any, weight_ref: Any, gate_ref: Any, up_ref: Any, *outs: Any
    ) -> None:
        n = pl.program_id(1)
        rows, columns = pl.ds(n * q, q), pl.ds(pl.program_id(0) * f, f)

        @pl.when(rows_ref[n] > 0)
        def _() -> None:
            expert = expert_ref[n]

            def step(i: jax.Array, total: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                deep = pl.ds(i * k, k)
                x_QK = x_ref[rows, deep]
                return _dots(
                    total, (x_QK, x_QK), (gate_ref[expert, deep, columns], up_ref[expert, deep, columns]), (1, 0)
                )

            zeros_QF = jnp.zeros((q, f), jnp.float32)
            gate_QF, up_QF = jax.lax.fori_loop(0, width // k, step, (zeros_QF, zeros_QF))
            hidden_QF = weight_ref[rows][:, None] * gate_QF * jax.nn.sigmoid(gate_QF) * up_QF
            for out, value in zip(outs, (hidden_QF, gate_QF, up_QF)[: len(outs)], strict=True):
                out[rows, columns] = value.astype(out.dtype)

    shapes = [like(x_MD, (len(x_MD), hidden), x_MD.dtype)] * (3 if saved else 1)
    grid = (hidden // f, len(tiles.expert_N))
    run = call(gated_product, grid, shapes, interpret, sizes.warps, sizes.stages)
    return run(tiles.expert_N, tiles.rows_N, x_MD, weight_M, gate_RDF, up_RDF)


@functools.partial(jax.jit, static_argnames=("sizes", "interpret"))
def gated_backward(
    g_MD: jax.Array,
    down_RFD: jax.Array,
    gate_MF: jax.Array,
    up_MF: jax.Array,
    weight_M: jax.Array,
    tiles: Tiles,
    *,
    sizes: Sizes,
    interpret: bool = False,
) -> list[jax.Array]:
    """From the result's gradient in each row: those of gate x and up x, `gated`'s result again, and the weight's.

    Returns:
      [M, F] three times, and float32 [parts, M], to be summed over the parts of F.
    """
    (_, hidden, width), (q, f, k) = down_RFD.shape, (sizes.rows, sizes.hidden, sizes.depth)

    def gated_product_backward(
        expert_ref: Any,
        rows_ref: Any,
        g_ref: Any,
        down_ref: Any,
        gate_ref: Any,
        up_ref: Any,
        weight_ref: Any,
        *outs: Any,
    ) -> None:
        part, n = pl.program_id(0), pl.program_id(1)
        rows, columns = pl.ds(n * q, q), pl.ds(part * f, f)

        @pl.when(rows_ref[n] > 0)
        def _() -> None:
            expert = expert_ref[n]

            def step(i: jax.Array, total: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                deep = pl.ds(i * k, k)
                return _dots(total, (g_ref[rows, deep],), (down_ref[expert, columns, deep],), (1, 1))

            (g_QF,) = jax.lax.fori_loop(0, width // k, step, (jnp.zeros((q, f), jnp.float32),))
            weight_Q1 = weight_ref[rows][:, None]
            d_weight_Q = jnp.zeros((q,), jnp.float32)
            # In an order that keeps few values alive.
            for i, g_QP in enumerate(jnp.split(g_QF, PIECES, axis=1)):
                at = pl.ds(part * f + i * (f // PIECES), f // PIECES)
                gate_QP = gate_ref[rows, at].astype(jnp.float32)
                sigmoid_QP = jax.nn.sigmoid(gate_QP)
                silu_QP = gate_QP * sigmoid_QP
                slope_QP = sigmoid_QP + silu_QP * (1 - sigmoid_QP)
                weighted_QP = g_QP * weight_Q1
                outs[1][rows, at] = (weighted_QP * silu_QP).astype(outs[1].dtype)
                up_QP = up_ref[rows, at].astype(jnp.float32)
                outs[0][rows, at] = (weighted_QP * up_QP * slope_QP).astype(outs[0].dtype)
                gated_QP = silu_QP * up_QP
                outs[2][rows, at] = (weight_Q1 * gated_QP).astype(outs[2].dtype)
                d_weight_Q += (g_QP * gated_QP).sum(1)
            outs[3][part, rows] = d_weight_Q

    parts = hidden // f
    shapes = [like(g_MD, gate_MF.shape, g_MD.dtype)] * 3 + [like(g_MD, (parts, len(g_MD)), jnp.float32)]
    run = call(gated_product_backward, (parts, len(tiles.expert_N)), shapes, interpret, sizes.warps, sizes.stages)
    return run(tiles.expert_N, tiles.rows_N, g_MD, down_RFD, gate_MF, up_MF, weight_M)


@functools.partial(jax.jit, static_argnames=("transposed", "sizes", "interpret"))
def product(
    hidden: tuple[jax.Array, ...],
    weights: tuple[jax.Array, ...],
    tiles: Tiles,
    *,
    transposed: bool,
    sizes: Sizes,
    interpret: bool = False,
) -> jax.Array:
    """The sum of products of [M, F] with their experts' [R, F, D] (or [R, D, F], transposed) weights, [M, D]."""
    (slots, f), width, count = hidden[0].shape, weights[0].shape[1 if transposed else 2], len(hidden)
    q, d, k = sizes.rows, sizes.width, sizes.depth

    def product_to_rows(expert_ref: Any, rows_ref: Any, *refs: Any) -> None:
        n = pl.program_id(1)
        rows, columns = pl.ds(n * q, q), pl.ds(pl.program_id(0) * d, d)

        @pl.when(rows_ref[n] > 0)
        def _() -> None:
            expert = expert_ref[n]
            total = (jnp.zeros((q, d), jnp.float32),)
            # One product after another: a step of both would take twice the shared memory.
            for left, right in zip(refs[:count], refs[count : 2 * count], strict=True):

                def step(
                    i: jax.Array, total: tuple[jax.Array, ...], left: Any = left, right: Any = right
                ) -> tuple[jax.Array, ...]:
                    deep = pl.ds(i * k, k)
                    w = right[expert, columns, deep] if transposed else right[expert, deep, columns]
                    return _dots(total, (left[rows, deep],), (w,), (1, 1 if transposed else 0))

                total = jax.lax.fori_loop(0, f // k, step, total)
            refs[-1][rows, columns] = total[0].astype(refs[-1].dtype)

    grid, shapes = (width // d, len(tiles.expert_N)), [like(hidden[0], (slots, width), hidden[0].dtype)]
    run = call(product_to_rows, grid, shapes, interpret, sizes.warps, sizes.stages)
    return run(tiles.expert_N, tiles.rows_N, *hidden, *weights)[0]


@functools.partial(jax.jit, static_argnames=("sizes", "interpret"))
def outer(
    left_MA: jax.Array, rights: tuple[jax.Array, ...], spans_2R: jax.Array, *, sizes: Sizes, interpret: bool = False
) -> list[jax.Array]:
    """Weight gradients: Σ over an expert's rows of left ⊗ right, [R, A, B] for each right [M, B].

    A program sums all rows of an expert, of which those that are not filled count for nothing, whatever they hold.
    """
    wide_a, wide_b, experts, count = left_MA.shape[1], rights[0].shape[1], spans_2R.shape[1], len(rights)
    a, b, k = min(sizes.hidden, wide_a & -wide_a), min(sizes.width // count, wide_b & -wide_b), sizes.depth
    gpu = triton()

    def weight_gradient(spans_ref: Any, left_ref: Any, *refs: Any) -> None:
        expert = pl.program_id(2)
        first, filled = spans_ref[0, expert], spans_ref[1, expert]
        at_a, at_b = pl.ds(pl.program_id(0) * a, a), pl.ds(pl.program_id(1) * b, b)

        def step(i: jax.Array, total: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            filled_K1 = (span(i * k, k) < filled)[:, None]
            rows = pl.ds(first + i * k, k)
            left_KA, *right = (
                gpu.load(ref.at[rows, at], mask=filled_K1, other=0.0)
                for ref, at in [(left_ref, at_a), *((ref, at_b) for ref in refs[:count])]
            )
            return _dots(total, (left_KA,) * count, tuple(right), (0, 0))

        zeros = tuple(jnp.zeros((a, b), jnp.float32) for _ in rights)
        total = jax.lax.fori_loop(0, (filled + k - 1) // k, step, zeros)
        for out, value in zip(refs[count:], total, strict=True):
            out[expert, at_a, at_b] = value.astype(out.dtype)

    shapes = [like(left_MA, (experts, wide_a, wide_b), left_MA.dtype)] * count
    run = call(weight_gradient, (wide_a // a, wide_b // b, experts), shapes, interpret, sizes.warps, sizes.stages)
    return run(spans_2R, left_MA, *rights)

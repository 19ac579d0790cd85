"""Products of rows with their experts' weights on TPU: Pallas kernels over tiles of rows that have one expert each.

Letters: M slots, N tiles, Q rows a tile, R routed experts, D width, F expert hidden, W words a row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emo_jax.kernels.experts.slots import Tiles, like
from emo_jax.kernels.experts.tpu_rows import IDS_FROM, LANES, pack, unpack
from emo_jax.kernels.experts.tpu_sizes import Sizes

PRODUCTS = ("gated_product", "gated_product_backward", "product_to_rows", "weight_gradient")
"""Names of the kernels."""


def _tile(n: jax.Array, used: Any) -> jax.Array:
    """Tile n, or the last used one: its blocks are at hand already."""
    return jnp.minimum(n, used[0] - 1)


def _call(
    kernel: Callable[..., None],
    tiles: Tiles,
    arguments: Sequence[Any],
    *,
    experts: int,
    cost: tuple[int, int, int],
    sizes: Sizes,
    parts: int,
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    out_shape: Sequence[Any],
    scratch: Sequence[Any] = (),
    replaced: Sequence[int] = (),
    interpret: Any,
    name: str,
) -> Any:
    """Runs a kernel on a grid of (parts of the result's columns, tiles); a chip's two cores share the parts.

    `cost`: FLOPs and bytes of a row, and bytes of weights, from which the compiler knows what can hide behind it.
    `replaced`: arguments whose memory the first results take, block by block.
    """
    count = len(tiles.expert_N)
    full = (count - experts) * sizes.rows  # without the tiles that only half-filled ones need
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(parts, count),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=sizes.vmem
        ),
        cost_estimate=pl.CostEstimate(flops=cost[0] * full, bytes_accessed=cost[1] * full + cost[2], transcendentals=0),
        input_output_aliases={len(tiles) + place: result for result, place in enumerate(replaced)},
        interpret=interpret,
        name=name,
    )(*tiles, *arguments)


def _bytes(array: jax.Array) -> int:
    return array.size * array.dtype.itemsize


def _rows_spec(rows: int, *size: int) -> pl.BlockSpec:
    """A tile's rows, with all their columns."""
    zeros = (0,) * len(size)
    return pl.BlockSpec((rows, *size), lambda part, n, expert, filled, used: (_tile(n, used), *zeros))


def _columns_spec(rows: int, size: int) -> pl.BlockSpec:
    """A tile's rows, and a part of their columns."""
    return pl.BlockSpec((rows, size), lambda part, n, expert, filled, used: (_tile(n, used), part))


def _filled(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0) < rows


def _to_lanes(column_Q1: jax.Array) -> jax.Array:
    """[Q, 1] as [1, Q]."""
    return jnp.broadcast_to(column_Q1, (len(column_Q1), LANES)).T[:1]


def _to_rows(row_1Q: jax.Array) -> jax.Array:
    """[1, Q] as [Q, 128], the same in all lanes."""
    return jnp.broadcast_to(row_1Q, (LANES, row_1Q.shape[1])).T


@functools.partial(jax.jit, static_argnames=("sizes", "saved", "interpret"))
def gated(
    rows_MW: jax.Array,
    gate_RDF: jax.Array,
    up_RDF: jax.Array,
    tiles: Tiles,
    *,
    sizes: Sizes,
    saved: bool,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Weight · silu(gate x) ⊙ up x of each row, [M, F]; and if `saved`, gate x, up x and the weights by part.

    Both products in one pass over the rows, whose last words hold the expert ids and weights of their token's choices.
    """
    experts, width, hidden = gate_RDF.shape
    dtype, (q, f) = gate_RDF.dtype, (sizes.rows, sizes.hidden)
    last = rows_MW.shape[2] - LANES

    def kernel(expert: Any, filled: Any, used: Any, rows: Any, gate: Any, up: Any, *refs: Any) -> None:
        *outs, x = refs
        n = pl.program_id(1)

        @pl.when(filled[n] > 0)
        def _() -> None:
            unpack(rows, x)
            g_QF, u_QF = (jnp.dot(x[...], w[0], preferred_element_type=jnp.float32) for w in (gate, up))
            bits = rows[:, 0, last:]
            here = pltpu.roll(pltpu.bitcast(bits, jnp.int32), LANES - IDS_FROM, 1) == expert[n]
            lane = jax.lax.broadcasted_iota(jnp.int32, here.shape, 1)
            weight_Q1 = jnp.where(here & (lane < IDS_FROM), pltpu.bitcast(bits, jnp.float32), 0).sum(1, keepdims=True)
            h_QF = weight_Q1 * g_QF * jax.nn.sigmoid(g_QF) * u_QF
            outs[0][...] = jnp.where(_filled(filled[n], h_QF.shape), h_QF, 0).astype(dtype)
            if saved:
                outs[1][...] = g_QF.astype(dtype)
                outs[2][...] = u_QF.astype(dtype)
                outs[3][0, 0] = _to_lanes(weight_Q1)

    slots, parts = len(rows_MW), hidden // f
    weight = pl.BlockSpec((1, width, f), lambda part, n, expert, filled, used: (expert[n], 0, part))
    shapes = [like(rows_MW, (slots, hidden), dtype)] * (3 if saved else 1)
    specs = [_columns_spec(q, f)] * len(shapes)
    if saved:
        shapes.append(like(rows_MW, (parts, slots // q, 1, q), jnp.float32))
        specs.append(pl.BlockSpec((1, 1, 1, q), lambda part, n, expert, filled, used: (part, _tile(n, used), 0, 0)))
    found = _call(
        kernel,
        tiles,
        (rows_MW, gate_RDF, up_RDF),
        experts=experts,
        cost=(
            4 * width * hidden,
            parts * rows_MW.shape[2] * 4 + hidden * dtype.itemsize * (3 if saved else 1),
            2 * _bytes(gate_RDF),
        ),
        sizes=sizes,
        parts=parts,
        in_specs=[_rows_spec(q, 1, rows_MW.shape[2]), weight, weight],
        out_specs=specs,
        out_shape=shapes,
        scratch=[pltpu.VMEM((q, width), dtype)],
        interpret=interpret,
        name=PRODUCTS[0],
    )
    return tuple(found)


@functools.partial(jax.jit, static_argnames=("sizes", "interpret"))
def gated_backward(
    rows_MW: jax.Array,
    down_RFD: jax.Array,
    gate_MF: jax.Array,
    up_MF: jax.Array,
    weight_N1Q: jax.Array,
    tiles: Tiles,
    *,
    sizes: Sizes,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """From the result's gradient in each row: those of gate x and up x, `gated`'s result again, and the weight's.

    Returns:
      [M, F] three times, and float32 [parts, N, 1, Q], to be summed over the parts of F.
    """
    experts, hidden, width = down_RFD.shape
    dtype, (q, f) = down_RFD.dtype, (sizes.rows, sizes.hidden)

    def kernel(
        expert: Any, filled: Any, used: Any, rows: Any, down: Any, gate: Any, up: Any, weight: Any, *refs: Any
    ) -> None:
        d_gate, d_up, h, d_weight, g = refs
        n = pl.program_id(1)

        @pl.when(filled[n] > 0)
        def _() -> None:
            unpack(rows, g)
            across = (((1,), (1,)), ((), ()))
            g_QF = jax.lax.dot_general(g[...], down[0], across, preferred_element_type=jnp.float32)
            gate_QF, up_QF = (a[...].astype(jnp.float32) for a in (gate, up))
            weight_Q1 = _to_rows(weight[0])[:, :1]
            sigmoid = jax.nn.sigmoid(gate_QF)
            silu, here = gate_QF * sigmoid, _filled(filled[n], g_QF.shape)
            weighted = g_QF * weight_Q1
            for out, value in (
                (d_gate, weighted * up_QF * (sigmoid + silu * (1 - sigmoid))),
                (d_up, weighted * silu),
                (h, weight_Q1 * silu * up_QF),
            ):
                out[...] = jnp.where(here, value, 0).astype(dtype)
            d_weight[0, 0] = _to_lanes((g_QF * silu * up_QF).sum(1, keepdims=True))

    slots, parts = len(rows_MW), hidden // f
    numbers = pl.BlockSpec((1, 1, 1, q), lambda part, n, expert, filled, used: (part, _tile(n, used), 0, 0))
    found = _call(
        kernel,
        tiles,
        (rows_MW, down_RFD, gate_MF, up_MF, weight_N1Q),
        experts=experts,
        cost=(2 * width * hidden, (parts * width + 5 * hidden) * dtype.itemsize, _bytes(down_RFD)),
        sizes=sizes,
        parts=parts,
        in_specs=[
            _rows_spec(q, 1, rows_MW.shape[2]),
            pl.BlockSpec((1, f, width), lambda part, n, expert, filled, used: (expert[n], part, 0)),
            _columns_spec(q, f),
            _columns_spec(q, f),
            pl.BlockSpec((1, 1, q), lambda part, n, expert, filled, used: (_tile(n, used), 0, 0)),
        ],
        out_specs=[*[_columns_spec(q, f)] * 3, numbers],
        out_shape=[*[like(rows_MW, (slots, hidden), dtype)] * 3, like(rows_MW, (parts, slots // q, 1, q), jnp.float32)],
        scratch=[pltpu.VMEM((q, width), dtype)],
        replaced=(2, 3),  # gate x and up x, of which nothing is needed once their gradients are known
        interpret=interpret,
        name=PRODUCTS[1],
    )
    return tuple(found)


@functools.partial(jax.jit, static_argnames=("transposed", "sizes", "interpret"))
def to_rows(
    hidden: tuple[jax.Array, ...],
    weights: tuple[jax.Array, ...],
    scalar_PN1Q: jax.Array | None,
    tiles: Tiles,
    *,
    transposed: bool,
    sizes: Sizes,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """The sum of products of [M, F] with [R, F, D] (or [R, D, F], transposed) weights, as rows of words [M, 1, W].

    With a scalar (the sum of its parts), also float32 [M, 1, 128 or more], with each row's in all lanes: each part of
    the result writes 128 of them.
    """
    slots, f = hidden[0].shape
    width = weights[0].shape[1 if transposed else 2]
    dtype, (q, d) = hidden[0].dtype, (sizes.rows, sizes.width)
    each, count = 4 // dtype.itemsize, len(hidden)

    def kernel(expert: Any, filled: Any, used: Any, *refs: Any) -> None:
        n = pl.program_id(1)
        left, right = refs[:count], refs[count : 2 * count]

        @pl.when(filled[n] > 0)
        def _() -> None:
            axes = (((1,), (1 if transposed else 0,)), ((), ()))
            products = (
                jax.lax.dot_general(a[...], w[0], axes, preferred_element_type=jnp.float32)
                for a, w in zip(left, right, strict=True)
            )
            out = refs[2 * count + (scalar_PN1Q is not None)]
            pack(functools.reduce(jnp.add, products), dtype, out)
            if scalar_PN1Q is not None:
                refs[-1][:, 0] = _to_rows(refs[2 * count][:, 0, 0].sum(0, keepdims=True))

    block = (1, d, f) if transposed else (1, f, d)
    where = (lambda e, part: (e, part, 0)) if transposed else (lambda e, part: (e, 0, part))
    in_specs = [_rows_spec(q, f)] * count
    in_specs += [pl.BlockSpec(block, lambda part, n, expert, filled, used: where(expert[n], part))] * count
    out_specs = [
        pl.BlockSpec((q, 1, d // each), lambda part, n, expert, filled, used: (_tile(n, used), 0, part)),
    ]
    shapes = [like(hidden[0], (slots, 1, width // each), jnp.uint32)]
    arguments = [*hidden, *weights]
    if scalar_PN1Q is not None:
        parts = len(scalar_PN1Q)
        in_specs.append(pl.BlockSpec((parts, 1, 1, q), lambda part, n, expert, filled, used: (0, _tile(n, used), 0, 0)))
        out_specs.append(pl.BlockSpec((q, 1, LANES), lambda part, n, expert, filled, used: (_tile(n, used), 0, part)))
        shapes.append(like(hidden[0], (slots, 1, width // d * LANES), jnp.float32))
        arguments.append(scalar_PN1Q)
    found = _call(
        kernel,
        tiles,
        arguments,
        experts=len(weights[0]),
        cost=(2 * count * width * f, (count * (width // d) * f + width) * dtype.itemsize, count * _bytes(weights[0])),
        sizes=sizes,
        parts=width // d,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        interpret=interpret,
        name=PRODUCTS[2],
    )
    return tuple(found)


@functools.partial(jax.jit, static_argnames=("experts", "width", "rows_first", "sizes", "interpret"))
def outer(
    rows_MW: jax.Array,
    hidden: tuple[jax.Array, ...],
    tiles: Tiles,
    *,
    experts: int,
    width: int,
    rows_first: bool,
    sizes: Sizes,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """Weight gradients: Σ over an expert's rows of x ⊗ h, [R, D, F] for each h, or of h ⊗ x, [R, F, D].

    Args:
      rows_MW: x, as words of h's dtype.
      hidden: h, [M, F] each, 0 in rows that are not filled.
      tiles: of each expert in turn, one at least.
      experts: R.
      width: D; further words of a row are not read.
      rows_first: whether x comes first.
      sizes, interpret: as elsewhere.
    """
    count, columns, dtype, (q, f) = len(hidden), hidden[0].shape[1], hidden[0].dtype, (sizes.rows, sizes.hidden)
    row = width // (4 // dtype.itemsize)
    shape = (width, f) if rows_first else (f, width)

    def kernel(expert: Any, filled: Any, used: Any, rows: Any, *refs: Any) -> None:
        h, out, total, x = refs[:count], refs[count : 2 * count], refs[2 * count : 3 * count], refs[-1]
        n = pl.program_id(1)
        last = used[0] - 1

        @pl.when((n <= last) & ((n == 0) | (expert[jnp.maximum(n - 1, 0)] != expert[n])))
        def _() -> None:
            for a in total:
                a[...] = jnp.zeros_like(a)

        @pl.when(filled[n] > 0)
        def _() -> None:
            unpack(rows, x)
            x_QD = jnp.where(_filled(filled[n], x.shape), x[...], 0)
            down = (((0,), (0,)), ((), ()))
            for a, b in zip(total, h, strict=True):
                left, right = (x_QD, b[...]) if rows_first else (b[...], x_QD)
                a[...] += jax.lax.dot_general(left, right, down, preferred_element_type=jnp.float32)

        @pl.when((n == last) | ((n < last) & (expert[jnp.minimum(n + 1, last)] != expert[n])))
        def _() -> None:
            for a, b in zip(out, total, strict=True):
                a[0] = b[...].astype(dtype)

    if rows_first:
        spec = pl.BlockSpec((1, *shape), lambda part, n, expert, filled, used: (expert[n], 0, part))
        result = (experts, width, columns)
    else:
        spec = pl.BlockSpec((1, *shape), lambda part, n, expert, filled, used: (expert[n], part, 0))
        result = (experts, columns, width)
    size = count * experts * width * columns * dtype.itemsize
    found = _call(
        kernel,
        tiles,
        (rows_MW, *hidden),
        experts=experts,
        cost=(2 * count * width * columns, (columns // f * width + count * columns) * dtype.itemsize, size),
        sizes=sizes,
        parts=columns // f,
        in_specs=[_rows_spec(q, 1, row), *[_columns_spec(q, f)] * count],
        out_specs=[spec] * count,
        out_shape=[like(rows_MW, result, dtype)] * count,
        scratch=[*(pltpu.VMEM(shape, jnp.float32) for _ in hidden), pltpu.VMEM((q, width), dtype)],
        interpret=interpret,
        name=PRODUCTS[3],
    )
    return tuple(found)

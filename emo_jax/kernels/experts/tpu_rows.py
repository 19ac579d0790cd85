"""Rows to their slots and back on TPU, one DMA a row: Pallas kernels.

A TPU keeps a matrix in tiles of eight rows, so that a single row is no contiguous piece of memory. Between these
kernels and the products (`tpu_products`), rows are therefore arrays of 32-bit words [slots, 1, W], whose rows are
contiguous: a word is one float32, or two bfloat16 that lie 128 columns apart, so that (un)packing is shifts, and moves
no lane.

Letters: T tokens, C choices a token, D width, W words a row, M slots, P tokens a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emo_jax.kernels.experts.slots import RANKED, like

LANES = 128
"""Columns of a vector register."""
TOKENS = RANKED
"""P: tokens whose rows are on their way at once; twice that many choices' rows lie in fast memory while they return."""
IDS_FROM = 64
"""First lane of a row's expert ids; its weights come before. At most so many choices a token."""
MOVES = ("push_rows", "pull_rows")
"""Names of the kernels."""


def pull_bytes(choices: int, words: int) -> int:
    """Fast memory that `pull` takes for rows of W words and a number each, results included."""
    return 2 * TOKENS * (choices + 1) * (words + LANES) * 4


def columns(ref: Any, dtype: Any, word: int) -> list[jax.Array]:
    """Float32 columns that the 128 words from `word` on of each row hold: one [rows, 128], or two neighbours."""
    bits = ref[:, 0, word : word + LANES]
    if dtype == jnp.float32:
        return [pltpu.bitcast(bits, jnp.float32)]
    return [pltpu.bitcast(half, jnp.float32) for half in (bits << 16, bits & jnp.uint32(0xFFFF0000))]


def packed(values: list[jax.Array], dtype: Any) -> jax.Array:
    """The words of `columns`, which need not be rounded yet."""
    exact = [pltpu.bitcast(v.astype(dtype).astype(jnp.float32), jnp.uint32) for v in values]
    return exact[0] if len(exact) == 1 else (exact[0] >> 16) | exact[1]


def unpack(ref: Any, into: Any) -> None:
    """Rows of words as a matrix, [rows, D], in fast memory."""
    each = 4 // into.dtype.itemsize
    for part in range(into.shape[1] // (LANES * each)):
        for i, column in enumerate(columns(ref, into.dtype, part * LANES)):
            start = (part * each + i) * LANES
            into[:, start : start + LANES] = column.astype(into.dtype)


def pack(values: jax.Array, dtype: Any, into: Any) -> None:
    """A float32 [rows, D] as rows of words, in fast memory."""
    each = 4 // jnp.dtype(dtype).itemsize
    for part in range(values.shape[1] // (LANES * each)):
        starts = [(part * each + i) * LANES for i in range(each)]
        halves = [values[:, start : start + LANES] for start in starts]
        into[:, 0, part * LANES : (part + 1) * LANES] = packed(halves, dtype)


@functools.partial(jax.jit, static_argnames=("slots", "vmem", "interpret"))
def push(
    x_TD: jax.Array, slot_CT: jax.Array, extra_TL: jax.Array | None, *, slots: int, vmem: int, interpret: Any = False
) -> jax.Array:
    """Each token's row, written to the slot of each of its choices: uint32 [M, 1, W]. Slots of no choice hold anything.

    Reads every token once and writes every choice once: the fewest bytes possible.

    Args:
      x_TD: bfloat16 or float32.
      slot_CT: int32; negative for a choice without a slot. No two are equal.
      extra_TL: float32 [T, 128] that goes along with each row, as its last words; or None.
      slots: M.
      vmem: bytes of fast memory that it may take.
      interpret: of `pallas_call`.
    """
    width = x_TD.shape[1]
    choices, width_words = len(slot_CT), width * x_TD.dtype.itemsize // 4
    row = width_words + (LANES if extra_TL is not None else 0)
    blocks = slot_CT.shape[1] // TOKENS

    def kernel(slot_ref: Any, x_ref: Any, *refs: Any) -> None:
        *extra, out, rows, sent = refs
        pack(x_ref[...].astype(jnp.float32), x_TD.dtype, rows)
        for ref in extra:
            rows[:, 0, width_words:] = pltpu.bitcast(ref[...], jnp.uint32)

        def send(token: jax.Array, count: jax.Array) -> jax.Array:
            for choice in range(choices):
                slot = slot_ref[choice, token]

                @pl.when(slot >= 0)
                def _(slot: jax.Array = slot) -> None:
                    pltpu.make_async_copy(rows.at[token], out.at[slot], sent).start()

                count += (slot >= 0).astype(jnp.int32)
            return count

        _wait(jax.lax.fori_loop(0, TOKENS, send, jnp.int32(0)), rows, rows, sent)

    extras = [] if extra_TL is None else [extra_TL]
    return pl.pallas_call(
        kernel,
        grid=(blocks,),
        in_specs=[
            pl.BlockSpec((choices, TOKENS), lambda block: (0, block), memory_space=pltpu.SMEM),
            pl.BlockSpec((TOKENS, width), lambda block: (block, 0)),
            *(pl.BlockSpec((TOKENS, LANES), lambda block: (block, 0)) for _ in extras),
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=like(x_TD, (slots, 1, row), jnp.uint32),
        scratch_shapes=[pltpu.VMEM((TOKENS, 1, row), jnp.uint32), pltpu.SemaphoreType.DMA],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vmem),
        cost_estimate=_cost(x_TD.size * x_TD.dtype.itemsize, min(slot_CT.size, slots) * row * 4),
        interpret=interpret,
        name=MOVES[0],
    )(slot_CT, x_TD, *extras)


def _cost(*sizes: int) -> pl.CostEstimate:
    """Tells the compiler how long it takes to move so many bytes."""
    return pl.CostEstimate(flops=0, bytes_accessed=sum(sizes), transcendentals=0)


def _wait(count: jax.Array, source: Any, target: Any, semaphore: Any) -> None:
    """Waits for `count` rows, a block of them at once as far as possible: a semaphore counts bytes."""

    def rows(size: int) -> Any:
        def wait(_: jax.Array, carry: jax.Array) -> jax.Array:
            pltpu.make_async_copy(source.at[pl.ds(0, size)], target.at[pl.ds(0, size)], semaphore).wait()
            return carry

        return wait

    jax.lax.fori_loop(0, count // TOKENS, rows(TOKENS), jnp.int32(0))
    jax.lax.fori_loop(0, count % TOKENS, rows(1), jnp.int32(0))


@functools.partial(jax.jit, static_argnames=("dtype", "vmem", "interpret"))
def pull(
    rows_MW: jax.Array,
    scalars_ML: jax.Array | None,
    slot_CT: jax.Array,
    *,
    dtype: Any,
    vmem: int,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array | None]:
    """The sum over each token's choices of the rows in their slots, in float32: [T, D] of `dtype`.

    Reads every choice once and writes every token once: the fewest bytes possible. The rows of the next block of tokens
    are on their way while one is summed.

    Args:
      rows_MW: uint32 [M, 1, W].
      scalars_ML: float32 [M, 1, 128 or more], a number of each slot in its first 128 lanes, or None.
      slot_CT: int32; negative for a choice without a slot, which adds nothing. No two are equal.
      dtype: of the rows' values.
      vmem: bytes of fast memory that it may take.
      interpret: of `pallas_call`.

    Returns:
      The sums, and the scalars of each token's choices, [T, 128]: a lane for each choice, 0 without a slot.
    """
    choices, blocks = len(slot_CT), slot_CT.shape[1] // TOKENS
    row = rows_MW.shape[2]
    width = row * (4 // jnp.dtype(dtype).itemsize)
    sources = [rows_MW] if scalars_ML is None else [rows_MW, scalars_ML]
    taken = [(row, jnp.uint32), (LANES, jnp.float32)][: len(sources)]
    # A chip's two cores, where it has them, take half of the blocks each; each begins by filling a buffer.
    cores = 2 if blocks % 2 == 0 else 1
    turns = blocks // cores

    def at(ahead: int) -> Any:
        return lambda core, turn: (0, core * turns + jnp.minimum(turn + ahead, turns - 1))

    def kernel(now_ref: Any, next_ref: Any, *refs: Any) -> None:
        held = refs[: len(sources)]
        outs = refs[len(sources) : 2 * len(sources)]
        buffers, arrived = refs[2 * len(sources) : -1], refs[-1]
        turn = pl.program_id(1)

        def fetch(slot_ref: Any, half: jax.Array) -> None:
            def one(token: jax.Array, carry: jax.Array) -> jax.Array:
                for choice in range(choices):
                    slot = slot_ref[choice, token]
                    for source, buffer in zip(held, buffers, strict=True):
                        target = buffer.at[half, choice, token]

                        @pl.when(slot >= 0)
                        def _(source: Any = source, target: Any = target, slot: jax.Array = slot) -> None:
                            row = source.at[slot, :, pl.ds(0, target.shape[-1])]
                            pltpu.make_async_copy(row, target, arrived.at[half]).start()

                        @pl.when(slot < 0)
                        def _(target: Any = target) -> None:
                            target[...] = jnp.zeros_like(target)

                return carry

            jax.lax.fori_loop(0, TOKENS, one, jnp.int32(0))

        @pl.when(turn == 0)
        def _() -> None:
            fetch(now_ref, jnp.int32(0))

        @pl.when(turn + 1 < turns)
        def _() -> None:
            fetch(next_ref, (turn + 1) % 2)

        def count(token: jax.Array, total: jax.Array) -> jax.Array:
            return total + sum((now_ref[choice, token] >= 0).astype(jnp.int32) for choice in range(choices))

        half = turn % 2
        landed = jax.lax.fori_loop(0, TOKENS, count, jnp.int32(0))
        for source, buffer in zip(held, buffers, strict=True):
            target = buffer.at[half, 0]
            _wait(landed, source.at[:, :, pl.ds(0, target.shape[-1])], target, arrived.at[half])
        each = width // row
        for part in range(row // LANES):
            picked = [columns(buffers[0].at[half, choice], dtype, part * LANES) for choice in range(choices)]
            for i in range(each):
                total = functools.reduce(jnp.add, (columns[i] for columns in picked))
                start = (part * each + i) * LANES
                outs[0][:, start : start + LANES] = total.astype(dtype)
        if len(sources) == 2:
            lane = jax.lax.broadcasted_iota(jnp.int32, (TOKENS, LANES), 1)
            kept = [jnp.where(lane == choice, buffers[1][half, choice, :, 0], 0) for choice in range(choices)]
            outs[1][...] = functools.reduce(jnp.add, kept)

    def block(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((TOKENS, size), lambda core, turn: (core * turns + turn, 0))

    shapes = [(width, dtype), (LANES, jnp.float32)][: len(sources)]
    outs = pl.pallas_call(
        kernel,
        grid=(cores, turns),
        in_specs=[
            *(pl.BlockSpec((choices, TOKENS), at(ahead), memory_space=pltpu.SMEM) for ahead in (0, 1)),
            *(pl.BlockSpec(memory_space=pl.ANY) for _ in sources),
        ],
        out_specs=[block(size) for size, _ in shapes],
        out_shape=[like(rows_MW, (blocks * TOKENS, size), kind) for size, kind in shapes],
        scratch_shapes=[
            *(pltpu.VMEM((2, choices, TOKENS, 1, size), kind) for size, kind in taken),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem),
        cost_estimate=_cost(
            *(blocks * TOKENS * size * jnp.dtype(kind).itemsize for size, kind in shapes),
            *(min(slot_CT.size, len(rows_MW)) * size * 4 for size, _ in taken),
        ),
        interpret=interpret,
        name=MOVES[1],
    )(slot_CT, slot_CT, *sources)
    return outs[0], outs[1] if len(sources) == 2 else None

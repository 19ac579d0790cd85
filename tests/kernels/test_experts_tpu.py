"""Our TPU kernels of routed experts: slots by counting, then values and gradients in interpret mode, and real compiles.

Interpret mode simulates DMAs, semaphores and memory spaces, fills what was never written with NaN, and finds races.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emo_jax.kernels.experts import reference, routed_experts
from emo_jax.kernels.experts.pallas_tpu import routed_experts_tpu
from emo_jax.kernels.experts.slots import assign, num_tiles
from emo_jax.kernels.experts.tpu_rows import MOVES, pull, push
from emo_jax.kernels.experts.tpu_sizes import Sizes, best_sizes
from emo_jax.parallel.compiled import products, work
from tests.kernels.test_experts import PATTERNS, SEEDS, assert_close, choose

VMEM = 2**26
INTERPRET = pltpu.InterpretParams(detect_races=True)
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


# Slots


@functools.cache
def assigned(experts, rows):
    return jax.jit(lambda indices_TC: assign(indices_TC, experts, rows))


@pytest.mark.parametrize("T, C, R, rows", [(1, 2, 3, 8), (13, 3, 5, 8), (300, 2, 7, 16)])
def test_slots_of_an_expert_fill_its_tiles_in_the_order_of_tokens(T, C, R, rows):
    @settings(deadline=None, max_examples=25)
    @given(SEEDS, st.sampled_from(PATTERNS))
    def check(seed, pattern):
        indices_TC = choose(np.random.default_rng(seed), T, C, R, pattern)
        slots = jax.device_get(assigned(R, rows)(indices_TC))
        (used,) = slots.tiles.used_1
        slot_CT, expert_N, rows_N = slots.slot_CT, slots.tiles.expert_N, slots.tiles.rows_N
        assert (slot_CT[:, T:] == -1).all() and slot_CT.shape[1] % 128 == 0
        assert (np.diff(expert_N) >= 0).all() and set(expert_N[:used]) == set(range(R))
        assert (expert_N[used:] == expert_N[used - 1]).all() and (rows_N[used:] == 0).all()
        for expert in range(R):
            mine_CT = (indices_TC == expert).T
            first = np.flatnonzero(expert_N == expert)[0] * rows
            tokens = np.argwhere(mine_CT.any(0))[:, 0]
            wanted = {(token, first + place) for place, token in enumerate(tokens)}
            assert {(token, slot_CT[choice, token]) for choice, token in np.argwhere(mine_CT)} == wanted
            assert rows_N[:used][expert_N[:used] == expert].sum() == len(tokens)
        assert (slot_CT[:, :T][indices_TC.T == R] == -1).all()

    check()


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 16))
def test_tiles_suffice_for_any_counts(counts, rows):
    assert sum(max(-(-count // rows), 1) for count in counts) <= num_tiles(sum(counts), len(counts), rows)


# Rows


@pytest.mark.parametrize("dtype, D", [("bfloat16", 256), ("float32", 128)])
def test_rows_go_to_their_slots_and_their_sums_come_back(dtype, D):
    T, C, M = 128, 2, 300
    rng = np.random.default_rng(0)
    slot_CT = rng.permutation(M)[: C * T].reshape(C, T).astype(np.int32)
    slot_CT[rng.random((C, T)) < 0.3] = -1
    x_TD, extra_TL = jnp.asarray(rng.normal(size=(T, D)), dtype), jnp.asarray(rng.normal(size=(T, 128)), jnp.float32)
    rows_MW = push(x_TD, slot_CT, extra_TL, slots=M, vmem=VMEM, interpret=INTERPRET)
    held_CT, written_MW = slot_CT >= 0, np.asarray(rows_MW)
    for choice, token in np.argwhere(held_CT):
        extra_L = written_MW[slot_CT[choice, token], 0, -128:].view(np.float32)
        np.testing.assert_array_equal(extra_L, np.asarray(extra_TL)[token])
    scalar_M = rng.normal(size=M).astype(np.float32)
    scalar_ML = jnp.broadcast_to(scalar_M[:, None, None], (M, 1, 128))
    y_TD, scalars_TL = pull(rows_MW[:, :, :-128], scalar_ML, slot_CT, dtype=x_TD.dtype, vmem=VMEM, interpret=INTERPRET)
    wanted_TD = (np.asarray(x_TD, np.float32) * held_CT.sum(0)[:, None]).astype(x_TD.dtype)
    np.testing.assert_array_equal(y_TD, wanted_TD)
    np.testing.assert_array_equal(scalars_TL[:, :C], np.where(held_CT, scalar_M[slot_CT], 0).T)


def moved(width, choices, tokens, itemsize=2):
    """Bytes of a dispatch and a combine, forward and backward, and the fewest possible: each row read and written once.

    One dispatch takes 128 numbers a row along, one combine brings as many back; each token's are read, or written, too.
    """
    row, numbers = width * itemsize, 4 * 128
    ways = 4 * (tokens + tokens * choices) * row
    return ways + 2 * (tokens + tokens * choices) * numbers, ways


def test_dmas_move_what_the_formula_says_and_at_most_a_fifth_more_than_the_fewest_bytes(monkeypatch):
    """Counted in interpret mode: DMAs of rows, one by one. Blocks are read and written once by construction."""
    T, C, D, M = 256, 3, 256, 900
    sizes, read = [], interpreter.DMA.execute_read

    def count(self):
        first = self.data is None
        read(self)
        if first:
            sizes.append(self.data_size)

    monkeypatch.setattr(interpreter.DMA, "execute_read", count)
    rng = np.random.default_rng(0)
    slot_CT = rng.permutation(M)[: C * T].reshape(C, T).astype(np.int32)
    x_TD, extra_TL = jnp.ones((T, D), jnp.bfloat16), jnp.ones((T, 128), jnp.float32)
    scalar_ML = jnp.ones((M, 1, 128), jnp.float32)
    for extra, scalars in ((None, scalar_ML), (extra_TL, None)):
        rows_MW = push(x_TD, slot_CT, extra, slots=M, vmem=VMEM, interpret=INTERPRET)
        row = rows_MW.shape[2] * 4
        assert sizes == [row] * (T * C)
        sizes.clear()
        words_MW = rows_MW[:, :, : D // 2]
        jax.block_until_ready(pull(words_MW, scalars, slot_CT, dtype=x_TD.dtype, vmem=VMEM, interpret=INTERPRET))
        assert sum(sizes) == T * C * (D * 2 + (0 if scalars is None else 4 * 128))
        sizes.clear()
    ours, fewest = moved(2048, 7, 32768)
    assert ours <= 1.2 * fewest


# Values and gradients


@functools.cache
def value_and_gradients(sizes):
    """Jitted: the result and all cotangents, of our kernels or, without sizes, of the reference."""

    def run(indices_TC, cotangent_TD, *arguments):
        def of(x, weights, *stacks):
            if sizes is None:
                return reference(x, indices_TC, weights, *stacks)
            return routed_experts_tpu(x, indices_TC, weights, *stacks, sizes=sizes, interpret=INTERPRET)

        with jax.default_matmul_precision("highest"):
            y_TD, pullback = jax.vjp(of, *arguments)
            return y_TD, *pullback(cotangent_TD)

    return jax.jit(run)


def compare(T, C, R, D, F, sizes, dtype, tolerance, seed, pattern):
    rng = np.random.default_rng(seed)
    indices_TC = choose(rng, T, C, R, pattern)
    shapes = [(T, D), (T, D), (T, C), (R, D, F), (R, D, F), (R, F, D)]
    kinds = [dtype, dtype, "float32", dtype, dtype, dtype]
    arrays = [jnp.asarray(rng.normal(size=s) * 0.2, k) for s, k in zip(shapes, kinds, strict=True)]
    ours = value_and_gradients(sizes)(indices_TC, *arrays)
    wanted = value_and_gradients(None)(indices_TC, *(a.astype(jnp.float32) for a in arrays))
    kinds = (dtype, dtype, "float32", dtype, dtype, dtype)
    assert_close(ours, [want.astype(kind) for want, kind in zip(wanted, kinds, strict=True)], tolerance)


@settings(deadline=None, max_examples=4)
@given(SEEDS, st.sampled_from(PATTERNS))
def test_the_kernels_and_their_gradients_are_the_references(seed, pattern):
    compare(30, 2, 3, 128, 128, Sizes(128, 128, 128, VMEM), "float32", 1e-5, seed, pattern)


@pytest.mark.parametrize("pattern", ["skewed", "some without"])
def test_results_in_parts_of_bfloat16_and_blocks_of_tokens(pattern):
    """An expert over several tiles, tokens over several blocks, D and F in two parts each."""
    compare(150, 2, 3, 512, 256, Sizes(128, 128, 256, VMEM), "bfloat16", 4e-2, 0, pattern)


# Compiled for TPUs


def compiled(chip, implementation, T=4096, C=7, R=127, D=2048, F=1024):
    """Forward and backward at the released geometry, on one chip."""
    pytest.importorskip("libtpu", reason="ahead-of-time TPU compiles need libtpu: pip install 'jax[tpu]'")
    options = {"chip_config_name": "megacore"} if chip == "v4" else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip], **options)
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))

    def run(cotangent_TD, indices_TC, *arguments):
        def of(x, weights, *stacks):
            return routed_experts(x, indices_TC, weights, *stacks, implementation=implementation)

        y_TD, pullback = jax.vjp(of, *arguments)
        return y_TD, *pullback(cotangent_TD)

    shapes = [(T, D), (T, C), (T, D), (T, C), (R, D, F), (R, D, F), (R, F, D)]
    kinds = ["bfloat16", "int32", "bfloat16", "float32", *["bfloat16"] * 3]
    place = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(s, k, sharding=place) for s, k in zip(shapes, kinds, strict=True)]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert best_sizes(T * C, R, C, D, F, jnp.bfloat16)
        lowered = jax.jit(run).lower(*arguments)
    return lowered.compile()


@pytest.mark.parametrize(
    "chip", ["v4", "v6e", *(pytest.param(c, marks=pytest.mark.slow) for c in ("v5e", "v5p", "tpu7x"))]
)
def test_the_released_width_compiles_within_fast_memory_without_sort_scatter_or_gather(chip):
    hlo = compiled(chip, "pallas_tpu").as_text()
    # push, gated, to_rows, pull; push, gated_backward, outer twice, to_rows, pull.
    assert hlo.count('custom_call_target="tpu_custom_call"') == 10
    assert not any(f" {kind}(" in hlo for kind in ("sort", "scatter", "gather"))
    # What the kernels tell the compiler: the formula's FLOPs, and for rows there and back the bytes counted above.
    assert products(hlo).grouped == 18 * 4096 * 7 * 2048 * 1024
    there_and_back = sum(one.traffic for one in work(hlo) if any(name in one.name for name in MOVES))
    assert there_and_back == pytest.approx(moved(2048, 7, 4096)[0], rel=0.01)


@pytest.mark.slow
def test_it_takes_less_memory_than_the_compilers_own():
    ours, theirs = (compiled("v5p", name, T=8192).memory_analysis() for name in ("pallas_tpu", "ragged"))
    assert ours.temp_size_in_bytes < theirs.temp_size_in_bytes

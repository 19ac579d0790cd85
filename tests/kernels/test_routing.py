"""The routing kernel against `model.routing.route`, whose lines are the specification.

Letters: B rows, S sequence, R routed experts, G documents a row, C choices, D different experts.
"""

import contextlib
import functools
import itertools
import types
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from emo_jax.errors import UserError
from emo_jax.kernels.routing import IMPLEMENTATIONS, default_implementation, fits, fused_routing, pallas_tpu
from emo_jax.model import PoolConfig, moe, routing
from emo_jax.model.remat import REMAT
from emo_jax.model.routing import RoutingTotals, choose_pool, route
from emo_jax.parallel import MeshConfig, make_mesh

B = 2
SEEDS = st.integers(0, 2**32 - 1)
EXACT = {"tokens_B", "documents_B", "counts_BR", "pool_size_B", "pool_min_B", "pool_max_B", "unique_B"}


class Setting(NamedTuple):
    """Shapes and fields that a kernel is compiled for; the last three are its own limits, small here."""

    length: int
    experts: int
    documents: int
    choices: int
    kind: str = "document"
    normalize: bool = False
    forced: int = 0
    block: int = 128
    row_bytes: int = 2**22
    part_bytes: int = 2**18


SETTINGS = {
    "released experts": Setting(300, 127, 5, 7, forced=1),
    "rows read twice": Setting(384, 31, 3, 3, normalize=True, row_bytes=0),
    "many documents, blocks in parts": Setting(290, 7, 140, 2, block=256, part_bytes=2**12),
    "random pools": Setting(257, 17, 4, 2, kind="random", normalize=True, forced=1),
    "no pools": Setting(200, 8, 3, 2, kind="none", normalize=True),
}
SMALL = Setting(130, 7, 3, 2)


def interpreted(function, setting=SMALL):
    """The function, its kernels traced for a simulated TPU whose memory is NaN until written to, in small blocks."""

    @functools.wraps(function)
    def run(*args):
        simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
        fused = functools.partial(fused_routing, block=setting.block)
        with (
            pltpu.force_tpu_interpret_mode(simulated),
            mock.patch.object(pallas_tpu, "ROW_BYTES", setting.row_bytes),
            mock.patch.object(pallas_tpu, "PART_BYTES", setting.part_bytes),
            mock.patch.object(routing, "fused_routing", fused),
        ):
            return function(*args)

    return run


def router(setting, implementation):
    """`route` of (logits, ids, sizes, seeds)."""
    pool = PoolConfig(kind=setting.kind, min=setting.choices, max=setting.experts + 1, forced=setting.forced)

    def run(logits_BSR, ids_BS, size_BG, seed_BG2):
        return route(
            logits_BSR,
            ids_BS,
            choices=setting.choices,
            normalize=setting.normalize,
            pool=pool,
            size_BG=None if setting.kind == "none" else size_BG,
            seed_BG2=seed_BG2,
            documents=setting.documents,
            implementation=implementation,
        )

    return run


def differentiable(decided):
    return decided.weights_BSC, decided.totals.weights_BR, decided.totals.z_B


@functools.cache
def with_gradient(setting, implementation):
    """Jitted: the routing, and the logits' gradient for cotangents of all that has one."""

    def run(logits_BSR, cotangents, *given):
        def decide(logits_BSR):
            decided = router(setting, implementation)(logits_BSR, *given)
            return differentiable(decided), decided

        _, pull_back, decided = jax.vjp(decide, logits_BSR, has_aux=True)
        return decided, *pull_back(cotangents)

    return jax.jit(interpreted(run, setting))


def random_ids(rng, setting):
    """Rows of contiguous documents: none, of one token each, a few that span blocks, or some with padding between."""
    ids_BS = np.zeros((B, setting.length), np.int32)
    for row in ids_BS:
        layout, most = rng.integers(4), setting.documents
        if layout == 1:
            row[: min(most, setting.length)] = np.arange(1, most + 1)[: setting.length]
        if layout > 1:
            cuts = np.sort(rng.integers(0, setting.length + 1, min(most, 3 if layout == 2 else most) + 1))
            for document, (start, end) in enumerate(itertools.pairwise(cuts), 1):
                row[start : end - rng.integers(2)] = document
    return ids_BS


def random_case(seed, setting):
    """Float32 logits of experts of which some are the same, ids, sizes, seeds of orders, and cotangents."""
    rng = np.random.default_rng(seed)
    length, experts, documents, choices = setting[:4]
    different = rng.integers(1, experts + 1)
    shape = (B, length, different)
    logits_BSD = [
        lambda: rng.normal(scale=2, size=shape),
        lambda: rng.integers(-1, 2, shape),
        lambda: rng.choice([-1e4, 0.0, 1e4], shape),
    ][rng.integers(3)]()
    logits_BSR = logits_BSD[..., rng.integers(0, different, experts)].astype(np.float32)
    ids_BS = random_ids(rng, setting)
    size_BG = rng.integers(choices, experts + 2, (B, documents))
    size_BG = np.where(rng.random(size_BG.shape) < 0.3, rng.choice([choices, experts + 1], size_BG.shape), size_BG)
    size_BG = np.where(_undecided(logits_BSR, ids_BS, size_BG, setting.forced), experts, size_BG)
    seeds_BG2 = rng.integers(0, 2**32, (B, documents, 2), dtype=np.uint32)
    cotangents = tuple(rng.normal(size=size).astype(np.float32) for size in ((B, length, choices), (B, experts), (B,)))
    return logits_BSR, ids_BS, size_BG.astype(np.int32), seeds_BG2, cotangents


def _undecided(logits_BSR, ids_BS, size_BG, forced):
    """Documents whose last expert in the pool is ahead of the next by rounding alone, and has other logits."""
    wide_BSR = logits_BSR.astype(np.float64)
    p_BSR = np.exp(wide_BSR - wide_BSR.max(-1, keepdims=True))
    p_BSR /= p_BSR.sum(-1, keepdims=True)
    undecided_BG = np.zeros(size_BG.shape, bool)
    for b, g in np.ndindex(size_BG.shape):
        mine_S, free = ids_BS[b] == g + 1, slice(p_BSR.shape[-1] - forced)
        score_R, n = p_BSR[b, mine_S, free].sum(0), size_BG[b, g] - forced
        if 0 < n < len(score_R):
            last, following = -np.sort(-score_R)[n - 1 : n + 1]
            near_SR = logits_BSR[b, mine_S, free][:, np.abs(score_R - last) <= 1e-5 * last]
            undecided_BG[b, g] = last - following <= 1e-5 * last and (near_SR != near_SR[:, :1]).any()
    return undecided_BG


def assert_close(ours, wanted, name, tolerance=1e-5):
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted)
    np.testing.assert_allclose(ours, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_kernel_decides_sums_and_differentiates_as_route_does(name):
    setting = SETTINGS[name]

    @settings(deadline=None, max_examples=6, phases=[Phase.generate])
    @given(SEEDS)
    def check(seed):
        logits_BSR, ids_BS, size_BG, seed_BG2, cotangents = random_case(seed, setting)
        given = ids_BS, size_BG, seed_BG2
        ours, gradient_BSR = with_gradient(setting, "pallas_tpu")(logits_BSR, cotangents, *given)
        wanted, wanted_gradient_BSR = with_gradient(setting, "xla")(logits_BSR, cotangents, *given)
        # At 1e4 neighbouring float32 lie 1e-3 apart, and the lines subtract such logsumexps.
        tolerance = 1e-5 if np.abs(logits_BSR).max() < 1e3 else 2e-3
        for field in ("in_pool_BGR", "indices_BSC", "logits_BSR"):
            np.testing.assert_array_equal(getattr(ours, field), getattr(wanted, field), err_msg=field)
        assert_close(ours.weights_BSC, wanted.weights_BSC, "weights", tolerance)
        for field in RoutingTotals._fields:
            mine, other = getattr(ours.totals, field), getattr(wanted.totals, field)
            assert_close(mine, other, field, 0 if field in EXACT else tolerance)
        assert_close(gradient_BSR, wanted_gradient_BSR, "gradient", tolerance)

    check()


@functools.cache
def fused(setting):
    """Jitted `fused_routing` of (logits, ids, sizes)."""

    def run(logits_BSR, ids_BS, size_BG):
        return fused_routing(
            logits_BSR,
            ids_BS,
            choices=setting.choices,
            documents=setting.documents,
            size_BG=size_BG,
            forced=setting.forced,
            block=setting.block,
        )

    return jax.jit(interpreted(run, setting))


@settings(deadline=None, max_examples=10, phases=[Phase.generate])
@given(SEEDS)
def test_whatever_the_sums_the_pools_are_those_that_choose_pool_makes_of_them(seed):
    setting = Setting(130, 33, 4, 2, forced=2)
    rng = np.random.default_rng(seed)
    different = rng.integers(1, 5)
    logits_BSD = rng.normal(scale=rng.choice([1e-7, 1, 100]), size=(B, setting.length, different))
    same_R = rng.integers(0, different, setting.experts)
    size_BG = rng.integers(2, setting.experts + 2, (B, setting.documents)).astype(np.int32)
    ids_BS = random_ids(rng, setting)
    ours = fused(setting)(logits_BSD[..., same_R].astype(np.float32), ids_BS, size_BG)
    wanted_BGR = choose_pool(ours.sum_p_BGR, size_BG, setting.forced)
    np.testing.assert_array_equal(ours.in_pool_BGR, wanted_BGR)
    for expert in range(different):  # equal experts have equal sums, to the last bit
        alike_BGR = np.asarray(ours.sum_p_BGR)[..., same_R == expert]
        assert (alike_BGR == alike_BGR[..., :1]).all()


def test_sums_of_probabilities_are_no_less_exact_than_float32():
    rng = np.random.default_rng(0)
    logits_BSR = rng.normal(size=(B, SMALL.length, SMALL.experts)).astype(np.float32)
    ids_BS, size_BG = np.ones((B, SMALL.length), np.int32), np.full((B, SMALL.documents), 2, np.int32)
    ours = fused(SMALL)(logits_BSR, ids_BS, size_BG)
    with jax.enable_x64(True):
        wanted_BR = jax.nn.softmax(logits_BSR.astype(np.float64)).sum(1)
    np.testing.assert_allclose(ours.sum_p_BGR[:, 0], wanted_BR, rtol=5e-7)


def small_case(seed=0, rows=B):
    """Router inputs and weights, ids, sizes, seeds, and cotangents as in `random_case`."""
    rng = np.random.default_rng(seed)
    x_BSD = rng.normal(size=(rows, SMALL.length, 4)).astype(np.float32)
    router_DR = rng.normal(size=(4, SMALL.experts)).astype(np.float32)
    ids_BS = np.tile(np.repeat([1, 2, 0, 3], [50, 60, 5, 15])[None].astype(np.int32), (rows, 1))
    size_BG = rng.integers(2, 6, (rows, SMALL.documents)).astype(np.int32)
    shapes = ((rows, SMALL.length, SMALL.choices), (rows, SMALL.experts), (rows,))
    cotangents = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return x_BSD, router_DR, ids_BS, size_BG, np.zeros((rows, SMALL.documents, 2), np.uint32), cotangents


def layer_gradients(decide, policy=None):
    """Gradients of a router's inputs and weights, its logits computed again where there is a policy."""

    def run(x_BSD, router_DR, ids_BS, size_BG, seed_BG2, cotangents):
        def layer(x_BSD, router_DR):
            logits_BSR = jnp.einsum("bsd,dr->bsr", jnp.sin(x_BSD), router_DR, precision="highest")
            return differentiable(decide(logits_BSR, ids_BS, size_BG=size_BG, seed_BG2=seed_BG2))

        layer = layer if policy is None else jax.checkpoint(layer, policy=REMAT[policy])
        return jax.vjp(layer, x_BSD, router_DR)[1](cotangents)

    return run


@pytest.mark.parametrize("policy", ["full", "none"])
def test_what_the_kernel_decided_is_not_decided_again_in_the_backward_pass(policy, monkeypatch):
    # The simulated TPU has effects, which no policy takes.
    plainly = functools.partial(pl.pallas_call, interpret=True)
    monkeypatch.setattr(pallas_tpu, "pl", types.SimpleNamespace(**vars(pl) | {"pallas_call": plainly}))
    case, decide = small_case(), router(SMALL, "pallas_tpu")
    again, kept = layer_gradients(decide, policy), layer_gradients(decide)
    program = str(jax.make_jaxpr(again)(*case))
    assert program.count("name=routing\n") == program.count("name=routing_backward\n") == 1
    for ours, wanted in zip(jax.jit(again)(*case), jax.jit(kept)(*case), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-6, atol=1e-6)


def test_the_kernel_runs_on_each_devices_rows_and_so_do_its_gradients(monkeypatch):
    monkeypatch.setattr(moe, "default_implementation", lambda platform: "pallas_tpu")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), 4, jax.devices()[:4])
    case = small_case(rows=4)
    decide = functools.partial(route, choices=SMALL.choices, pool=PoolConfig(min=2, max=8))
    ours = jax.jit(interpreted(layer_gradients(moe._by_rows(decide, mesh))))(*case)
    wanted = jax.jit(layer_gradients(decide))(*case)
    for gradient, other in zip(ours, wanted, strict=True):
        assert_close(gradient, other, "gradient")


def test_layers_use_the_kernel_on_tpus_alone_and_with_whole_rows(monkeypatch):
    assert moe._by_rows(route, None) is route
    monkeypatch.setattr(moe, "default_implementation", lambda platform: "pallas_tpu")
    assert moe._by_rows(route, None) is not route
    assert moe._by_rows(route, make_mesh(MeshConfig(data=2, context=2), 2, jax.devices()[:4], length=256)) is route


@pytest.mark.parametrize(
    "length, dtype, options, taken",
    [
        (130, "float32", {}, True),
        (100, "float32", {}, False),
        (130, "float64", {}, False),
        (130, "float32", {"voters_BS": np.ones((B, 130), bool)}, False),
        (130, "float32", {"kept": routing.Kept(np.ones(7, bool), np.array(True))}, False),
        (130, "float32", {"always_active": (3,)}, False),
    ],
)
def test_what_the_kernel_does_not_take_goes_through_the_lines(monkeypatch, length, dtype, options, taken):
    def called(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(routing, "fused_routing", called)
    pool, size_BG = PoolConfig(min=2, max=8), np.full((B, 1), 3)
    decide = functools.partial(route, choices=2, pool=pool, size_BG=size_BG, implementation="pallas_tpu", **options)
    with jax.enable_x64(True), pytest.raises(InterruptedError) if taken else contextlib.nullcontext():
        jax.eval_shape(decide, np.zeros((B, length, 7), dtype), np.ones((B, length), np.int32))


def test_more_documents_or_experts_than_fast_memory_holds_are_not_for_the_kernel():
    logits = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    assert fits(logits((1, 4096, 127)), 1000) and fits(logits((1, 128, 1024)), 64)
    assert not fits(logits((1, 4096, 127)), 2000) and not fits(logits((1, 4096, 1024)), 129)


def test_an_unknown_implementation_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"implementation='palas_tpu'.*Did you mean 'pallas_tpu'\?"):
        route(np.zeros((1, 1, 2)), np.ones((1, 1), np.int32), choices=1, implementation="palas_tpu")


def test_every_platform_has_a_default():
    assert {default_implementation(platform) for platform in ("cpu", "gpu", "tpu")} == set(IMPLEMENTATIONS)

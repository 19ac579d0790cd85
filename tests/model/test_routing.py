"""The router's promises: pools, choices, weights, what carries a gradient, and draws that nothing can change.

Letters: B rows, S sequence, G documents a row, R routed experts, C choices, L layers.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from emo_jax.model import PoolConfig, balance_loss, draw_pools
from emo_jax.model.routing import RoutingTotals, choose_pool, random_scores, route
from emo_jax.parallel import MeshConfig, make_mesh
from tests import oracle

B, S, G, R = 2, 10, 3, 6
SEEDS = st.integers(0, 2**32 - 1)
SIZES = np.full((B, G), 3, np.int32)
NO_SEEDS = np.zeros((B, G, 2), np.uint32)
DIFFERENTIABLE = ("weights_BR", "z_B")


@functools.cache
def router(kind="document", choices=2, normalize=False, forced=0):
    """A jitted `route`, compiled once a setting."""
    pool = PoolConfig(kind=kind, min=choices, max=R + 1, forced=forced)

    def run(logits_BSR, ids_BS, size_BG, seed_BG2):
        return route(
            logits_BSR,
            ids_BS,
            choices=choices,
            normalize=normalize,
            pool=pool,
            size_BG=None if kind == "none" else size_BG,
            seed_BG2=seed_BG2,
            documents=G,
        )

    return jax.jit(run)


def random_ids(rng):
    """Contiguous documents 1..G at most, padding after, before and between some of them."""
    ids_BS = np.zeros((B, S), np.int32)
    for row in ids_BS:
        cuts = np.sort(rng.integers(0, S + 1, G + 1))
        document = 0
        for start, end in itertools.pairwise(cuts):
            end -= rng.integers(0, 2)
            if end > start:
                document += 1
                row[start:end] = document
    return ids_BS


def random_case(seed, choices=2, scale=2.0):
    rng = np.random.default_rng(seed)
    logits_BSR = rng.normal(scale=scale, size=(B, S, R))
    sizes_BG = rng.integers(choices, R + 2, (B, G)).astype(np.int32)  # R + 1 experts with a shared one: 2..E
    seeds_BG2 = rng.integers(0, 2**32, (B, G, 2), dtype=np.uint32)
    return rng, logits_BSR, random_ids(rng), sizes_BG, seeds_BG2


def assert_bit_equal(ours, wanted):
    for (path, leaf), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))


# Pools


@settings(deadline=None, max_examples=40)
@given(
    hnp.arrays(np.float32, (B, G, R), elements=st.integers(0, 3).map(float)),  # so few values tie often
    hnp.arrays(np.int32, (B, G), elements=st.integers(2, R + 2)),
    st.sampled_from([0, 2]),
)
def test_a_pool_is_the_experts_of_largest_score_with_ties_to_the_lower_index(score_BGR, size_BG, forced):
    pool_BGR = choose_pool(score_BGR, size_BG, forced)
    for index in np.ndindex(B, G):
        wanted_R = oracle.document_pool(score_BGR[index], size_BG[index], forced)
        np.testing.assert_array_equal(pool_BGR[index], wanted_R)
    np.testing.assert_array_equal(pool_BGR.sum(-1), np.minimum(size_BG, R))
    assert pool_BGR[..., R - forced :].all()


def test_an_exact_tie_of_document_sums_goes_to_the_lower_index():
    logits_BSR = np.tile(np.float32([0, 2, 1, 2, 1, 1]), (B, S, 1))
    for size, wanted in [(2, {1, 3}), (3, {1, 2, 3}), (4, {1, 2, 3, 4}), (5, {1, 2, 3, 4, 5})]:
        size_BG = np.full((B, G), size, np.int32)
        routing = router()(logits_BSR, np.ones((B, S), np.int32), size_BG, NO_SEEDS)
        assert set(np.flatnonzero(routing.totals.weights_BR[0])) == wanted


@pytest.mark.parametrize("size", [R, R + 1])
def test_a_pool_of_all_experts_masks_nothing(size):
    _, logits_BSR, ids_BS, _, _ = random_case(0)
    pooled = router()(logits_BSR, ids_BS, np.full((B, G), size, np.int32), NO_SEEDS)
    free = router("none")(logits_BSR, ids_BS, SIZES, NO_SEEDS)
    np.testing.assert_array_equal(pooled.indices_BSC, free.indices_BSC)
    np.testing.assert_allclose(pooled.weights_BSC, free.weights_BSC, rtol=1e-6)
    np.testing.assert_array_equal(pooled.totals.pool_max_B, free.totals.pool_max_B)


@pytest.mark.parametrize(
    "kind, normalize, forced",
    [("document", False, 0), ("document", True, 2), ("random", False, 2), ("none", True, 0)],
)
def test_routing_is_the_oracles(kind, normalize, forced):
    choices = 2

    @settings(deadline=None, max_examples=25)
    @given(SEEDS)
    def check(seed):
        _, logits_BSR, ids_BS, sizes_BG, seeds_BG2 = random_case(seed, choices)
        with jax.enable_x64(True):
            ours = router(kind, choices, normalize, forced)(logits_BSR, ids_BS, sizes_BG, seeds_BG2)
            scores_BGR = np.asarray(scores(seeds_BG2)) if kind == "random" else None
        setting = oracle.Settings(choices, normalize_top_k=normalize, pool_kind=kind, forced=forced)
        wanted = oracle.route(logits_BSR, ids_BS, setting, sizes_BG, scores_BGR)
        routed_BS = ids_BS > 0
        np.testing.assert_array_equal(ours.indices_BSC[routed_BS], wanted.indices_BSC[routed_BS])
        np.testing.assert_allclose(ours.weights_BSC[routed_BS], wanted.weights_BSC[routed_BS], rtol=1e-12)
        np.testing.assert_array_equal(ours.indices_BSC[~routed_BS], R)
        np.testing.assert_array_equal(ours.weights_BSC[~routed_BS], 0)
        np.testing.assert_array_equal(ours.logits_BSR, logits_BSR)
        totals = ours.totals
        np.testing.assert_array_equal(totals.tokens_B, routed_BS.sum(1))
        np.testing.assert_array_equal(totals.documents_B, [len(set(row) - {0}) for row in ids_BS.tolist()])
        np.testing.assert_allclose(totals.weights_BR, wanted.masked_probabilities_BSR.sum(1), rtol=1e-12, atol=1e-15)
        for b in range(B):
            chosen = wanted.indices_BSC[b][routed_BS[b]].ravel()
            np.testing.assert_array_equal(totals.counts_BR[b], np.bincount(chosen, minlength=R))
            z = [oracle.logsumexp(z_R) ** 2 for z_R in wanted.masked_logits_BSR[b][routed_BS[b]]]
            np.testing.assert_allclose(totals.z_B[b], sum(z), rtol=1e-12)

    check()


@settings(deadline=None, max_examples=25)
@given(SEEDS)
def test_pools_of_some_tokens_and_always_active_experts_are_the_oracles(seed):
    always = (4, 1)
    rng, logits_BSR, ids_BS, sizes_BG, _ = random_case(seed, 3)
    voters_BS = rng.random((B, S)) < 0.4
    with jax.enable_x64(True):
        ours = voting_router(always)(logits_BSR, ids_BS, sizes_BG, voters_BS)
    setting = oracle.Settings(3, pool_kind="document", always_active=always)
    wanted = oracle.route(logits_BSR, ids_BS, setting, sizes_BG, None, voters_BS)
    routed_BS = ids_BS > 0
    np.testing.assert_array_equal(ours.indices_BSC[routed_BS], wanted.indices_BSC[routed_BS])
    np.testing.assert_allclose(ours.weights_BSC[routed_BS], wanted.weights_BSC[routed_BS], rtol=1e-12)
    for b, g in itertools.product(range(B), range(G)):
        if (ids_BS[b] == g + 1).any():
            np.testing.assert_array_equal(ours.in_pool_BGR[b, g], wanted.pool_BGR[b, g])


@functools.cache
def voting_router(always):
    pool = PoolConfig(kind="document", min=3, max=R + 1)

    def run(logits_BSR, ids_BS, size_BG, voters_BS):
        return route(
            logits_BSR, ids_BS, choices=3, pool=pool, size_BG=size_BG, voters_BS=voters_BS, always_active=always
        )

    return jax.jit(run)


@functools.cache
def _scores():
    return jax.jit(lambda seeds_BG2: random_scores(seeds_BG2, R))


def scores(seeds_BG2):
    return _scores()(seeds_BG2)


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_a_document_is_routed_alike_whatever_surrounds_it(seed):
    rng, logits_BSR, ids_BS, sizes_BG, _ = random_case(seed)
    ids_BS[0, 3:6] = 0  # the document under test: row 0, places 3 to 5
    ids_BS[ids_BS == 2] = 0
    ids_BS[0, 3:6] = 2
    other_ids_BS = np.where(ids_BS == 2, 2, rng.choice([0, 1, 3], (B, S))).astype(np.int32)
    other_ids_BS[1] = 2
    logits_BSR = logits_BSR.astype(np.float32)
    mine_BS1 = np.zeros((B, S, 1), bool)
    mine_BS1[0, 3:6] = True
    other_logits_BSR = np.where(mine_BS1, logits_BSR, rng.normal(scale=5, size=logits_BSR.shape)).astype(np.float32)
    other_sizes_BG = rng.integers(2, R + 2, (B, G)).astype(np.int32)
    other_sizes_BG[0, 1] = sizes_BG[0, 1]
    ours = router()(logits_BSR, ids_BS, sizes_BG, NO_SEEDS)
    other = router()(other_logits_BSR, other_ids_BS, other_sizes_BG, NO_SEEDS)
    np.testing.assert_array_equal(ours.indices_BSC[0, 3:6], other.indices_BSC[0, 3:6])
    np.testing.assert_array_equal(ours.weights_BSC[0, 3:6], other.weights_BSC[0, 3:6])


# Choices and weights


@settings(deadline=None, max_examples=30)
@given(hnp.arrays(np.float32, (B, S, R), elements=st.integers(-2, 2).map(float)))
def test_choices_fall_by_weight_with_ties_to_the_lower_index(logits_BSR):
    routing = router("none")(logits_BSR, np.ones((B, S), np.int32), SIZES, NO_SEEDS)
    wanted_BSC = np.argsort(-logits_BSR, axis=-1, kind="stable")[..., :2]
    np.testing.assert_array_equal(routing.indices_BSC, wanted_BSC)
    assert (np.diff(routing.weights_BSC, axis=-1) <= 0).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_weights_are_the_softmax_inside_the_pool_scaled_to_1_only_when_asked(normalize):
    logits_BSR = np.tile(np.float32([3, 0, 2, -1, 1, -2]), (B, S, 1))
    size_BG = np.full((B, G), 3, np.int32)
    routing = router(normalize=normalize)(logits_BSR, np.ones((B, S), np.int32), size_BG, NO_SEEDS)
    inside = np.exp([3, 2, 1])
    wanted_C = inside[:2] / (inside[:2].sum() if normalize else inside.sum())
    np.testing.assert_array_equal(routing.indices_BSC[0, 0], [0, 2])
    np.testing.assert_allclose(routing.weights_BSC[0, 0], wanted_C, rtol=1e-6)


def test_equal_logits_choose_the_lowest_indices_with_equal_weights():
    for value in (-1e4, 0.0, 1e4):
        logits_BSR = np.full((B, S, R), value, np.float32)
        routing = router()(logits_BSR, np.ones((B, S), np.int32), np.full((B, G), 4, np.int32), NO_SEEDS)
        np.testing.assert_array_equal(routing.indices_BSC, np.broadcast_to([0, 1], (B, S, 2)))
        np.testing.assert_allclose(routing.weights_BSC, 0.25, rtol=1e-3)  # 1e4 has a spacing of 1e-3 in float32


# Tokens of document 0


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([0.0, 1.0, 1e4, -1e4]))
def test_what_document_0_contains_changes_nothing(seed, scale):
    rng, logits_BSR, ids_BS, sizes_BG, _ = random_case(seed)
    padding_BS1 = ids_BS[..., None] == 0
    noise_BSR = scale * rng.choice([-1.0, 1.0, 0.5], logits_BSR.shape)
    logits_BSR = logits_BSR.astype(np.float32)
    other_BSR = np.where(padding_BS1, noise_BSR, logits_BSR).astype(np.float32)
    ours, other = (router()(z_BSR, ids_BS, sizes_BG, NO_SEEDS) for z_BSR in (logits_BSR, other_BSR))
    assert_bit_equal(other._replace(logits_BSR=0), ours._replace(logits_BSR=0))


def test_rows_without_documents_are_zero_and_finite():
    for kind in ("document", "none"):
        _, logits_BSR, _, sizes_BG, _ = random_case(1)
        routing = router(kind)(logits_BSR.astype(np.float32), np.zeros((B, S), np.int32), sizes_BG, NO_SEEDS)
        for name in set(RoutingTotals._fields) - {"pool_min_B"}:
            np.testing.assert_array_equal(getattr(routing.totals, name), 0, err_msg=name)
        np.testing.assert_array_equal(routing.totals.pool_min_B, R)


# Gradients and extremes


@functools.cache
def gradient(normalize=False, forced=0):
    """d/dz of every output times a cotangent: (logits, ids, sizes, cotangents) → [B, S, R]."""

    def objective(logits_BSR, ids_BS, size_BG, cotangents):
        routing = router(normalize=normalize, forced=forced)(logits_BSR, ids_BS, size_BG, NO_SEEDS)
        outputs = {"weights_BSC": routing.weights_BSC} | routing.totals._asdict()
        return sum((outputs[name] * cotangent).sum() for name, cotangent in cotangents.items())

    return jax.jit(jax.grad(objective))


def cotangents_like(rng, names):
    shapes = {"weights_BSC": (B, S, 2), "weights_BR": (B, R), "counts_BR": (B, R)}
    return {name: rng.normal(size=shapes.get(name, (B,))) for name in names}


@pytest.mark.parametrize("normalize", [False, True])
def test_the_gradient_is_of_the_softmax_inside_a_constant_pool(normalize):
    @settings(deadline=None, max_examples=20)
    @given(SEEDS)
    def check(seed):
        rng, logits_BSR, ids_BS, sizes_BG, _ = random_case(seed)
        cotangents = cotangents_like(rng, ("weights_BSC", "weights_BR", "z_B"))
        with jax.enable_x64(True):
            ours_BSR = gradient(normalize)(logits_BSR, ids_BS, sizes_BG, cotangents)
        setting = oracle.Settings(2, normalize_top_k=normalize, pool_kind="document")
        routing = oracle.route(logits_BSR, ids_BS, setting, sizes_BG)
        wanted_BSR = np.zeros((B, S, R))
        for b, s in np.argwhere(ids_BS > 0):
            w_R, chosen_C = routing.masked_probabilities_BSR[b, s], routing.indices_BSC[b, s]
            a_C, weight_C = cotangents["weights_BSC"][b, s], routing.weights_BSC[b, s]
            b_R = cotangents["weights_BR"][b]
            # A softmax's pullback of a is w (a − Σ a w); normalised, the softmax is over the chosen alone.
            wanted_BSR[b, s] = w_R * (b_R - b_R @ w_R)
            wanted_BSR[b, s, chosen_C] += weight_C * (a_C - (a_C @ weight_C if normalize else 0))
            wanted_BSR[b, s] -= 0 if normalize else w_R * (a_C @ weight_C)
            wanted_BSR[b, s] += cotangents["z_B"][b] * 2 * oracle.logsumexp(routing.masked_logits_BSR[b, s]) * w_R
        np.testing.assert_allclose(ours_BSR, wanted_BSR, rtol=1e-10, atol=1e-12)

    check()


def test_no_gradient_flows_through_counts_pools_or_statistics():
    rng, logits_BSR, ids_BS, sizes_BG, _ = random_case(5)
    names = set(RoutingTotals._fields) - set(DIFFERENTIABLE)
    with jax.enable_x64(True):
        grad_BSR = gradient()(logits_BSR, ids_BS, sizes_BG, cotangents_like(rng, sorted(names)))
    np.testing.assert_array_equal(grad_BSR, 0)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.sampled_from([-1e4, 0.0, 1e4]), min_size=R, max_size=R),
    st.permutations(range(R)),
    st.booleans(),
)
def test_extreme_logits_stay_finite_and_never_choose_a_masked_expert(extreme, order, normalize):
    """The last token would like others than its document: its own pool's weights underflow to 0."""
    pool = sorted(order[:3])
    logits_BSR = np.zeros((B, S, R), np.float32)
    logits_BSR[..., pool] = 20.0
    logits_BSR[:, -1] = np.array(extreme, np.float32)
    ids_BS, size_BG = np.ones((B, S), np.int32), np.full((B, G), 3, np.int32)
    routing = router(normalize=normalize)(logits_BSR, ids_BS, size_BG, NO_SEEDS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(routing))
    assert set(np.flatnonzero(routing.totals.counts_BR.sum(0))) <= set(pool)
    wanted = sorted(pool, key=lambda r: (-extreme[r], r))[:2]
    np.testing.assert_array_equal(routing.indices_BSC[0, -1], wanted)
    names = ("weights_BSC", *RoutingTotals._fields)
    cotangents = cotangents_like(np.random.default_rng(0), names)
    cotangents = {name: c.astype(np.float32) for name, c in cotangents.items()}
    grad_BSR = gradient(normalize)(logits_BSR, ids_BS, size_BG, cotangents)
    assert np.isfinite(grad_BSR).all()
    masked = sorted(set(range(R)) - set(pool))
    np.testing.assert_array_equal(grad_BSR[..., masked], 0)


# Random pools


def test_random_pools_ignore_what_documents_contain():
    rng, logits_BSR, ids_BS, sizes_BG, seeds_BG2 = random_case(2)
    ids_BS[:], other_BSR = [1] * 4 + [2] * 6, rng.normal(size=logits_BSR.shape)
    ours, other = (
        router("random")(z_BSR.astype(np.float32), ids_BS, sizes_BG, seeds_BG2) for z_BSR in (logits_BSR, other_BSR)
    )
    pool_BR, other_BR = ours.totals.weights_BR > 0, other.totals.weights_BR > 0
    np.testing.assert_array_equal(pool_BR, other_BR)
    np.testing.assert_array_equal(ours.totals.pool_size_B, np.minimum(sizes_BG[:, :2], R).sum(1))


def test_random_pools_are_as_large_as_drawn_and_reach_every_expert_equally():
    drawn = np.random.default_rng(0).integers(0, 2**32, (B * 300, G, 2), dtype=np.uint32)
    pool_BGR = choose_pool(random_scores(drawn, R), np.full(drawn.shape[:2], 2, np.int32))
    np.testing.assert_array_equal(pool_BGR.sum(-1), 2)
    np.testing.assert_allclose(pool_BGR.mean((0, 1)), 2 / R, atol=4 * np.sqrt(2 / 9 / 1800))


# Draws

POOL = PoolConfig(min=3, max=10)
LAYERS, DOCUMENTS, EXPERTS = 3, 16, 9


@functools.cache
def draws(rows=96, pool=(3, 10, 0)):
    """A jitted `draw_pools`: (seed, step) → draws."""
    config = PoolConfig(min=pool[0], max=pool[1], start_step=pool[2])
    return jax.jit(
        lambda seed, step: draw_pools(
            config, seed, step, rows=rows, layers=LAYERS, documents=DOCUMENTS, experts=EXPERTS
        ),
    )


def test_pool_sizes_are_uniform_from_min_to_max_inclusive():
    size_BLG = np.asarray(draws()(0, 0).size_BLG)
    assert size_BLG.shape == (96, LAYERS, DOCUMENTS) and size_BLG.dtype == np.int32
    counts = np.bincount(size_BLG.ravel(), minlength=12)
    assert counts[:3].sum() == counts[11:].sum() == 0
    expected = size_BLG.size / 8
    assert ((counts[3:11] - expected) ** 2 / expected).sum() < 24.3  # χ² of 7 degrees: 1 in 1000


def test_draws_of_a_row_do_not_change_when_rows_are_added():
    many, few = draws()(7, 5), draws(rows=8)(7, 5)
    assert_bit_equal(jax.tree.map(lambda x: x[:8], many), few)


def test_draws_differ_between_seeds_steps_rows_layers_and_documents():
    base = draws()(0, 0)
    for other in (draws()(1, 0), draws()(0, 1)):
        for ours, theirs in zip(base[:2], other[:2], strict=True):
            assert (np.asarray(ours) != np.asarray(theirs)).mean() > 0.8  # sizes agree by chance in 1 of 8
    for axis in range(3):
        size = np.moveaxis(np.asarray(base.size_BLG), axis, 0)
        seed = np.moveaxis(np.asarray(base.seed_BLG), axis, 0)
        assert (size[0] != size[1]).mean() > 0.6
        assert (seed[0] != seed[1]).all()
    assert len(np.unique(np.asarray(base.seed_BLG).reshape(-1, 2), axis=0)) == base.size_BLG.size


def test_draws_are_the_same_compiled_vectorised_and_eager():
    eager = draw_pools(POOL, 7, np.int32(5), rows=8, layers=LAYERS, documents=DOCUMENTS, experts=EXPERTS)
    assert_bit_equal(draws(rows=8)(7, 5), eager)
    steps = jax.jit(jax.vmap(draws(rows=8), in_axes=(None, 0)))(7, np.arange(4, 7, dtype=np.int32))
    assert_bit_equal(jax.tree.map(lambda x: x[1], steps), eager)


def test_draws_are_the_same_on_four_devices():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), 8, jax.devices()[:4])
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    sharded = jax.jit(draws(rows=8), out_shardings=rows)(7, 5)
    assert len(sharded.size_BLG.sharding.device_set) == 4
    assert_bit_equal(sharded, draws(rows=8)(7, 5))


def test_before_their_start_step_pools_are_whole():
    start = draws(rows=8, pool=(3, 10, 6))
    np.testing.assert_array_equal(start(7, 5).size_BLG, EXPERTS)
    np.testing.assert_array_equal(start(7, 6).size_BLG, draws(rows=8)(7, 6).size_BLG)


def test_a_share_of_documents_has_no_pool_in_any_layer_and_the_others_draw_as_before():
    config = PoolConfig(min=3, max=8, whole_fraction=0.25)
    size_BLG = np.asarray(
        draw_pools(config, 7, np.int32(5), rows=96, layers=LAYERS, documents=DOCUMENTS, experts=EXPERTS).size_BLG
    )
    whole_BG = (size_BLG == EXPERTS).all(1)
    np.testing.assert_array_equal(size_BLG == EXPERTS, whole_BG[:, None] & np.full_like(size_BLG, True, bool))
    assert abs(whole_BG.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / whole_BG.size)
    before_BLG = np.asarray(draws(pool=(3, 8, 0))(7, 5).size_BLG)
    np.testing.assert_array_equal(size_BLG, np.where(whole_BG[:, None], EXPERTS, before_BLG))
    for first, wanted_BLG in ((6, before_BLG), (5, size_BLG)):  # before their step there are none
        later = dataclasses.replace(config, whole_step=first)
        drawn = draw_pools(later, 7, np.int32(5), rows=96, layers=LAYERS, documents=DOCUMENTS, experts=EXPERTS)
        np.testing.assert_array_equal(drawn.size_BLG, wanted_BLG)


def test_a_fixed_size_is_drawn_when_min_is_max():
    np.testing.assert_array_equal(draws(rows=8, pool=(4, 4, 0))(0, 3).size_BLG, 4)


# Balance loss


def test_the_balance_loss_of_perfect_balance_is_1():
    tokens, choices = jnp.float32(30.0), 2
    counts_R = jnp.full(R, tokens * choices / R)
    np.testing.assert_allclose(balance_loss(counts_R, jnp.full(R, tokens / R), tokens, choices), 1.0, rtol=1e-6)


def test_the_balance_loss_of_total_collapse_is_experts_over_choices():
    chosen_R = jnp.array([0, 1.0, 0, 0, 1.0, 0])
    loss = balance_loss(30 * chosen_R, 15 * chosen_R, jnp.float32(30), 2)  # each token: 1/2 on each of two
    np.testing.assert_allclose(loss, R / 2, rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_the_balance_loss_is_its_formula_and_leading_axes_are_separate_scopes(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, 4).astype(np.float32)
    counted = tokens + rng.integers(0, 9, 4).astype(np.float32)
    counts, weights = rng.integers(0, 9, (4, R)).astype(np.float32), rng.random((4, R), np.float32)
    wanted = [R / 3 * ((counts[i] / counted[i]) * (weights[i] / tokens[i])).sum() for i in range(4)]
    np.testing.assert_allclose(balance_loss(counts, weights, tokens, 3, counted), wanted, rtol=1e-5)
    wanted = [balance_loss(counts[i], weights[i], tokens[i], 3) for i in range(4)]
    np.testing.assert_allclose(balance_loss(counts, weights, tokens, 3), wanted, rtol=1e-6)


def test_the_balance_loss_differentiates_probabilities_but_not_counts():
    counts_R, weights_R = jnp.arange(R, dtype=jnp.float32), jnp.linspace(1.0, 2.0, R)
    grad_counts_R, grad_weights_R = jax.grad(balance_loss, (0, 1))(counts_R, weights_R, jnp.float32(5), 2)
    np.testing.assert_array_equal(grad_counts_R, 0)
    np.testing.assert_allclose(grad_weights_R, R / 2 * np.arange(R) / 5 / 5, rtol=1e-6)


def test_the_balance_loss_of_no_tokens_is_0_and_so_is_its_gradient():
    value, grad_R = jax.value_and_grad(balance_loss, 1)(jnp.zeros(R), jnp.zeros(R), jnp.float32(0), 2)
    assert value == 0
    np.testing.assert_array_equal(grad_R, 0)

"""Subsets: stored, applied, cut, composed and merged back; what does not fit is refused.

Letters: R routed experts.
"""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.errors import UserError
from emo_jax.modularity import Subset, calibrate, compose, cut, fingerprint, kept_masks, merge_back, select
from emo_jax.modularity.criteria import score
from tests.modularity import small

MODEL = small.config()
PARAMS = small.parameters(MODEL)
IDENTITY = fingerprint(MODEL, PARAMS)
ALL = tuple(tuple(range(routed)) for routed in MODEL.routed_experts)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@st.composite
def subsets(draw):
    layers = []
    for routed in MODEL.routed_experts:
        experts = draw(st.sets(st.integers(0, routed - 1), min_size=MODEL.num_choices))
        layers.append(tuple(sorted(experts)))
    return Subset(tuple(layers), IDENTITY, "drawn", "data")


@settings(deadline=None, max_examples=4)
@given(subsets())
def test_a_cut_model_gives_the_logits_of_the_full_one_under_the_mask(subset):
    batch = small.batches(1)[0]
    masked = small.logits(MODEL, PARAMS, batch, kept_masks(MODEL, subset))
    smaller, params = cut(MODEL, PARAMS, subset)
    real = batch["document_ids"] > 0
    np.testing.assert_allclose(small.logits(smaller, params, batch)[real], masked[real], rtol=1e-6, atol=1e-9)
    assert smaller.routed_experts == tuple(map(len, subset.experts))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, PARAMS)]
    assert sizes[0] <= sizes[1] and (sizes[0] < sizes[1] or subset.experts == ALL)


@settings(deadline=None, max_examples=20)
@given(subsets(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1.0, 0.5, 0.0]))
def test_merging_an_untouched_cut_back_is_the_identity_bit_for_bit(subset, routers, shared, rest, weight):
    _, params = cut(MODEL, PARAMS, subset)
    merged = merge_back(PARAMS, subset, params, weight=weight, routers=routers, shared=shared, rest=rest)
    for ours, wanted in zip(jax.tree.leaves(merged), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_merging_back_changes_what_it_is_asked_to_and_nothing_else():
    subset = Subset(((0, 3), (1, 4, 8)), IDENTITY)
    _, params = cut(MODEL, PARAMS, subset)
    tuned = jax.tree.map(lambda leaf: leaf + 1.0, params)

    def changed(**choices):
        merged = merge_back(PARAMS, subset, tuned, **choices)
        paths = jax.tree.leaves_with_path(merged)
        differences = {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf - wanted)
            for (path, leaf), wanted in zip(paths, jax.tree.leaves(PARAMS), strict=True)
        }
        return {name: difference for name, difference in differences.items() if difference.any()}

    experts = {f"layers/{name}/moe/routed/{key}" for name in ("00", "02") for key in ("gate", "up", "down")}
    routers = {f"layers/{name}/moe/router" for name in ("00", "02")}
    shared = {f"layers/{name}/moe/shared/{key}" for name in ("00", "02") for key in ("gate", "up", "down")}
    assert set(changed(routers=False, shared=False)) == experts
    assert set(changed(shared=False)) == experts | routers
    assert set(changed()) == experts | routers | shared
    assert len(changed(rest=True)) == len(jax.tree.leaves(PARAMS))
    for weight in (1.0, 0.25):
        difference = changed(weight=weight, shared=False)
        np.testing.assert_allclose(difference["layers/00/moe/routed/gate"][[0, 3]], weight, atol=1e-12)
        assert not difference["layers/00/moe/routed/gate"][[1, 2, 4, 5, 6]].any()
        np.testing.assert_allclose(difference["layers/02/moe/router"][:, [1, 4, 8]], weight, atol=1e-12)
        assert not difference["layers/02/moe/router"][:, [0, 2, 3, 5, 6, 7]].any()


@pytest.mark.parametrize("renormalized", [True, False])
def test_keeping_all_experts_is_the_full_model(renormalized):
    batch = small.batches(1)[0]
    full = small.logits(MODEL, PARAMS, batch)
    kept = small.logits(MODEL, PARAMS, batch, kept_masks(MODEL, Subset(ALL, IDENTITY), renormalized=renormalized))
    np.testing.assert_allclose(kept, full, rtol=1e-12, atol=1e-12)
    smaller, params = cut(MODEL, PARAMS, Subset(ALL, IDENTITY))
    np.testing.assert_array_equal(small.logits(smaller, params, batch), full)


def test_original_weights_are_the_whole_routers_probabilities():
    subset = Subset(((0, 2, 5), (1, 3, 8)), IDENTITY)
    batch = small.batches(1)[0]
    found = small.logits(MODEL, PARAMS, batch, kept_masks(MODEL, subset, renormalized=False))
    smaller, params = cut(MODEL, PARAMS, subset)
    renormalized = small.logits(smaller, params, batch)
    real = batch["document_ids"] > 0
    assert np.abs(found - renormalized)[real].max() > 1e-3
    # One layer by hand: the first one's change of the residual stream with each weighting.
    from emo_jax.model.routing import route

    rng = np.random.default_rng(0)
    logits_BSR = rng.normal(size=(1, 5, 7)) * 2
    for weighting in (True, False):
        (mask, _) = kept_masks(MODEL, subset, renormalized=weighting)
        routing = route(logits_BSR, np.ones((1, 5), np.int32), choices=2, kept=mask)
        for s in range(5):
            z_R = logits_BSR[0, s]
            p_R = np.exp(z_R) / np.exp(z_R).sum()
            best = sorted((0, 2, 5), key=lambda e: -z_R[e])[:2]
            total = 1.0 if not weighting else sum(p_R[e] for e in (0, 2, 5))
            assert routing.indices_BSC[0, s].tolist() == best
            np.testing.assert_allclose(routing.weights_BSC[0, s], [p_R[e] / total for e in best], rtol=1e-9)


def test_ablating_keeps_the_others():
    subset = Subset(((0, 1), (0, 1)), IDENTITY)
    for mask, routed in zip(kept_masks(MODEL, subset, ablate=True), MODEL.routed_experts, strict=True):
        assert mask.mask_R.tolist() == [False, False] + [True] * (routed - 2)
    with pytest.raises(UserError, match="Without the subset, mixture layer 0 has 1 experts left; a token chooses 2"):
        kept_masks(MODEL, Subset((tuple(range(6)), (0, 1)), IDENTITY), ablate=True)


@given(subsets())
def test_a_stored_subset_is_read_back(subset):
    assert Subset.from_json(subset.to_json()) == subset


@given(subsets(), subsets(), subsets())
def test_compositions_are_those_of_sets(a, b, c):
    for operation, combine in (
        ("union", set.union),
        ("intersection", set.intersection),
        ("difference", lambda x, y, z: x - y - z),
    ):
        made, shared = compose(operation, [a, b, c])
        for layer, (ours, *sets) in enumerate(zip(made.experts, a.experts, b.experts, c.experts, strict=True)):
            assert set(ours) == combine(*map(set, sets)) and list(ours) == sorted(ours)
            union, common = set().union(*sets), set(sets[0]).intersection(*sets)
            assert shared[layer] == len(common) / len(union)


def test_what_does_not_fit_is_refused_in_words(tmp_path):
    good = Subset(((0, 3), (1, 4)), IDENTITY)
    with pytest.raises(UserError, match=f"chosen for the model 0123, this is {IDENTITY}"):
        cut(MODEL, PARAMS, dataclasses.replace(good, model="0123"))
    with pytest.raises(UserError, match="The subset has 1 mixture layers, the model 2"):
        kept_masks(MODEL, Subset(((0, 3),), IDENTITY))
    with pytest.raises(UserError, match=re.escape("keeps experts (0, 7) of mixture layer 0, which has only 0..6")):
        kept_masks(MODEL, Subset(((0, 7), (0, 1)), IDENTITY))
    with pytest.raises(UserError, match="keeps 1 routed experts of mixture layer 1; a token chooses 2"):
        kept_masks(MODEL, Subset(((0, 3), (1,)), IDENTITY))
    with pytest.raises(UserError, match="are of different models"):
        compose("union", [good, dataclasses.replace(good, model="other")])
    with pytest.raises(UserError, match="union needs at least two subsets, found 1"):
        compose("union", [good])
    with pytest.raises(UserError, match="operation='sum' is not one of"):
        compose("sum", [good, good])
    other = small.config(experts_per_layer=(8, 0, 8))
    with pytest.raises(UserError, match="it is not a cut of this model by this subset"):
        merge_back(PARAMS, good, small.parameters(other))
    with pytest.raises(UserError, match=r"weight=1\.5 must lie in 0\.\.1"):
        merge_back(PARAMS, good, PARAMS, weight=1.5)
    (tmp_path / "broken.json").write_text("[]")
    with pytest.raises(UserError, match=r"broken\.json is not a subset that emo_jax\.select wrote"):
        Subset.load(tmp_path / "broken.json")
    with pytest.raises(UserError, match="There is no subset file"):
        Subset.load(tmp_path / "missing.json")


# Selection


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"keep": 2}, "keep=2 must lie in 3..8: it counts the 1 shared experts, and a token uses 3"),
        ({"keep": 9}, "keep=9 must lie in 3..8"),
        ({"keep": 4, "method": "mass"}, "method='mass' is not one of"),
        ({"keep": 4, "budget": "even"}, "budget='even' is not one of"),
        ({"budget": "mass", "mass": 1.2}, "mass=1.2 must lie in 0..1"),
        ({"keep": 4, "budget": "variable"}, "set greedy=False"),
    ],
)
def test_a_selection_that_cannot_work_is_refused(fields, words):
    with pytest.raises(UserError, match=re.escape(words)):
        select(MODEL, PARAMS, [small.batches()], **fields)


def test_several_tasks_need_scores_of_the_whole_model():
    with pytest.raises(UserError, match="A greedy walk follows one calibration set"):
        select(MODEL, PARAMS, [small.batches(), small.batches()], keep=4)
    with pytest.raises(UserError, match="There is no calibration set"):
        select(MODEL, PARAMS, [], keep=4)


def test_several_tasks_are_chosen_by_the_mean_of_their_scores():
    tasks = [small.batches(1), small.batches(3)]
    both = select(MODEL, PARAMS, tasks, keep=4, greedy=False, method="frequency")
    each = [[score("frequency", s) for s in calibrate(MODEL, PARAMS, task)] for task in tasks]
    for layer, kept in enumerate(both.experts):
        mean_R = (each[0][layer] + each[1][layer]) / 2
        assert kept == tuple(sorted(np.argsort(-mean_R, kind="stable")[:3].tolist()))


def test_a_budget_of_mass_is_the_smallest_set_that_reaches_it():
    for mass in (0.3, 0.6, 0.9, 1.0):
        subset = select(MODEL, PARAMS, [small.batches()], budget="mass", mass=mass, greedy=False, method="gate")
        for kept, statistics in zip(subset.experts, calibrate(MODEL, PARAMS, small.batches()), strict=True):
            score_R = score("gate", statistics)
            smallest = next(
                size
                for size in itertools.count(1)
                if max(sum(score_R[list(c)]) for c in itertools.combinations(range(len(score_R)), size)) >= mass - 1e-9
            )
            assert len(kept) == max(smallest, MODEL.num_choices)


def test_a_variable_budget_keeps_as_many_in_all_and_enough_in_each_layer():
    subset = select(MODEL, PARAMS, [small.batches()], keep=5, budget="variable", greedy=False)
    assert sum(map(len, subset.experts)) == 4 * 2
    assert min(map(len, subset.experts)) >= MODEL.num_choices


def test_experts_that_every_token_uses_are_kept_and_renumbered():
    model = dataclasses.replace(MODEL, always_active_experts=("6", "0"))
    for options in ({}, {"greedy": False, "budget": "mass", "mass": 0.3, "method": "gate"}, {"method": "random"}):
        kept = select(model, PARAMS, [small.batches()], keep=4, **options).experts
        assert 6 in kept[0] and 0 in kept[1] and min(map(len, kept)) >= model.num_choices
    subset = Subset(((1, 4, 6), (0, 2, 8)), fingerprint(model, PARAMS), "by hand", "")
    smaller, params = cut(model, PARAMS, subset)
    assert smaller.always_active_experts == ("2", "0") and smaller.routed_experts == (3, 3)
    batch = small.batches(1)[0]
    masked_BSV = small.logits(model, PARAMS, batch, kept_masks(model, subset))
    np.testing.assert_allclose(small.logits(smaller, params, batch), masked_BSV, rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match="leaves out expert 6 of mixture layer 0, which every token uses"):
        cut(model, PARAMS, Subset(((1, 4), (0, 2)), subset.model, "by hand", ""))


def test_random_subsets_differ_by_seed_alone():
    made = [select(MODEL, PARAMS, [], method="random", keep=4, seed=seed).experts for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_fingerprints_tell_models_apart():
    assert fingerprint(MODEL, small.parameters(MODEL, 1)) != IDENTITY
    assert fingerprint(dataclasses.replace(MODEL, top_k=2), PARAMS) != IDENTITY
    assert fingerprint(dataclasses.replace(MODEL, remat="full"), PARAMS) == IDENTITY

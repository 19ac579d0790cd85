"""Statistics of routers against NumPy, from a model's raw activations.

Letters: B rows, S sequence, D model, R routed experts.
"""

import jax
import numpy as np
import pytest

from emo_jax.errors import UserError
from emo_jax.modularity import CRITERIA, calibrate, kept_masks, select
from emo_jax.modularity.criteria import score
from emo_jax.modularity.subset import Subset
from tests import oracle
from tests.modularity import small


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def by_hand(model, params, batches, kept=None):
    """Each mixture layer's sums, a token at a time; `kept[l]` the experts that layer l goes on with."""
    layers = [{} for _ in model.routed_experts]
    for batch in batches:
        ids_BS, asked_BS = batch["document_ids"], batch.get("asked", batch["document_ids"] > 0)
        x_BSD, place = params["embedding"][batch["tokens"]].copy(), 0
        for name in sorted(params["layers"]):
            layer = params["layers"][name]
            for b in range(len(x_BSD)):
                normal_SD = oracle.rms_norm(x_BSD[b], layer["attention_norm"], model.norm_epsilon)
                x_BSD[b] += oracle.attention(
                    normal_SD, layer["attention"], ids_BS[b], batch["positions"][b], model.rope_theta
                )
            normal_BSD = oracle.rms_norm(x_BSD, layer["ffn_norm"], model.norm_epsilon)
            if "ffn" in layer:
                ffn = [layer["ffn"][n] for n in ("gate", "up", "down")]
                x_BSD += np.stack([[oracle.feed_forward(h_D, *ffn) for h_D in h_SD] for h_SD in normal_BSD])
                continue
            sums, moe = layers[place], layer["moe"]
            routed = moe["router"].shape[1]
            for b, s in np.argwhere(ids_BS > 0):
                h_D, normal_D = x_BSD[b, s].copy(), normal_BSD[b, s]
                p_R = oracle.softmax(normal_D @ moe["router"])
                chosen = np.argsort(-p_R, kind="stable")[: model.num_choices]
                outputs = {e: expert(normal_D, moe, e) for e in chosen}
                shared_D = oracle.feed_forward(normal_D, *(moe["shared"][n] for n in ("gate", "up", "down")))
                added_D = sum(p_R[e] * outputs[e] for e in chosen)
                if asked_BS[b, s]:
                    change = 1 - cosine(h_D, h_D + added_D)
                    normed = max(1 - cosine(normal_D, normal_D + added_D + shared_D), 0)
                    add(sums, "tokens", 1)
                    add(sums, "probability_R", p_R)
                    for e in chosen:
                        one_R, norm = np.eye(routed)[e], np.linalg.norm(outputs[e])
                        add(sums, "count_R", one_R)
                        add(sums, "gate_R", p_R[e] * one_R)
                        add(sums, "gated_norm_R", p_R[e] * norm * one_R)
                        add(sums, "easy_ep_R", p_R[e] * norm * change * one_R)
                        add(sums, "easy_ep_normed_R", p_R[e] * norm * normed * one_R)
                if kept is not None:
                    masked_R = np.where(np.isin(np.arange(routed), kept[place]), normal_D @ moe["router"], -np.inf)
                    w_R = oracle.softmax(masked_R)
                    chosen = np.argsort(-w_R, kind="stable")[: model.num_choices]
                    added_D = sum(w_R[e] * expert(normal_D, moe, e) for e in chosen)
                x_BSD[b, s] += added_D + shared_D
            place += 1
    return layers


def expert(x_D, moe, e):
    return oracle.feed_forward(x_D, *(moe["routed"][name][e] for name in ("gate", "up", "down")))


def add(sums, name, value):
    sums[name] = sums.get(name, 0) + value


def cosine(a_D, b_D):
    return a_D @ b_D / (np.linalg.norm(a_D) * np.linalg.norm(b_D))


def assert_equal(found, wanted):
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(getattr(ours, name), value, rtol=1e-9, atol=1e-10, err_msg=name)


def test_statistics_are_those_of_a_token_by_token_walk():
    model = small.config()
    params, batches = small.parameters(model), small.batches()
    assert_equal(calibrate(model, params, batches), by_hand(model, params, batches))


def test_only_tokens_that_are_asked_for_count_but_all_are_seen():
    model = small.config()
    params, batches = small.parameters(model), small.batches()
    for batch in batches:
        batch["asked"] = np.random.default_rng(0).random(batch["tokens"].shape) < 0.4
    assert_equal(calibrate(model, params, batches), by_hand(model, params, batches))


def test_each_criterion_is_its_papers_formula():
    model = small.config()
    params, batches = small.parameters(model), small.batches()
    found, wanted = calibrate(model, params, batches), by_hand(model, params, batches)
    formulas = {
        "router_mass": lambda s: s["probability_R"] / s["tokens"],
        "frequency": lambda s: s["count_R"] / s["tokens"],
        "gate": lambda s: s["gate_R"] / s["tokens"],
        "easy_ep": lambda s: s["easy_ep_R"],
        "easy_ep_normed": lambda s: s["easy_ep_normed_R"],
        "reap": lambda s: s["gated_norm_R"] / np.maximum(s["count_R"], 1),
    }
    assert formulas.keys() == CRITERIA.keys()
    for name, formula in formulas.items():
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(CRITERIA[name](ours), formula(theirs), rtol=1e-9)
            np.testing.assert_allclose(score(name, ours), formula(theirs) / formula(theirs).sum(), rtol=1e-9)


def test_a_greedy_walk_measures_a_layer_behind_those_already_cut():
    model = small.config()
    params, batches = small.parameters(model), small.batches()
    first = select(model, params, [batches], keep=4, greedy=True)
    wanted = by_hand(model, params, batches, kept=first.experts)
    for layer, sums in enumerate(wanted):
        assert first.experts[layer] == tuple(sorted(np.argsort(-sums["probability_R"], kind="stable")[:3].tolist()))
    # The last layer's choice differs from one pass over the whole model: the walk matters.
    whole = select(model, params, [batches], keep=4, greedy=False)
    assert whole.experts[0] == first.experts[0]


def test_what_a_layer_goes_on_with_is_the_model_under_the_subsets_mask():
    model = small.config()
    params, batches = small.parameters(model), small.batches(1)
    kept = ((0, 2, 5), (1, 3, 8))
    chosen = iter(kept)

    def choose(layer, statistics):
        return np.isin(np.arange(model.routed_experts[layer]), next(chosen))

    measured = calibrate(model, params, batches, choose)
    assert_equal(measured, by_hand(model, params, batches, kept=kept))
    assert len(kept_masks(model, Subset(kept, "m"))) == 2


def test_an_empty_calibration_set_is_refused():
    model = small.config()
    batch = small.batches(1)[0]
    batch["document_ids"] = np.zeros_like(batch["document_ids"])
    with pytest.raises(UserError, match="The calibration set is empty: no token is asked for"):
        calibrate(model, small.parameters(model), [batch])
    with pytest.raises(UserError, match="The calibration set is empty"):
        calibrate(model, small.parameters(model), [])

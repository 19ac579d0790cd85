"""Dense models split and merged: bit for bit, in memory and in folders, whatever the kind of feed-forward."""

import dataclasses

import jax
import numpy as np
import pytest

from emo_jax.errors import UserError
from emo_jax.model import ModelConfig, abstract_parameters, bind, init_parameters
from emo_jax.modularity import emergent, fingerprint
from emo_jax.modularity.calibration import calibrate, coactivations

F, N = 24, 6
KINDS = [
    {},
    {"feed_forward": "gelu_tanh", "biases": True, "norm": "layer", "positions": "learned", "max_positions": 16},
]


def dense(**fields) -> ModelConfig:
    values = {"vocab_size": 50, "d_model": 8, "num_layers": 3, "num_heads": 2, "num_experts": 0, "d_dense": F}
    return ModelConfig(**(values | {"dtype": "float32"} | fields))


def random_parameters(config: ModelConfig, seed: int = 0) -> dict:
    """With biases and scales that are not what they begin as."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: np.asarray(p + 0.3 * rng.standard_normal(p.shape), np.float32), init_parameters(config, 0)
    )


def logits(config: ModelConfig, params: dict) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 50, (2, 12)).astype(np.int32)
    model = bind(config, params)
    hidden, _ = model(tokens, np.ones_like(tokens), np.tile(np.arange(12, dtype=np.int32), (2, 1)))
    return np.asarray(model.logits(hidden))


def split(config: ModelConfig, params: dict, method: str = "kmeans", top_k: int = 2, **fields):
    made = emergent.split_config(config, layers=[2, 1], experts=N, top_k=top_k, **fields)

    def read(path):
        leaf = params
        for key in path:
            leaf = leaf[key]
        return np.asarray(leaf)

    orders = emergent.neuron_orders(made, read, method) if not made.split_copies else {}
    return made, emergent.split(made, params, orders)


def batches(rows: int = 4) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    ids = np.ones((rows, 12), np.int32)
    ids[:, 9:] = 0
    place = np.tile(np.arange(12, dtype=np.int32), (rows, 1))
    return [
        {"tokens": rng.integers(0, 50, ids.shape).astype(np.int32), "document_ids": ids, "positions": place}
        for _ in range(2)
    ]


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("method", ["kmeans", "contiguous", "random"])
def test_a_merge_gives_every_bit_back(fields, method):
    config = dense(**fields)
    params = random_parameters(config)
    made, parts = split(config, params, method)
    assert jax.tree.map(lambda leaf: leaf.shape, parts) == jax.tree.map(
        lambda leaf: leaf.shape, abstract_parameters(made)
    )
    for layer in ("01", "02"):
        assert (np.sort(parts["layers"][layer]["ffn"]["order"]) == np.arange(F)).all()
    merged, back = emergent.merge(made, parts)
    assert merged == config
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("fields", KINDS)
def test_with_all_experts_a_split_model_is_the_dense_one(fields):
    config = dense(**fields)
    params = random_parameters(config)
    made, parts = split(config, params, top_k=N)
    np.testing.assert_allclose(logits(made, parts), logits(config, params), atol=1e-5)
    made = dataclasses.replace(made, split_top_k=1)
    assert np.abs(logits(made, parts) - logits(config, params)).max() > 0.01


def test_a_neuron_that_moved_is_merged_to_its_place():
    config = dense()
    params = random_parameters(config)
    made, parts = split(config, params)
    parts["layers"]["01"]["ffn"]["down"] = (
        parts["layers"]["01"]["ffn"]["down"] + parts["layers"]["01"]["ffn"]["order"][:, None]
    )
    _, back = emergent.merge(made, parts)
    moved = back["layers"]["01"]["ffn"]["down"] - params["layers"]["01"]["ffn"]["down"]
    np.testing.assert_allclose(moved, np.tile(np.arange(F, dtype=np.float32)[:, None], (1, 8)), atol=1e-5)


def test_a_learned_gate_is_dropped_by_a_merge_and_copies_cannot_be_merged():
    config = dense()
    params = random_parameters(config)
    made, parts = split(config, params, gate="cosine")
    assert {"gate_projection", "gate_experts", "gate_scale"} < set(parts["layers"]["01"]["ffn"])
    jax.tree.map(np.testing.assert_array_equal, emergent.merge(made, parts)[1], params)
    made, parts = split(config, params, gate="cosine", copies=True)
    np.testing.assert_allclose(logits(made, parts), logits(config, params), atol=1e-5)
    with pytest.raises(UserError, match="split_copies=True"):
        emergent.merge(made, parts)
    with pytest.raises(UserError, match="nothing to merge"):
        emergent.merge(config, params)
    with pytest.raises(UserError, match="split already"):
        emergent.split_config(made, layers=[0], experts=2, top_k=1)


def test_fingerprints_tell_splits_and_models_apart():
    config = dense()
    params = random_parameters(config)
    seen = {
        fingerprint(*split(config, p, m)) for p in (params, random_parameters(config, 1)) for m in ("random", "kmeans")
    }
    assert len(seen) == 4
    assert fingerprint(*split(config, params)) == fingerprint(*split(config, params))


def test_coactivations_count_the_tokens_on_which_two_neurons_fire():
    config = dense()
    params = random_parameters(config)
    found = coactivations(config, params, batches(), [1])
    assert list(found) == [1]
    assert found[1].tokens == 2 * 4 * 9
    model = bind(config, params)
    total = np.zeros((F, F))
    for batch in batches():
        x = model.embedded(batch["tokens"], batch["positions"])
        x = model.layers["00"](x, batch["document_ids"], batch["positions"])[0]
        read = model.layers["01"].attend(x, batch["document_ids"], batch["positions"])[1]
        fired = (np.asarray(read @ params["layers"]["01"]["ffn"]["gate"]) > 0)[batch["document_ids"] > 0].astype(int)
        total += fired.T @ fired
    assert np.abs(found[1].joint_FF - total).max() <= 1  # a sum next to 0 may fall on either side


def test_statistics_of_a_split_layer_count_its_experts():
    config = dense()
    made, parts = split(config, random_parameters(config))
    statistics = calibrate(made, parts, batches())
    assert len(statistics) == 2
    for s in statistics:
        assert s.tokens == 72
        assert s.count_R.sum() == s.gate_R.sum() == 2 * 72
        np.testing.assert_allclose(s.probability_R.sum(), 72, rtol=1e-5)
        assert (s.gated_norm_R[s.count_R > 0] > 0).all()

"""Layers split into emergent experts, against NumPy and against the dense layer that they are made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.errors import UserError
from emo_jax.model import (
    Kept,
    ModelConfig,
    PoolConfig,
    active_parameters,
    bind,
    draw_noise,
    importance_loss,
    init_parameters,
    total_parameters,
)
from emo_jax.model.emergent import EmergentExperts
from emo_jax.model.layers import FeedForward
from emo_jax.model.routing import PoolDraws

D, F, N, B, S = 12, 24, 6, 2, 7
IDS = np.ones((B, S), np.int32)


def config(**fields) -> ModelConfig:
    values = {"vocab_size": 11, "d_model": D, "num_layers": 2, "num_heads": 2, "num_experts": 0, "d_dense": F}
    values |= {"dtype": "float32", "split_layers": (1,), "split_experts": N, "split_top_k": 2}
    made = ModelConfig(**(values | fields))
    made.validate()
    return made


def parameters(made: ModelConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    abstract = nnx.to_pure_dict(nnx.split(nnx.eval_shape(lambda: EmergentExperts(made, 1)))[1])
    return {
        name: np.arange(leaf.shape[0], dtype=np.int32)
        if name == "order"
        else rng.normal(0, 0.5, leaf.shape).astype(np.float32)
        for name, leaf in abstract.items()
    }


def inputs(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, S, D)).astype(np.float32)


def run(made: ModelConfig, params: dict, x: np.ndarray, ids: np.ndarray = IDS, **options):
    graph = nnx.split(nnx.eval_shape(lambda: EmergentExperts(made, 1)))[0]
    return jax.jit(lambda p, x: nnx.merge(graph, p)(x, jnp.asarray(ids), **options))(params, x)


def dense(made: ModelConfig, params: dict, x: np.ndarray) -> np.ndarray:
    graph = nnx.split(nnx.eval_shape(lambda: FeedForward(made, made.feed_forward_width(1))))[0]
    names = [name for name in params if name != "order" and not name.startswith("gate_e")]
    names = [name for name in names if name not in ("gate_projection", "gate_scale")]
    return np.asarray(jax.jit(lambda p, x: nnx.merge(graph, p)(x))({name: params[name] for name in names}, x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle(made: ModelConfig, params: dict, x: np.ndarray, chosen: np.ndarray | None = None):
    """Output and chosen experts [B, S, N], expert by expert, in float64."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x = x.astype(np.float64)
    size = F // N
    first = p["gate"] if "gate" in p else p["up"]
    scores = np.stack([x @ first[:, n * size : (n + 1) * size].mean(1) for n in range(N)], -1)
    if chosen is None:
        places = np.argsort(-scores, -1, kind="stable")[..., : made.split_top_k]
        chosen = np.zeros(scores.shape)
        np.put_along_axis(chosen, places, 1, -1)
    y = np.zeros(x.shape)
    for n in range(N):
        part = slice(n * size, (n + 1) * size)
        up = x @ p["up"][:, part] + p.get("up_bias", np.zeros(F))[part]
        if "gate" in p:
            gate = x @ p["gate"][:, part]
            hidden = gate * sigmoid(gate) * up
        else:
            hidden = np.maximum(up, 0)
        shared_bias = p.get("down_bias", np.zeros(D)) / chosen.sum(-1, keepdims=True)  # as the paper shares it out
        y += chosen[..., n : n + 1] * (hidden @ p["down"][part] + shared_bias)
    return y, chosen


KINDS = [{}, {"feed_forward": "relu", "biases": True, "norm": "layer"}]


@pytest.mark.parametrize("fields", KINDS)
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_a_split_layer_is_the_sum_of_a_tokens_experts(fields, k):
    made = config(split_top_k=k, **fields)
    params, x = parameters(made), inputs()
    y, routing = run(made, params, x)
    expected, chosen = oracle(made, params, x)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    found = np.asarray(jax.nn.one_hot(routing.indices_BSC, N).sum(2))
    assert (found == chosen).all()
    np.testing.assert_array_equal(routing.totals.counts_BR, chosen.sum(1))


@pytest.mark.parametrize("fields", KINDS)
def test_with_all_experts_the_layer_is_the_dense_one(fields):
    made = config(split_top_k=N, **fields)
    params, x = parameters(made), inputs()
    np.testing.assert_allclose(run(made, params, x)[0], dense(made, params, x), atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20))
def test_the_order_of_neurons_within_experts_and_of_experts_changes_nothing(seed):
    made, rng = config(**KINDS[1]), np.random.default_rng(seed)
    params, x = parameters(made, seed), inputs(seed)
    blocks = rng.permutation(N)
    places = np.concatenate([block * (F // N) + rng.permutation(F // N) for block in blocks])
    moved = params | {name: params[name][..., places] for name in ("up", "up_bias", "order")}
    moved |= {"down": params["down"][places]}
    np.testing.assert_allclose(run(made, moved, x)[0], run(made, params, x)[0], atol=1e-5)


def test_no_gradient_reaches_the_average_keys():
    made = config()
    params, x = parameters(made), inputs()
    weights = {name: value for name, value in params.items() if name != "order"}
    graph = nnx.split(nnx.eval_shape(lambda: EmergentExperts(made, 1)))[0]
    _, chosen = oracle(made, params, x)

    def output(weights, x):
        return nnx.merge(graph, weights | {"order": params["order"]})(x, jnp.asarray(IDS))

    def masked(weights, x):  # the mask a constant
        hidden = jax.nn.silu(x @ weights["gate"]) * (x @ weights["up"])
        return (hidden * np.repeat(chosen, F // N, -1)) @ weights["down"]

    ours = jax.grad(lambda *a: jnp.square(output(*a)[0]).sum(), (0, 1))(weights, x)
    theirs = jax.grad(lambda *a: jnp.square(masked(*a)).sum(), (0, 1))(weights, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, theirs)

    def importance(weights, x):
        return importance_loss(output(weights, x)[1].totals.weights_BR.sum(0))

    on_weights, on_x = jax.grad(importance, (0, 1))(weights, x)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(on_weights))
    assert np.abs(on_x).max() > 0  # it teaches the layers below


def test_the_cosine_gate_weighs_experts_by_their_direction():
    made = config(split_gate="cosine", split_top_k=3)
    params, x = parameters(made), inputs()
    params["gate_scale"] = np.float32([np.log(5.0)])
    _, routing = run(made, params, x)
    z = x @ params["gate_projection"]
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    e = params["gate_experts"] / np.linalg.norm(params["gate_experts"], axis=0)
    np.testing.assert_allclose(routing.logits_BSR, 5 * z @ e, atol=1e-5)
    graph = nnx.split(nnx.eval_shape(lambda: EmergentExperts(made, 1)))[0]
    layer = nnx.merge(graph, params)
    np.testing.assert_allclose(layer.choice_weights(routing).sum(-1), 3, rtol=1e-5)
    gradients = jax.grad(lambda p: jnp.square(nnx.merge(graph, p | {"order": params["order"]})(x, IDS)[0]).sum())(
        {name: value for name, value in params.items() if name != "order"}
    )
    assert all(np.abs(gradients[name]).max() > 0 for name in ("gate_projection", "gate_experts", "gate_scale"))


def test_equal_copies_compute_what_one_does():
    made = config(split_copies=True, split_gate="cosine", feed_forward="relu", biases=True)
    one = dataclasses.replace(made, split_layers=(), split_copies=False)
    single = {name: value for name, value in parameters(config(**KINDS[1])).items() if name != "order"}
    copies = parameters(made)
    copies |= {name: np.concatenate([single[name]] * N, -1) for name in ("up", "up_bias")}
    copies |= {"down": np.concatenate([single["down"]] * N), "down_bias": single["down_bias"]}
    x = inputs()
    np.testing.assert_allclose(run(made, copies, x)[0], dense(one, single, x), atol=1e-5)


@pytest.mark.parametrize("k", [2, N])
def test_a_subset_confines_tokens_to_its_experts(k):
    made = config(split_top_k=k)
    params, x = parameters(made), inputs()
    kept = np.array([True, False, True, False, False, True])
    y, routing = run(made, params, x, kept=Kept(jnp.asarray(kept), jnp.array(True)))
    found = np.asarray(jax.nn.one_hot(routing.indices_BSC, N).sum(2))
    assert (found.sum(-1) == min(k, 3)).all()
    assert not found[..., ~kept].any()
    np.testing.assert_allclose(y, oracle(made, params, x, found)[0], atol=2e-5)


def test_a_documents_tokens_stay_in_its_pool():
    made = config(split_top_k=N)
    params, x = parameters(made), inputs()
    ids = np.repeat([[1, 1, 1, 2, 2, 2, 0]], B, 0).astype(np.int32)
    size = np.tile(np.array([2, 4], np.int32), (B, 1, 1))  # [B, L, G]
    draws = PoolDraws(jnp.asarray(size), jnp.zeros((B, 1, 2, 2), jnp.uint32))
    pool = PoolConfig(min=1, max=N)
    pool.validate(made)
    _, routing = run(made, params, x, ids, pool=pool, draws=draws, documents=2)
    used = np.asarray(jax.nn.one_hot(routing.indices_BSC, N).sum(2))
    assert (used[:, :3].sum(-1) == 2).all() and (used[:, 3:6].sum(-1) == 4).all() and not used[:, 6].any()
    assert (used[:, 0] == used[:, 2]).all() and (used[:, 3] == used[:, 5]).all()
    first = params["gate"].reshape(D, N, -1).mean(-1)
    score = np.asarray(jax.nn.softmax(x @ first))[:, :3].sum(1)
    assert (np.sort(np.argsort(-score, -1)[:, :2], -1) == np.nonzero(used[:, 0])[1].reshape(B, 2)).all()


def test_noise_differs_between_steps_rows_and_layers_and_repeats():
    made = config()
    params, x = parameters(made), np.repeat(inputs()[:1], B, 0)

    def logits(step, layer=0, scale=0.5):
        draws = draw_noise(None, 3, jnp.int32(step), scale, rows=B, layers=2)
        return np.asarray(run(made, params, x, draws=draws, layer=layer)[1].logits_BSR)

    clean = np.asarray(run(made, params, x)[1].logits_BSR)
    noise = [logits(0) - clean, logits(1) - clean, logits(0, layer=1) - clean]
    assert all(np.abs(a - b).min() > 0 for a, b in [noise[:2], noise[1:], (noise[0][0], noise[0][1])])
    assert (logits(0) == logits(0)).all()
    many = np.concatenate([(logits(step) - clean).ravel() for step in range(30)])
    assert abs(many.std() - 0.5) < 0.02 and abs(many.mean()) < 0.02
    np.testing.assert_array_equal(logits(0, scale=0.0), clean)


def test_importance_is_the_squared_coefficient_of_variation():
    weights = np.random.default_rng(0).uniform(size=(3, 8))
    expected = (weights.std(-1) / weights.mean(-1)) ** 2
    np.testing.assert_allclose(importance_loss(jnp.asarray(weights)), expected, rtol=1e-5)
    assert importance_loss(jnp.full(8, 2.0)) == 0


def test_experts_norms_are_those_of_their_outputs():
    made = config(split_top_k=3)
    params, x = parameters(made), inputs()
    graph = nnx.split(nnx.eval_shape(lambda: EmergentExperts(made, 1)))[0]
    layer = nnx.merge(graph, params)
    routing = layer(x, jnp.asarray(IDS))[1]
    norms = layer.expert_norms(jnp.asarray(x), routing.indices_BSC)
    for n in range(N):
        one = np.zeros((B, S, N))
        one[..., n] = 1
        expected = np.linalg.norm(oracle(made, params, x, one)[0], axis=-1)
        for c in range(3):
            at = np.asarray(routing.indices_BSC)[..., c] == n
            np.testing.assert_allclose(np.asarray(norms)[..., c][at], expected[at], rtol=1e-4)


def test_parameters_are_counted_without_the_order_and_active_ones_without_idle_experts():
    made = config()
    plain = dataclasses.replace(made, split_layers=())
    assert total_parameters(made) == total_parameters(plain) == active_parameters(plain)
    assert active_parameters(made) == total_parameters(plain) - 4 * (F // N) * 3 * D
    biased = config(**KINDS[1])
    assert active_parameters(biased) == total_parameters(biased) - 4 * (F // N) * (2 * D + 1)


def test_a_model_routes_in_its_split_layers_alone():
    made = config(split_layers=(0, 1), num_layers=3)
    tokens = jnp.ones((B, S), jnp.int32)
    _, routings = bind(made, init_parameters(made, 0))(tokens, tokens, jnp.tile(jnp.arange(S), (B, 1)))
    assert made.routed_experts == (N, N) and made.routing_layers == [0, 1]
    assert len(routings) == 2


WRONG = [
    ({"split_experts": 7}, "split_experts=7 does not divide the 24"),
    ({"split_layers": (0, 2)}, "names layer 2, which does not exist"),
    ({"split_layers": (-1,)}, "names layer -1, which does not exist"),
    ({"split_layers": (1, 0)}, "ascending"),
    ({"split_top_k": 7}, "split_top_k=7 must lie in 1..6"),
    ({"split_top_k": 0}, "split_top_k=0 must lie in 1..6"),
    ({"split_experts": 1}, "split_experts=1 must be at least 2"),
    ({"split_gate": "average"}, "Did you mean 'average_key'?"),
    ({"split_copies": True}, "set model.split_gate=cosine"),
    ({"num_experts": 8}, "only dense models are split"),
    ({"feed_forward": "silu"}, "model.feed_forward='silu'"),
    ({"positions": "learned"}, "model.max_positions=0"),
    ({"labels": ("a",)}, "at least two"),
    ({"norm": "layer", "qk_norm": True}, "model.qk_norm=True"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG)
def test_what_cannot_work_is_refused_with_field_and_value(fields, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        config(**fields)

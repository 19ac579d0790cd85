"""The formulas, against the model's own figures, real arrays and one another."""

import dataclasses
import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.config import (
    BalanceConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PoolConfig,
    TrainConfig,
)
from emo_jax.model import active_parameters
from emo_jax.model.config import REMAT_POLICIES
from emo_jax.planning import estimate
from emo_jax.planning.shapes import Shapes
from emo_jax.training.step import init_state, run_mesh
from tests.training import tiny

ONE = {"data": 1, "fsdp": 1, "expert": 1, "context": 1}
D, F, L = 768, 3072, 12
LAYER = 4 * D * D + 2 * D * F
PUBLISHED = {
    "gpt2": {
        "vocab_size": 50_257,
        "positions": "learned",
        "max_positions": 4096,
        "norm": "layer",
        "feed_forward": "gelu_tanh",
        "biases": True,
        "tied_embeddings": True,
    },
    "bert": {
        "vocab_size": 30_522,
        "positions": "learned",
        "max_positions": 4096,
        "token_types": 2,
        "causal": False,
        "norm": "layer",
        "norm_placement": "sum",
        "feed_forward": "gelu",
        "biases": True,
        "labels": ("no", "yes"),
    },
}
"""GPT-2 small and a classifier by BERT-base, with room for longer rows."""


def published(name: str, optimizer: dict | None = None, length: int = 512, **model) -> Config:
    shape = {"d_model": D, "d_dense": F, "num_layers": L, "num_heads": 12, "num_experts": 0}
    return Config(
        model=ModelConfig(**shape | PUBLISHED[name] | model),
        pool=PoolConfig(kind="none"),
        balance=BalanceConfig(scope="microbatch"),
        data=DataConfig(sequence_length=length, batch_size=4),
        optimizer=OptimizerConfig(**optimizer or {}),
    )


SPLIT = {"split_layers": (10, 11), "split_experts": 64, "split_top_k": 16}


def run(**model) -> Config:
    shape = {"vocab_size": 2048, "d_model": 256, "num_layers": 4, "num_heads": 4, "num_experts": 17, "top_k": 3}
    return Config(
        model=ModelConfig(**shape | {"d_expert": 128, "remat": "none"} | model),
        pool=PoolConfig(kind="none"),
        balance=BalanceConfig(scope="microbatch"),
        data=DataConfig(source="installed_text", sequence_length=512, batch_size=64),
        train=TrainConfig(microbatches=2),
        mesh=MeshConfig(),
    )


def on(run: Config, sizes: dict[str, int]) -> Config:
    return dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, **sizes))


def test_without_recomputation_products_are_six_for_each_active_parameter():
    made = run()
    flops = estimate(made, ONE).flops
    tokens = made.data.batch_size * made.data.sequence_length
    weights = active_parameters(made.model) - made.model.vocab_size * made.model.d_model
    scales = (2 * made.model.num_layers + 1) * made.model.d_model  # of norms, which are no products
    assert flops.dense + flops.filled == 6 * (weights - scales) * tokens
    assert flops.grouped == flops.filled, "no buffer on one device"


DENSE = {"experts_per_layer": (0, 0, 0), "d_dense": 12}
TEXTS = {"labels": ("no", "yes")}


@pytest.mark.parametrize(
    "sections",
    [
        {"mesh": {"fsdp": 4}},
        {"mesh": {"data": 2, "fsdp": 2}},
        {"mesh": {"fsdp": 2, "expert": 2}},
        {"optimizer": {"trainable_experts": ("0 2", "1")}, "mesh": {"fsdp": 4}},
        {
            "model": DENSE | {"split_layers": (1,), "split_experts": 4, "split_top_k": 2, "split_gate": "cosine"},
            "pool": {"kind": "none"},
            "optimizer": {"lora_rank": 2, "lora_targets": ("query", "up")},
            "mesh": {"fsdp": 2, "expert": 2},
        },
        {
            "model": DENSE | TEXTS | {"causal": False, "biases": True, "norm": "layer", "feed_forward": "gelu"},
            "pool": {"kind": "none"},
            "data": TEXTS | {"source": "examples", "path": "unused", "packing": "best_fit"},
            "mesh": {"fsdp": 4},
        },
    ],
)
def test_arguments_are_what_a_device_really_holds(sections):
    made = tiny.config(**sections | {"mesh": {"data": 1} | sections["mesh"]})
    real = run_mesh(made)
    state = init_state(made, real)
    device = jax.devices()[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == device
    )
    rows = made.data.batch_size // 4
    batch = rows * made.data.sequence_length * (4 * 4 + 1)
    assert estimate(made, dict(real.shape)).memory.arguments == held + batch


def test_a_policy_that_keeps_more_computes_less():
    sizes = ONE | {"fsdp": 2, "expert": 4}
    by_policy = {policy: estimate(on(run(remat=policy), sizes), sizes) for policy in REMAT_POLICIES}
    flops = [by_policy[policy].flops.dense for policy in ("none", "dots", "exchange", "full")]
    assert flops == sorted(flops)
    memory = [by_policy[policy].memory.temporaries for policy in ("full", "dots", "none")]
    assert memory == sorted(memory)
    sent = {policy: sum(cost.sent.values()) for policy, cost in by_policy.items()}
    assert sent["exchange"] < sent["full"], "what crossed is not sent again"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2]),
    st.sampled_from(REMAT_POLICIES),
    st.sampled_from(["ring", "all_to_all"]),
    st.sampled_from([1, 2, 4]),
)
def test_figures_are_finite_and_a_device_multiplies_its_share(data, fsdp, expert, context, remat, exchange, chunks):
    sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": context}
    n = math.prod(sizes.values())
    made = on(run(remat=remat), sizes | {"exchange": exchange, "chunks": chunks})
    if made.data.batch_size // 2 % (n // context):
        return
    cost, alone = estimate(made, sizes), estimate(on(made, ONE), ONE)
    assert cost.flops.model == pytest.approx(alone.flops.model / n)
    assert cost.flops.dense == pytest.approx(alone.flops.dense / n)
    assert cost.flops.filled == pytest.approx(alone.flops.filled / n)
    assert all(size >= 0 and math.isfinite(size) for size in cost.memory.parts.values())
    assert bool(cost.sent) == (n > 1)
    assert all(set(axes) <= {axis for axis in sizes if sizes[axis] > 1} for _, axes in cost.sent)


def test_rows_of_tokens_cross_as_the_exchange_says():
    sizes = ONE | {"expert": 4}
    tokens, width = 64 * 512 // 4, 256 * 2
    ring = estimate(on(run(), sizes | {"exchange": "ring"}), sizes).sent
    gathered = 4 * tokens * 3 * width  # layers, tokens, other ranks
    assert ring["reduce-scatter", ("expert",)] >= 2 * gathered  # back, and the gradient's way there
    rows = estimate(on(run(), sizes | {"exchange": "all_to_all"}), sizes).sent["ragged-all-to-all", ("expert",)]
    assert rows == 4 * 4 * tokens * 2 * width * 3 / 4  # layers, ways, choices, other ranks


def test_the_balance_loss_of_the_whole_step_costs_another_forward_pass():
    made = run()
    exact = dataclasses.replace(made, balance=dataclasses.replace(made.balance, scope="global"))
    flops = estimate(exact, ONE).flops.dense / estimate(made, ONE).flops.dense
    assert flops == pytest.approx(8 / 6, rel=1e-3)


def test_model_flops_of_gpt2_and_of_a_classifier_are_counted_by_hand():
    norms, biases = 4 * D, 5 * D + F
    decoder = 50_257 * D + L * (LAYER + norms + biases + 512 * D) + 2 * D
    pooler, classifier = D * D + D, 2 * D + 2
    encoder = L * (LAYER + norms + biases + 2 * 512 * D) + 2 * D + pooler + classifier  # all keys, not half of them
    for name, forward in (("gpt2", decoder), ("bert", encoder)):
        assert estimate(published(name), ONE).flops.model == 6 * forward * 4 * 512


@pytest.mark.parametrize(
    ("name", "fields", "forward", "rest"),
    [
        ("gpt2", {}, 50_257 * D + L * LAYER, 0),
        ("gpt2", {"remat": "full"}, 50_257 * D + L * LAYER, 2 * L * (LAYER - D * F)),
        ("gpt2", {"feed_forward": "swiglu"}, 50_257 * D + L * (LAYER + D * F), 0),
        ("gpt2", SPLIT, 50_257 * D + L * LAYER, 4 * 2 * D * 64),  # keys have no gradient
        ("gpt2", SPLIT | {"split_gate": "cosine"}, 50_257 * D + L * LAYER + 2 * (D * 256 + 256 * 64), 0),
        ("bert", {}, L * LAYER + D * D + 2 * D, 0),
        ("bert", {"remat": "full"}, L * LAYER + D * D + 2 * D, 2 * L * LAYER),  # a norm reads what a layer returns
    ],
)
def test_products_of_dense_models_are_counted_by_hand(name, fields, forward, rest):
    flops = estimate(published(name, **fields), ONE).flops
    assert flops.dense == (6 * forward + rest) * 4 * 512
    assert flops.grouped == flops.filled == 0


def test_with_lora_weights_that_rest_have_no_gradient_and_neither_has_what_lies_below_all_factors():
    flops = estimate(published("gpt2", {"lora_rank": 8}), ONE).flops
    inputs, factored = 3 * D * D, 2 * D * D  # of the first layer's attention; query and value
    assert flops.dense == (4 * (50_257 * D + L * LAYER) - 2 * inputs + 2 * L * factored) * 4 * 512
    assert flops.model == flops.dense + L * 6 * 512 * D * 4 * 512
    deep = estimate(published("bert", {"lora_rank": 8, "lora_targets": ("down",)}), ONE).flops
    rest = 4 * L * LAYER - 2 * (LAYER - D * F) - 2 * D * F + 2 * L * D * F + 6 * (D * D + 2 * D)
    assert deep.dense == rest * 4 * 512, "the first layer has a gradient of its last weight alone"
    whole = estimate(published("bert"), ONE).flops
    assert deep.attention / whole.attention == pytest.approx(1 - 5 / 7 / L)


def test_an_encoder_attends_to_whole_rows():
    attention = [
        estimate(published(name, length=4096), ONE).flops.attention
        for name in ("gpt2", "bert")  # in blocks of 1024: 2560 keys of 4096 on average
    ]
    assert attention[0] / attention[1] == 2560 / 4096


def test_lora_holds_moments_of_its_factors_and_sends_gradients_of_its_targets():
    sizes = ONE | {"fsdp": 4}
    whole, lora = (
        estimate(on(published("gpt2", given), sizes), sizes)
        for given in ({}, {"lora_rank": 8, "lora_targets": ("up",)})
    )
    vectors, factors, batch = L * (9 * D + F) + 2 * D, L * 8 * (D + F), 512 * 17
    # Bytes: four of each number, and of matrices a fourth on each device.
    parameters = (50_257 + 4096) * D + L * LAYER + 4 * vectors
    assert whole.memory.arguments == pytest.approx(3 * parameters + batch, rel=1e-4)
    assert lora.memory.arguments == pytest.approx(parameters + 3 * 4 * factors + batch, rel=1e-4)
    assert lora.memory.temporaries < whole.memory.temporaries
    assert lora.sent["reduce-scatter", ("fsdp",)] == L * 3 * 2 * D * F / 4  # bfloat16
    gathered = [cost.sent["all-gather", ("fsdp",)] for cost in (whole, lora)]
    assert gathered[0] == gathered[1]


def test_a_trained_expert_has_gradients_and_all_else_has_none():
    made = run()
    part = dataclasses.replace(made, optimizer=OptimizerConfig(trainable_experts=("0 1",) * 4))
    whole, few = (estimate(one, ONE) for one in (made, part))
    assert few.flops.grouped == whole.flops.grouped, "the kernels compute all gradients of a stack"
    assert few.flops.dense < 0.75 * whole.flops.dense
    held = whole.memory.arguments - few.memory.arguments
    parameters = sum(leaf.elements * leaf.number for leaf in Shapes(made, ONE).state.leaves)
    trained = 4 * 2 * (3 * 256 * 128 + 256)
    assert held == pytest.approx(2 * 4 * (parameters - trained), rel=1e-6)

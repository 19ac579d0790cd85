"""Sizes of the released models against the published numbers, and the cost of a token against a count by hand."""

import importlib.util
import re
from pathlib import Path

import pytest

from emo_jax.model import ModelConfig, active_parameters, flops_per_token, total_parameters

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def never_trained_rows(model: ModelConfig) -> int:
    """Published counts include a router row for each shared expert, which the loss never reaches; we have none."""
    return model.num_shared_experts * model.d_model * len(model.routed_experts)


@pytest.mark.parametrize(
    "name, total",
    [
        ("emo_1b14b", 13_568_641_024),
        ("stdmoe_1b14b", 13_568_641_024),
        ("stdmoe_1b4b", 3_901_818_880),
        ("dense_1b", 1_484_851_200),
    ],
)
def test_total_parameters_are_the_published_ones(name, total):
    model = load(name).get_config().model
    assert total_parameters(model) + never_trained_rows(model) == total


@pytest.mark.parametrize(
    "name, active", [("emo_1b14b", 1_489_045_504), ("stdmoe_1b14b", 1_489_045_504), ("dense_1b", 1_484_851_200)]
)
def test_active_parameters_are_the_published_ones(name, active):
    model = load(name).get_config().model
    assert active_parameters(model) + never_trained_rows(model) == active


def test_flops_of_a_token_are_the_products_of_emo_1b14b_counted_by_hand():
    D, S = 2048, 4096
    projections = 4 * D * D  # query, key, value, out
    router = D * 127
    experts = 8 * 3 * D * 1024  # seven routed and one shared: gate, up, down
    scores_and_sums = 2 * D * S // 2  # a causal token meets half of the row on average, twice
    norms = 2 * D
    forward = 16 * (projections + router + experts + scores_and_sums + norms) + D + D * 100_352
    assert flops_per_token(load("emo_1b14b").get_config().model, S) == 3 * 2 * forward


def test_flops_of_a_dense_layer_and_of_grouped_heads_are_counted_by_hand():
    model = ModelConfig(
        vocab_size=11, d_model=8, num_layers=2, num_heads=4, num_kv_heads=2, experts_per_layer=(5, 0), d_expert=3,
        d_dense=7, num_shared_experts=2, top_k=3,
    )  # fmt: skip
    projections = 8 * 8 + 2 * 8 * 4 + 8 * 8
    mixture = 8 * 3 + (1 + 2) * 3 * 8 * 3
    forward = 2 * (projections + 8 * 20 + 2 * 8) + mixture + 3 * 8 * 7 + 8 + 8 * 11
    assert flops_per_token(model, 20) == 6 * forward
    assert active_parameters(model) == forward - 2 * 8 * 20 + 11 * 8
    assert total_parameters(model) - active_parameters(model) == 2 * 3 * 8 * 3  # two idle experts


@pytest.mark.parametrize("name", ["emo_1b14b", "stdmoe_1b14b", "stdmoe_1b4b", "dense_1b"])
def test_a_released_config_says_its_own_size_and_cost(name):
    module = load(name)
    run = module.get_config()
    text = module.__doc__
    assert re.search(r"Parameters: ([\d.]+)B", text)[1] == f"{total_parameters(run.model) / 1e9:.2f}"
    flops = flops_per_token(run.model, run.data.sequence_length)
    assert re.search(r"FLOPs: ([\d.]+) GFLOP", text)[1] == f"{flops / 1e9:.2f}"
    assert run.data.batch_size * run.data.sequence_length == 1024 * 4096

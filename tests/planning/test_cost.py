"""The formulas, against the model's own figures, real arrays and one another."""

import dataclasses
import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.config import BalanceConfig, Config, DataConfig, MeshConfig, ModelConfig, PoolConfig, TrainConfig
from emo_jax.model import active_parameters
from emo_jax.model.config import REMAT_POLICIES
from emo_jax.planning import estimate
from emo_jax.training.step import init_state, run_mesh
from tests.training import tiny

ONE = {"data": 1, "fsdp": 1, "expert": 1, "context": 1}


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


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 2, "fsdp": 2}, {"fsdp": 2, "expert": 2}])
def test_arguments_are_what_a_device_really_holds(mesh):
    made = tiny.config(mesh={"data": 1} | mesh)
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

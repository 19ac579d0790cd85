"""The jitted step as the loop uses it."""

import jax
import numpy as np
import pytest

from emo_jax.parallel import put_rows
from emo_jax.training.step import abstract_state, init_state, make_train_step
from tests.training import tiny


@pytest.fixture
def run():
    return tiny.config(model={"dtype": "float32"})


def test_nothing_recompiles_or_reaches_for_the_host_after_the_first_step(run):
    mesh = tiny.devices_mesh(run, 1)
    state, step = init_state(run, mesh), make_train_step(run, mesh)
    for seed in range(4):
        batch = put_rows(tiny.batch(seed), mesh)
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, batch)
    assert step._cache_size() == 1
    assert int(state.step) == 4
    assert np.isfinite(metrics["loss"])


def test_a_step_donates_its_state(run):
    mesh = tiny.devices_mesh(run, 1)
    state, step = init_state(run, mesh), make_train_step(run, mesh)
    step(state, put_rows(tiny.batch(), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_training_lowers_the_loss_of_a_batch(run):
    mesh = tiny.devices_mesh(run, 1)
    state, step = init_state(run, mesh), make_train_step(run, mesh)
    batch = put_rows(tiny.batch(), mesh)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("microbatches", [1, 2])
def test_bfloat16_keeps_float32_master_weights(microbatches):
    run = tiny.config(model={"dtype": "bfloat16"}, train={"microbatches": microbatches})
    mesh = tiny.devices_mesh(run, 1)
    state, metrics = make_train_step(run, mesh)(init_state(run, mesh), put_rows(tiny.batch(), mesh))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    assert metrics["loss"].dtype == np.float32


def test_state_is_made_sharded(run):
    run = tiny.config(model={"dtype": "float32"}, mesh={"data": 1, "fsdp": 4})
    mesh = tiny.devices_mesh(run, 4)
    state = init_state(run, mesh)
    gate = state.params["layers"]["00"]["moe"]["routed"]["gate"]
    assert gate.addressable_shards[0].data.size * 4 == gate.size
    wanted = abstract_state(run, mesh)
    for leaf, abstract in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (abstract.shape, abstract.dtype)


def test_dense_model_has_no_routing_metrics():
    run = tiny.config(model={"dtype": "float32", "experts_per_layer": (0, 0, 0)}, pool={"kind": "none"})
    mesh = tiny.devices_mesh(run, 1)
    _, metrics = make_train_step(run, mesh)(init_state(run, mesh), put_rows(tiny.batch(), mesh))
    assert "routing" not in metrics
    assert np.isfinite(metrics["loss"])


def test_annealed_pools_start_at_their_step():
    run = tiny.config(model={"dtype": "float32"}, pool={"start_step": 2})
    mesh = tiny.devices_mesh(run, 1)
    state, step = init_state(run, mesh), make_train_step(run, mesh)
    masses = []
    for _ in range(3):
        state, metrics = step(state, put_rows(tiny.batch(), mesh))
        masses.append(float(metrics["routing"]["pool_mass"].min()))
    np.testing.assert_allclose(masses[:2], 1.0, rtol=1e-6)
    assert masses[2] < 0.999


def test_a_step_of_filtered_rows_alone_stays_finite(run):
    mesh = tiny.devices_mesh(run, 1)
    rows = tiny.batch(rows=[[]] * run.data.batch_size)
    state, metrics = make_train_step(run, mesh)(init_state(run, mesh), put_rows(rows, mesh))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get((state.params, metrics))))
    assert int(metrics["loss_tokens"]) == 0

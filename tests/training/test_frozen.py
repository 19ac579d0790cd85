"""Training some experts alone: their gradients are those of the whole model, and nothing else moves."""

import jax
import numpy as np
import pytest

from emo_jax.parallel import put_rows
from emo_jax.training.frozen import trained, with_trained
from emo_jax.training.step import init_state, make_train_step
from tests.training import tiny

EXPERTS = ("0 3 5", "1 4")


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def run(**sections):
    optimizer = {"weight_decay": 0.1} | sections.pop("optimizer", {})
    return tiny.config(optimizer=optimizer, **sections)


def by_name(tree):
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in paths}


def slices(leaf, name):
    experts = [int(e) for e in EXPERTS[{"00": 0, "02": 1}[name.split("/")[1]]].split()]
    return leaf[:, experts] if name.endswith("router") else leaf[experts]


@pytest.mark.parametrize(
    "sections, devices",
    [
        ({}, 1),
        ({"train": {"microbatches": 2}}, 1),
        ({"train": {"microbatches": 4}, "balance": {"scope": "microbatch"}}, 1),
        ({"mesh": {"data": 2, "fsdp": 2}}, 4),
    ],
)
def test_gradients_are_those_of_the_whole_model(sections, devices):
    whole = by_name(tiny.gradients(run(**sections), tiny.batch(), devices)[0])
    part = by_name(tiny.gradients(run(optimizer={"trainable_experts": EXPERTS}, **sections), tiny.batch(), devices)[0])
    wanted = {name for name in whole if "/routed/" in name or name.endswith("router")}
    assert set(part) == wanted
    for name, leaf in part.items():
        np.testing.assert_allclose(leaf, slices(whole[name], name), rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_step_moves_them_alone_and_keeps_no_moments_of_the_rest(devices):
    config = run(optimizer={"trainable_experts": EXPERTS}, mesh={"data": 1, "fsdp": devices})
    mesh = tiny.devices_mesh(config, devices)
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    before = by_name(state.params)
    for seed in range(3):
        state, _ = step(state, put_rows(tiny.batch(seed), mesh))
    assert step._cache_size() == 1
    for name, leaf in by_name(state.params).items():
        if "/routed/" in name or name.endswith("router"):
            moved = (leaf != before[name]).any(tuple(i for i in range(leaf.ndim) if i != (name.endswith("router"))))
            chosen = EXPERTS[{"00": 0, "02": 1}[name.split("/")[1]]]
            assert np.flatnonzero(moved).tolist() == [int(e) for e in chosen.split()], name
        else:
            np.testing.assert_array_equal(leaf, before[name], err_msg=name)
    part = sum(leaf.size for leaf in jax.tree.leaves(trained(config.optimizer, state.params)))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * part


def test_taking_a_part_out_and_putting_it_back_is_the_identity():
    config = run(optimizer={"trainable_experts": EXPERTS}).optimizer
    params = tiny.parameters(run())
    params = jax.tree.map(jax.numpy.asarray, params)
    again = with_trained(config, params, trained(config, params))
    for ours, wanted in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(ours, wanted)
    assert trained(run().optimizer, params) is params

"""Training some experts alone: their gradients are those of the whole model, and nothing else moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emo_jax.model import abstract_parameters
from emo_jax.parallel import put_rows
from emo_jax.training.frozen import overlay, select, trained, with_trained
from emo_jax.training.step import abstract_state, init_state, make_train_step, state_shardings
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


SPLIT = {"num_layers": 2, "experts_per_layer": (0, 0), "split_layers": (1,), "split_experts": 5, "split_top_k": 2}


def test_whole_numbers_have_no_gradient_and_stay_as_they_are():
    config = run(model=SPLIT | {"d_dense": 20}, pool={"kind": "none"}, mesh={"data": 1, "fsdp": 4})
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(part_of(config)))
    mesh = tiny.devices_mesh(config, 4)
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    order = jax.device_put(np.random.default_rng(0).permutation(20).astype(np.int32), state_order(state).sharding)
    state = state._replace(params=overlay(state.params, {"layers": {"01": {"ffn": {"order": order}}}}))
    before, wanted = by_name(state.params), np.array(order)
    for seed in range(2):
        state, _ = step(state, put_rows(tiny.batch(seed), mesh))
    assert step._cache_size() == 1
    np.testing.assert_array_equal(state_order(state), wanted)
    for name, leaf in by_name(state.params).items():
        assert (leaf != before[name]).any() == (not name.endswith("order")), name
    assert not any("order" in name for name in by_name(state.opt_state))


def part_of(config):
    return jax.eval_shape(lambda params: trained(config.optimizer, params), abstract_parameters(config.model))


def state_order(state):
    return state.params["layers"]["01"]["ffn"]["order"]


@pytest.mark.parametrize(
    "fields, model",
    [
        ({}, {}),
        ({"trainable_experts": EXPERTS}, {}),
        ({"lora_rank": 2}, {"labels": ("no", "yes"), "causal": False}),
        ({}, {"split_copies": True, "split_gate": "cosine"}),
    ],
    ids=str,
)
def test_moments_live_where_their_parameters_do(fields, model):
    sections = {"pool": {"kind": "none"}, "model": SPLIT | {"d_dense": 20}} if model else {}
    config = run(optimizer=fields, mesh={"data": 1, "fsdp": 2, "expert": 2}, **sections)
    config.model = dataclasses.replace(config.model, **model)
    mesh = tiny.devices_mesh(config, 4)
    shardings, state = state_shardings(config, mesh), abstract_state(config, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    places, part = by_path(shardings.params), by_path(part_of(config))
    found = by_path(shardings.opt_state)
    moments = {name: place for name, place in found.items() if name.partition("u/")[2] in part}
    whole = [name for name in part if not (fields.get("lora_rank") and "attention" in name)]
    assert {name.partition("u/")[2] for name in moments} == set(whole) and len(moments) == 2 * len(whole)
    for name, place in moments.items():
        assert place == places[name.partition("u/")[2]], name
    assert all(place.is_fully_replicated for name, place in found.items() if name not in moments)
    assert any(not place.is_fully_replicated for place in moments.values())


def by_path(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in jax.tree.leaves_with_path(tree)}


def test_selecting_drops_what_is_empty_and_overlaying_puts_it_back():
    tree = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": {"g": 4}}
    some = select(tree, lambda path: path[-1] in ("a", "e"))
    assert some == {"a": 1, "b": {"d": {"e": 3}}}
    assert select(tree, lambda path: True) is tree
    assert overlay(tree, {"b": {"d": {"e": 5}}}) == {"a": 1, "b": {"c": 2, "d": {"e": 5}}, "f": {"g": 4}}
    assert tree["b"]["d"]["e"] == 3

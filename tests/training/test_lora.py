"""LoRA on merged weights: the same numbers as training explicit factors, on any mesh, and nothing else moves."""

import dataclasses
import itertools
import os
import re
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emo_jax.config import LORA_TARGETS, _factorable
from emo_jax.errors import UserError
from emo_jax.model import abstract_parameters, bind, init_parameters
from emo_jax.parallel import put_rows
from emo_jax.training.checkpoints import Checkpoints
from emo_jax.training.frozen import is_factored, trained
from emo_jax.training.lora import Factors
from emo_jax.training.step import abstract_batch, abstract_state, init_state, make_train_step, state_shardings
from tests.training import tiny

ALL = tuple(itertools.chain(*LORA_TARGETS.values()))
RANK, ALPHA = 3, 5.0
DENSE = {"num_layers": 2, "experts_per_layer": (0, 0), "d_dense": 12}
CLASSIFIER = {"labels": ("no", "yes"), "causal": False, "biases": True, "feed_forward": "gelu"}
SPLIT = {"split_layers": (1,), "split_experts": 4, "split_top_k": 2, "split_gate": "cosine"}
EQUATIONS = {"out": "hnr,rd->hnd", "query": "dr,rhn->dhn", "key": "dr,rhn->dhn", "value": "dr,rhn->dhn"}
"""Of the product of a target's factors; of a feed-forward's a plain one."""


def run(model=DENSE, targets=ALL, **sections):
    fields = {"dtype": "float64"} | model
    classifier = {name: fields.pop(name) for name in ("labels", "causal") if name in fields}
    if "experts_per_layer" in model:
        sections = {"pool": {"kind": "none"}} | sections
    optimizer = {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_targets": targets} | sections.pop("optimizer", {})
    made = tiny.config(model=fields, optimizer=optimizer, **sections)
    made.model = dataclasses.replace(made.model, **classifier)  # what reads labelled texts is not tested here
    return made


def batch(config, seed=0):
    made = tiny.batch(seed)
    if config.model.labels:
        made["targets"] %= len(config.model.labels)
    return made


def by_name(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Factors))
    }


def steps(config, count, devices=1, state=None):
    """The state before and after so many steps, as NumPy arrays, and the last metrics."""
    mesh = tiny.devices_mesh(config, devices)
    state = init_state(config, mesh) if state is None else state
    step, before = make_train_step(config, mesh), jax.tree.map(np.array, jax.device_get(state))
    for seed in range(count):
        state, metrics = step(state, put_rows(batch(config, seed), mesh))
    assert step._cache_size() == 1
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(state_shardings(config, mesh)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    return before, jax.device_get(state), jax.device_get(metrics)


def merged(start, factors, scale=ALPHA / RANK):
    """W₀ + scale·A·B of each target."""
    product = {
        name: jnp.einsum(EQUATIONS.get(name.split("/")[-1], "ir,ro->io"), *pair) for name, pair in factors.items()
    }
    return {name: start[name] + scale * change for name, change in product.items()}


def nested(flat):
    tree = {}
    for name, leaf in flat.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


@pytest.mark.parametrize(
    "model, whole",
    [
        (DENSE, ()),
        (DENSE | CLASSIFIER, ("classifier", "classifier_bias", "pooler", "pooler_bias")),
        (DENSE | SPLIT, ("gate_projection", "gate_experts", "gate_scale")),
    ],
    ids=["dense", "classifier", "split"],
)
def test_training_is_that_of_explicit_factors_by_adamw(model, whole):
    """The oracle: AdamW on A, B and what is trained as a whole, through a function of W₀ + α/r·A·B."""
    targets = tuple(name for name in ALL if name != "gate" or "feed_forward" not in model)
    fields = {"weight_decay": 0.2, "clip_norm": 0.5, "beta1": 0.8, "epsilon": 1e-6}
    free = {"balance": {"weight": 0.0, "router_z_weight": 0.0}, "train": {"logits_z_weight": 0.0}}
    with jax.enable_x64(True):
        config = run(model, targets, optimizer=fields, **free)
        before, after, metrics = steps(config, 6)
        start, factors = by_name(before.params), by_name(before.opt_state.factors)
        assert {name.split("/")[-1] for name in factors} == set(targets)
        whole = {name: start[name] for name in start if name.split("/")[-1] in whole}

        def loss(variables, rows):
            params = nested(start | merged(start, variables["factors"]) | variables["whole"])
            module = bind(config.model, params)
            hidden, _ = module(rows["tokens"], rows["document_ids"], rows["positions"], pool=config.pool, documents=4)
            logits = jax.nn.log_softmax(module.logits(hidden))
            chosen = jnp.take_along_axis(logits, rows["targets"][..., None], axis=-1)[..., 0]
            return -(chosen * rows["loss_mask"]).sum() / rows["loss_mask"].sum()

        optimizer = optax.chain(
            optax.clip_by_global_norm(0.5), optax.adamw(1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.2)
        )
        variables = {"factors": {name: tuple(pair) for name, pair in factors.items()}, "whole": whole}
        state, step = optimizer.init(variables), jax.jit(jax.value_and_grad(loss))
        for seed in range(6):
            value, slopes = step(variables, batch(config, seed))
            assert optax.tree.norm(slopes) > 0.5  # so it is clipped
            updates, state = optimizer.update(slopes, state, variables)
            variables = optax.apply_updates(variables, updates)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-9)
        found, wanted = by_name(after.params), start | merged(start, variables["factors"]) | variables["whole"]
        for name, leaf in found.items():
            np.testing.assert_allclose(leaf, wanted[name], rtol=1e-9, atol=1e-12, err_msg=name)
            moved = name in variables["factors"] or name in variables["whole"]
            assert (leaf != start[name]).any() == moved, name
        for name, pair in by_name(after.opt_state.factors).items():
            for ours, theirs in zip(pair, variables["factors"][name], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12, err_msg=name)


def test_weights_stay_the_sum_of_what_they_were_and_the_product_in_float32():
    config = run(DENSE | {"dtype": "float32"}, train={"steps": 400})
    before, after, metrics = steps(config, 200)
    assert np.isfinite(metrics["loss"])
    start, found = by_name(before.params), by_name(after.params)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64), (start, by_name(after.opt_state.factors)))
        for name, leaf in merged(*wide).items():
            assert np.linalg.norm(leaf - start[name]) > 0.05 * np.linalg.norm(start[name])  # it went far
            assert np.linalg.norm(found[name] - leaf) < 1e-6 * np.linalg.norm(leaf), name


def test_a_run_starts_from_its_weights_and_knows_its_factors_from_the_seed():
    config = run(DENSE | {"dtype": "float32", "d_model": 64})
    factors = {}
    for seed, devices in ((3, 1), (3, 4), (4, 1)):
        config.train.seed, config.mesh.fsdp = seed, devices
        params, opt_state = init_state(config, tiny.devices_mesh(config, devices))[1:3]
        factors[seed, devices] = by_name(jax.device_get(opt_state.factors))
        for leaf, wanted in zip(
            jax.tree.leaves(params), jax.tree.leaves(init_parameters(config.model, seed)), strict=True
        ):
            np.testing.assert_array_equal(leaf, wanted)
    everything = []
    for name, (a_IR, b_RO) in factors[3, 1].items():
        np.testing.assert_array_equal(b_RO, 0)
        np.testing.assert_array_equal(a_IR, factors[3, 4][name].a_IR)
        assert (a_IR != factors[4, 1][name].a_IR).all()
        everything.append((a_IR * np.sqrt(a_IR[..., 0].size)).ravel())
    everything = np.sort(np.concatenate(everything))  # uniform in ±1 once scaled
    np.testing.assert_allclose(everything, np.linspace(-1, 1, everything.size), atol=0.06)
    assert len(np.unique(everything)) > 0.99 * everything.size


@pytest.mark.parametrize(
    "sections",
    [{}, {"train": {"microbatches": 2}, "balance": {"scope": "microbatch"}}],
    ids=str,
)
def test_of_a_mixture_attention_alone_is_trained(sections):
    config = run({"dtype": "float32"}, ("query", "out"), **sections)
    before, after, metrics = steps(config, 2)
    found = by_name(after.params)
    for name, leaf in by_name(before.params).items():
        assert (leaf != found[name]).any() == name.endswith(("/query", "/out")), name
    assert metrics["grad_norm"] > 0 and "routing" in metrics


def test_neither_gradients_nor_moments_are_kept_of_what_is_frozen():
    config = run(DENSE | CLASSIFIER | {"dtype": "float32"}, ("query", "down"))
    part = by_name(trained(config.optimizer, abstract_parameters(config.model)))
    head = ("classifier", "classifier_bias", "pooler", "pooler_bias")
    assert {name.split("/")[-1] for name in part} == {"query", "down", *head}
    state = abstract_state(config, tiny.devices_mesh(config, 1))
    whole = sum(leaf.size for name, leaf in part.items() if "/" not in name)
    thin = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state.factors))
    assert thin == 2 * RANK * (16 + 16) + 2 * RANK * (12 + 16)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 3 * thin + 2 * whole


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    config = run(DENSE | SPLIT | {"dtype": "float32"}, ("query", "value", "down"), optimizer={"lora_rank": 4})
    mesh = tiny.devices_mesh(config, 1)
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    batches, checkpoints = iter(grain.MapDataset.range(9).to_iter_dataset()), Checkpoints(tmp_path, config, "hash")
    for seed in range(6):
        if seed == 3:
            checkpoints.save(state, batches)
            checkpoints.close()
        state, _ = step(state, put_rows(batch(config, seed), mesh))
    again = Checkpoints(tmp_path, config, "hash")
    restored = again.restore(mesh, batches)
    again.close()
    assert int(restored.step) == 3
    for seed in range(3, 6):
        restored, _ = step(restored, put_rows(batch(config, seed), mesh))
    assert step._cache_size() == 1
    for ours, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def test_a_skipped_step_leaves_weights_and_factors_as_they_were():
    config = run(DENSE | {"dtype": "float32"}, train={"guard_window": 8, "guard_sigmas": 1e-6})
    _, state, _ = steps(config, 4)
    quiet = np.zeros_like(state.guard.losses_W)  # which no loss can stay under
    state = jax.tree.map(jnp.asarray, state._replace(guard=state.guard._replace(losses_W=quiet)))
    before, after, metrics = steps(config, 1, state=state)
    assert int(metrics["skipped"]) == 1
    for ours, wanted in zip(jax.tree.leaves(after[1:3]), jax.tree.leaves(before[1:3]), strict=True):
        np.testing.assert_array_equal(ours, wanted)


def same_on(mesh, devices, model):
    with jax.enable_x64(True):
        _, wanted, _ = steps(run(model), 3)
        _, found, _ = steps(run(model, mesh=mesh), 3, devices)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(found[1:3]), jax.tree.leaves(wanted[1:3]), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-9, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    "mesh, model",
    [
        ({"fsdp": 2, "expert": 2}, DENSE | CLASSIFIER | {"feed_forward": "swiglu"}),
        ({"fsdp": 2, "context": 2}, DENSE | SPLIT),
    ],
    ids=str,
)
def test_a_mesh_does_not_change_steps(mesh, model):
    same_on(mesh, 4, model)


@pytest.mark.slow
def test_a_mesh_of_eight_devices_does_not_change_steps():
    command, devices = [sys.executable, "-m", "tests.training.test_lora"], {"JAX_NUM_CPU_DEVICES": "8"}
    subprocess.run(command, env=os.environ | devices, check=True)


def test_beside_the_forward_and_backward_pass_a_step_gathers_only_what_is_thin():
    config = run(DENSE | {"dtype": "float32", "d_model": 48}, ("query", "down"), mesh={"fsdp": 4})
    mesh = tiny.devices_mesh(config, 4)
    step = make_train_step(config, mesh)
    text = step.lower(abstract_state(config, mesh), abstract_batch(config, mesh)).compile().as_text()
    gathers = re.findall(r"= (.*?) all-gather(?:-start)?\(.*op_name=\"(.*?)\"", text)
    shapes = [re.findall(r"\w\[([\d,]+)\]", results) for results, name in gathers if "shard_map" not in name]
    sizes = [np.prod([int(n) for n in shape.split(",")]) for some in shapes for shape in some]
    assert sizes and max(sizes) <= 48 * RANK
    scattered = re.findall(r"reduce-scatter(?:-start)?\(.*op_name=\".*layer_", text)
    assert len(scattered) == 2 * 2  # the gradients of targets alone, and of no other weight


@pytest.mark.parametrize("model", [DENSE, DENSE | SPLIT, DENSE | {"feed_forward": "relu"}, {}], ids=str)
def test_what_a_config_takes_for_a_target_is_a_leaf_of_the_model(model):
    config = run(model | {"dtype": "float32"}, ("query",))
    config.optimizer.lora_targets = ALL
    leaves = by_name(abstract_parameters(config.model))
    found = {name: leaf.shape for name, leaf in leaves.items() if is_factored(config.optimizer, tuple(name.split("/")))}
    shapes = _factorable(config.model)
    assert set(found) == set(shapes)
    for name, shape in found.items():
        summed = 2 if name.endswith("/out") else 1
        assert shapes[name] == (np.prod(shape[:summed]), np.prod(shape[summed:])), name


@pytest.mark.parametrize(
    "model, fields, words",
    [
        (DENSE, {"lora_rank": -1}, "optimizer.lora_rank=-1 is negative"),
        (DENSE, {"lora_alpha": 0.0}, "optimizer.lora_alpha=0.0 must be positive"),
        (DENSE, {"lora_alpha": float("nan")}, "optimizer.lora_alpha=nan must be positive"),
        (DENSE, {"lora_targets": ("query", "valeu")}, "optimizer.lora_targets='valeu' is not one of.*mean 'value'"),
        (DENSE, {"lora_targets": ("query,value",)}, "has 'query,value'; several are written as"),
        (DENSE, {"lora_targets": ()}, "optimizer.lora_targets is empty with optimizer.lora_rank=3"),
        (
            DENSE,
            {"lora_rank": 9, "lora_targets": ("key",)},
            r"=9 is more.*layers/00/attention/key, a matrix of 16 by 8",
        ),
        (DENSE, {"lora_rank": 13}, "more than the smaller side of layers/00/ffn/down, a matrix of 12 by 16"),
        (
            DENSE | {"feed_forward": "relu"},
            {"lora_targets": ("gate",)},
            "has 'gate', which no layer.*has down, key, out",
        ),
        ({"experts_per_layer": (8, 8, 6)}, {"lora_targets": ("query", "up")}, "has 'up'.*has key, out, query, value"),
        ({}, {"trainable_experts": ("0 1", "0 1")}, "optimizer.lora_rank=3 and optimizer.trainable_experts="),
    ],
)
def test_what_cannot_work_is_refused_in_words(model, fields, words):
    with pytest.raises(UserError, match=words):
        run(model, **{"optimizer": {"lora_targets": ("query", "down"), **fields}})


def test_fresh_experts_that_would_stay_as_they_are_are_refused():
    with pytest.raises(UserError, match=r"train\.new_experts=2 with optimizer\.lora_rank=3"):
        run({}, ("query",), train={"init_from": "a", "new_experts": 2})


if __name__ == "__main__":
    for axes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "expert": 2}, {"fsdp": 4, "context": 2}):
        for layers in (DENSE, DENSE | SPLIT):
            same_on(axes, 8, layers)
            print("equal:", axes, layers, flush=True)

"""Weights on disk: saved by themselves, and read for a few experts alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

import emo_jax
from emo_jax.config import Config, PoolConfig
from emo_jax.errors import UserError
from emo_jax.interop import to_public_names
from emo_jax.model import ModelConfig, abstract_parameters
from emo_jax.modularity import Subset
from emo_jax.training.checkpoints import checksums
from emo_jax.training.weights import Saving, Stored, load_parameters, save_model, saved_parameters
from tests.training import tiny

MODEL = ModelConfig(
    vocab_size=13,
    d_model=64,
    num_layers=3,
    num_heads=2,
    experts_per_layer=(17, 0, 9),
    top_k=3,
    d_expert=1024,
    d_dense=8,
    dtype="float32",
)
KEPT = ((0, 3, 15), (2, 5))


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract_parameters(MODEL))
    return emo_jax.Model(MODEL, params)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "model"
    model.save(folder)
    return folder


@pytest.fixture(scope="module")
def subset(model):
    return Subset(KEPT, model.fingerprint)


def equal(ours, wanted):
    paths = jax.tree.leaves_with_path(wanted)
    for leaf, (path, value) in zip(jax.tree.leaves(ours), paths, strict=True):
        np.testing.assert_array_equal(leaf, value, err_msg=str(path))


def test_a_saved_model_is_read_back_and_never_written_over(model, saved):
    again = emo_jax.load(saved)
    assert again.config == model.config
    equal(again.params, model.params)
    with pytest.raises(UserError, match="exists already"):
        model.save(saved)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_itself_restores_a_saved_model(model, tmp_path, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    save_model(tmp_path / "model", Config(model=MODEL, pool=PoolConfig(kind="none")), params, None)
    with ocp.CheckpointManager(tmp_path / "model" / "checkpoints") as manager:
        assert manager.latest_step() == 0
        found = manager.restore(0, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    equal(found["params"], params)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
    with ocp.CheckpointManager(tmp_path / "model" / "checkpoints") as manager:
        args = ocp.args.StandardRestore({"params": abstract})
        found = manager.restore(0, args=ocp.args.Composite(state=args))["state"]
    equal(found["params"], params)
    metadata = ocp.PyTreeCheckpointer().metadata(tmp_path / "model" / "checkpoints" / "0" / "state").item_metadata
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), metadata.tree["params"])
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    read = load_parameters(tmp_path / "model")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype(dtype)}  # as it is stored
    equal(read, params)


@pytest.mark.parametrize("kept", [None, KEPT])
def test_parameters_are_put_where_they_go(model, saved, kept):
    config = tiny.config(mesh={"data": 1, "fsdp": 4})
    mesh = tiny.devices_mesh(config, 4)
    spec = jax.sharding.PartitionSpec
    shardings = jax.tree.map(
        lambda leaf: jax.sharding.NamedSharding(mesh, spec(*("fsdp" if n % 64 == 0 else None for n in leaf.shape[:1]))),
        abstract_parameters(MODEL),
    )
    params = saved_parameters(saved, shardings, kept)
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == sharding, path
    equal(params, model.params if kept is None else model.cut(Subset(KEPT, model.fingerprint)).params)


def test_a_leaf_is_read_in_blocks_of_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("emo_jax.training.weights._CHUNK_BYTES", 2**12)
    monkeypatch.setattr("emo_jax.training.weights._BLOCK_BYTES", 2**14)
    config = ModelConfig(vocab_size=1001, d_model=16, num_layers=1, num_heads=2, num_experts=0, d_dense=8)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract_parameters(config))
    save_model(tmp_path / "model", Config(model=config, pool=PoolConfig(kind="none")), params, None)
    equal(load_parameters(tmp_path / "model")[1], params)
    assert next(iter(Stored(tmp_path / "model").abstract_leaves())) in (("embedding",), ("head",))  # the largest first


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("shape", [(), (7,), (2**18 + 1,), (3, 300, 1000), (5, 3, 4), (700, 1001)])
def test_checksums_in_host_memory_are_those_of_devices(shape, dtype):
    content = np.random.default_rng(0).bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    tree = {"routed": np.frombuffer(content, dtype).reshape(shape)}
    part = {"routed": np.array([9, 2, 10**9, 7, 4])[: shape[0]]} if len(shape) == 3 else None
    with jax.enable_x64():
        for experts in (None, part):
            assert checksums(tree, experts) == checksums(jax.tree.map(jax.numpy.asarray, tree), experts)


def test_what_was_interrupted_goes_on_with_the_leaves_that_are_missing(tmp_path):
    def saving(origin):
        return Saving(tmp_path / "model", origin)

    leaf = np.arange(6, dtype=np.float32).reshape(2, 3)
    first = saving({"from": "a"})
    first.add(("a",), leaf)
    first.add(("b", "c"), leaf)
    with (first.making / "journal.jsonl").open("a") as journal:
        journal.write('{"leaf": "params/d", "check')  # the machine stopped here
    assert saving({"from": "a"}).done == {("a",), ("b", "c")}
    assert saving({"from": "a"}).done == {("a",), ("b", "c")}  # and the torn line is gone
    assert not saving({"from": "b"}).done
    again = saving({"from": "a"})
    assert not again.done
    again.add(("a",), leaf)
    assert not saving(None).done  # what has no origin always starts anew


def test_a_subset_read_from_disk_is_the_cut_model_and_other_experts_are_not_read(model, saved, subset):
    def bytes_read() -> int:
        lines = Path("/proc/self/io").read_text().split()
        return int(lines[lines.index("rchar:") + 1])

    cut = model.cut(subset)
    start = bytes_read()
    part = emo_jax.load(saved, subset)
    partly = bytes_read() - start
    assert part.config == cut.config
    equal(part.params, cut.params)
    emo_jax.load(saved)
    fully = bytes_read() - start - partly
    share = sum(leaf.nbytes for leaf in jax.tree.leaves(cut.params)) / sum(
        leaf.nbytes for leaf in jax.tree.leaves(model.params)
    )
    assert share < 0.3 and partly < (share + 0.1) * fully


def test_a_damaged_expert_is_noticed_where_it_is_read(model, saved, subset, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    state = tmp_path / "copy" / "checkpoints" / "0" / "state"
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}
    store = tensorstore.open(
        {"driver": "zarr", "kvstore": spec | {"path": "params.layers.00.moe.routed.up/"}}, write=True
    ).result()
    store[3, 5, 7].write(np.float32(1.0)).result()
    with pytest.raises(UserError, match="layers/00/moe/routed/up does not have the checksum"):
        load_parameters(tmp_path / "copy", kept=KEPT)
    load_parameters(tmp_path / "copy", kept=((0, 15), (2, 5)))
    with pytest.raises(UserError, match="layers/00/moe/routed/up does not have the checksum"):
        load_parameters(tmp_path / "copy")


def test_a_subset_of_a_hugging_face_folder_reads_only_its_tensors(model, subset, tmp_path):
    public = to_public_names(model.params, MODEL)
    save_file(public, tmp_path / "model.safetensors")
    values = {
        "model_type": "emo",
        "vocab_size": 13,
        "hidden_size": 64,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_experts": 17,
        "num_experts_per_layer": list(MODEL.experts_per_layer),
        "num_experts_per_tok": 3,
        "num_shared_experts": 1,
        "dense_intermediate_size": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    cut = model.cut(subset)
    equal(emo_jax.load(tmp_path, subset).params, cut.params)
    # What is not kept may even be unreadable as a number.
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.1.up_proj.weight"][:] = np.nan
    save_file(tensors, tmp_path / "model.safetensors")
    equal(emo_jax.load(tmp_path, subset).params, cut.params)


def test_a_subset_of_another_model_is_refused_before_experts_are_read(saved, subset):
    with pytest.raises(UserError, match="The subset was chosen for the model 0123"):
        emo_jax.load(saved, dataclasses.replace(subset, model="0123"))
    with pytest.raises(UserError, match="There is no subset file"):
        emo_jax.load(saved, "missing.json")

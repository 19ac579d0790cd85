"""Weights on disk: saved by themselves, and read for a few experts alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore
from safetensors.numpy import load_file, save_file

import emo_jax
from emo_jax.errors import UserError
from emo_jax.interop import to_public_names
from emo_jax.model import ModelConfig, abstract_parameters
from emo_jax.modularity import Subset
from emo_jax.training.weights import load_parameters

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

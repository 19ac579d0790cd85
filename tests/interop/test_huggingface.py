"""Reading and naming weights without golden values: what is accepted, and what is refused with which words."""

import json
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from emo_jax.errors import UserError
from emo_jax.interop import read_config, read_parameters, to_public_names
from emo_jax.model import bind

SMALL = {
    "model_type": "emo",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "norm_topk_prob": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_experts_per_layer": None,
    "num_shared_experts_per_layer": None,
    "dense_intermediate_size": None,
}


def tensors_of(values, seed=0):
    """Random tensors of such a model, by published name."""
    rng = np.random.default_rng(seed)
    D, F, V = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    N = D // values["num_attention_heads"]
    K = values["num_key_value_heads"]
    layers = values["num_hidden_layers"]
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,), "lm_head": (V, D)}
    for i, E in enumerate(values["num_experts_per_layer"] or [values["num_experts"]] * layers):
        here = f"model.layers.{i}"
        shapes |= {f"{here}.pre_attention_layernorm": (D,), f"{here}.pre_feedforward_layernorm": (D,)}
        shapes |= {f"{here}.self_attn.{name}_proj": (D, D) for name in "qo"}
        shapes |= {f"{here}.self_attn.{name}_proj": (K * N, D) for name in "kv"}
        if E:
            shapes[f"{here}.mlp.gate"] = (E, D)
        for part in [f".experts.{e}" for e in range(E)] or [""]:
            hidden = F if E else values["dense_intermediate_size"]
            shapes |= {f"{here}.mlp{part}.{name}_proj": (hidden, D) for name in ("gate", "up")}
            shapes[f"{here}.mlp{part}.down_proj"] = (D, hidden)
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, values, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


def read(folder):
    config = read_config(folder)
    return config, read_parameters(folder, config)


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def zero_shared_rows(tensors, shared):
    for name, value in tensors.items():
        if name.endswith("mlp.gate.weight") and shared:
            value[-shared:] = 0
    return tensors


VARIANTS = {
    "one shared expert": {},
    "none shared": {"num_shared_experts": 0, "norm_topk_prob": True},
    "two shared": {"num_shared_experts": 2},
    "per layer": {"num_experts_per_layer": [4, 6], "num_shared_experts_per_layer": [1, 1]},
    "a dense layer": {
        "num_experts_per_layer": [0, 5],
        "num_shared_experts_per_layer": [0, 1],
        "dense_intermediate_size": 9,
    },
    "rope as transformers 5 writes it": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_public_names_are_the_inverse_of_reading(tmp_path, name):
    values = SMALL | VARIANTS[name]
    tensors = zero_shared_rows(tensors_of(values), values["num_shared_experts"])
    config, params = read(write(tmp_path, values, tensors))
    assert config.rope_theta == 10_000.0 and config.dtype == "float32"
    assert config.layer_experts == tuple(values["num_experts_per_layer"] or [5, 5])
    public = to_public_names(params, config)
    assert public.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(public[key], value, err_msg=key)
        assert public[key].flags.c_contiguous and public[key].dtype == np.float32


def test_two_shared_experts_weigh_one_half_each(tmp_path):
    values = SMALL | {"num_shared_experts": 2}
    tensors = zero_shared_rows(tensors_of(values), 2)
    config, params = read(write(tmp_path, values, tensors))
    x_TD = np.random.default_rng(1).normal(size=(7, 8)).astype(np.float32)

    def expert(e):
        gate, up, down = (tensors[f"model.layers.0.mlp.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down"))
        a_TF = x_TD @ gate.T
        return (a_TF / (1 + np.exp(-a_TF)) * (x_TD @ up.T)) @ down.T

    shared = bind(config, params).layers["00"].moe.shared(jnp.asarray(x_TD[None]))[0]
    np.testing.assert_allclose(shared, (expert(3) + expert(4)) / 2, rtol=1e-5, atol=1e-5)


def test_gradients_by_published_weights_undo_the_scale_of_shared_experts(tmp_path):
    values = SMALL | {"num_shared_experts": 2}
    config, params = read(write(tmp_path, values, zero_shared_rows(tensors_of(values), 2)))
    weights, gradients = (to_public_names(params, config, gradients=g) for g in (False, True))
    for name, value in weights.items():  # published = ours · 2, so d/d published = d/d ours / 2
        scaled = name.endswith(("experts.3.down_proj.weight", "experts.4.down_proj.weight"))
        np.testing.assert_allclose(gradients[name], value / 4 if scaled else value, err_msg=name)


def test_shared_experts_with_unequal_router_rows_are_refused(tmp_path):
    values = SMALL | {"num_shared_experts": 2}
    with pytest.raises(UserError, match=r"last 2 rows of model\.layers\.0\.mlp\.gate\.weight differ"):
        read(write(tmp_path, values, tensors_of(values)))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_stored_precisions_are_read_as_float32(tmp_path, dtype):
    stored = {name: value.astype(dtype) for name, value in tensors_of(SMALL).items()}
    widened = {name: value.astype(np.float32) for name, value in stored.items()}
    _, params = read(write(tmp_path / "stored", SMALL, stored))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    assert_same(params, read(write(tmp_path / "wide", SMALL, widened))[1])


def shard(folder):
    """A folder like SMALL's in two files with an index."""
    tensors = tensors_of(SMALL)
    write(folder, SMALL, tensors)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_sharded_folder_equals_a_single_file(tmp_path):
    _, whole = read(write(tmp_path / "whole", SMALL, tensors_of(SMALL)))
    assert_same(read(shard(tmp_path / "sharded"))[1], whole)


def test_an_absent_shard_and_one_outside_the_folder_are_refused(tmp_path):
    folder = shard(tmp_path / "sharded")
    outside = (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match=r"names the file 'model-00002-of-00002\.safetensors', which is not"):
        read(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002.safetensors", f"../{outside.name}"))
    with pytest.raises(UserError, match=r"'\.\./outside\.safetensors', which is not in the folder"):
        read(folder)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    tensors = tensors_of(SMALL)
    gate = "model.layers.1.mlp.experts.2.gate_proj.weight"
    without = {name: value for name, value in tensors.items() if name != gate}
    with pytest.raises(UserError, match=r"experts\.2\.gate_proj\.weight is missing"):
        read(write(tmp_path, SMALL, without))
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight is not part of such a model"):
        read(write(tmp_path, SMALL, tensors | {"model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}))
    with pytest.raises(UserError, match=r"experts\.2\.gate_proj\.weight has shape \[8, 6\].*makes it \[6, 8\]"):
        read(write(tmp_path, SMALL, tensors | {gate: tensors[gate].T.copy()}))
    router = "model.layers.0.mlp.gate.weight"
    with pytest.raises(UserError, match=r"mlp\.gate\.weight has shape \[4, 8\].*makes it \[5, 8\]"):
        read(write(tmp_path, SMALL, tensors | {router: tensors[router][:4].copy()}))
    with pytest.raises(UserError, match=r"experts\.2\.gate_proj\.weight has dtype I8"):
        read(write(tmp_path, SMALL, tensors | {gate: tensors[gate].astype(np.int8)}))
    with pytest.raises(UserError, match=r"experts\.4\.\w+\.weight is missing \(and 5 more\)"):  # E = 5, but 4 on disk
        read(write(tmp_path, SMALL, {name: value for name, value in tensors.items() if "experts.4" not in name}))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "olmoe"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"dense_mlp_bias": True},
        {"always_active_experts": [0]},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"num_experts_per_layer": [5, 6], "num_shared_experts_per_layer": [1, 2]},
        {"norm_topk_prob": True},
        {"head_dim": 16},
        {"quantization_config": {"quant_method": "fp8"}},
    ],
    ids=lambda change: list(change)[-1],
)
def test_what_is_not_supported_is_refused_with_field_and_value(tmp_path, change):
    folder = write(tmp_path, SMALL | change, {})
    with pytest.raises(UserError) as error:
        read_config(folder)
    field, value = list(change.items())[-1]
    assert f"{field}={value!r} is not supported yet" in str(error.value)


def test_an_incomplete_or_impossible_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    folder = write(tmp_path, {k: v for k, v in SMALL.items() if k != "num_experts"}, {})
    with pytest.raises(UserError, match="'num_experts' is missing"):
        read_config(folder)
    with pytest.raises(UserError, match=r"config\.json: model\.top_k=7 asks for 6 routed experts"):
        read_config(write(tmp_path, SMALL | {"num_experts_per_tok": 7}, {}))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_config(tmp_path)


class Dangerous:
    """Raises when unpickled."""

    def __reduce__(self):
        return exec, ("raise AssertionError('the pickle was read')",)


def test_pickled_weights_are_never_read(tmp_path):
    folder = write(tmp_path, SMALL, {})
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        read(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Dangerous()))
    with pytest.raises(UserError, match=r"pytorch_model\.bin.*convert to safetensors"):
        read(folder)


@pytest.mark.parametrize("content", ["half a file", "a large-file pointer"])
def test_a_broken_file_is_reported_as_such(tmp_path, content):
    file = write(tmp_path, SMALL, tensors_of(SMALL)) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == "half a file" else b"version https://git-lfs")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read(tmp_path)

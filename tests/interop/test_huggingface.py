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
from emo_jax.interop import huggingface, read_config, read_leaves, read_parameters, to_public_names
from emo_jax.model import abstract_parameters, bind
from tests.interop.folders import SMALL, VARIANTS, expert_counts, read, tensors_of, write, zero_shared_rows


def assert_same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_public_names_are_the_inverse_of_reading(tmp_path, name):
    values = SMALL | VARIANTS[name]
    folder = write(tmp_path, values, tensors_of(values))
    config = read_config(folder)
    write(folder, values, tensors := zero_shared_rows(tensors_of(values), config))
    config, params = read(folder)
    assert config.dtype == "float32" and (config.rope_theta == 10_000.0 or config.positions == "learned")
    assert list(config.layer_experts) == expert_counts(values)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), params, abstract_parameters(config))
    if values["model_type"] == "olmo2_noqknorm_prenorm":
        return  # its public names are those of llama
    public = to_public_names(params, config)
    assert public.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(public[key], value, err_msg=key)
        assert public[key].flags.c_contiguous and public[key].dtype == np.float32


def test_always_active_experts_are_not_shared(tmp_path):
    values = SMALL | VARIANTS["always active instead of shared"]
    config = read_config(write(tmp_path, values, {}))
    assert (config.num_shared_experts, config.num_choices, config.routed_experts) == (0, 3, (5,))
    assert config.always_active_experts == ("0 3",)
    values = SMALL | VARIANTS["always active"]
    assert read_config(write(tmp_path, values, {})).always_active_experts == ("4 1", "4 1")


def test_dense_models_are_equal_whatever_family_they_come_from(tmp_path):
    dense = {"num_experts_per_layer": [0, 0], "dense_intermediate_size": 6}
    kinds = ({"model_type": "llama"}, {"model_type": "olmo2_noqknorm_prenorm"}, dense)
    llama, *others = (read_config(write(tmp_path, SMALL | kind, {})) for kind in kinds)
    assert others == [llama, llama] and llama.d_dense == 6 and not llama.routed_experts


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_model_computes_in_bfloat16_where_it_says_so(tmp_path, field):
    assert read_config(write(tmp_path, SMALL | {field: "bfloat16"}, {})).dtype == "bfloat16"
    assert read_config(write(tmp_path, SMALL | {field: "float16"}, {})).dtype == "float32"


def test_two_shared_experts_weigh_one_half_each(tmp_path):
    values = SMALL | {"num_shared_experts": 2}
    tensors = zero_shared_rows(tensors_of(values), read_config(write(tmp_path, values, {})))
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
    config, params = read(
        write(tmp_path, values, zero_shared_rows(tensors_of(values), read_config(write(tmp_path, values, {}))))
    )
    weights, gradients = (to_public_names(params, config, gradients=g) for g in (False, True))
    for name, value in weights.items():  # published = ours · 2, so d/d published = d/d ours / 2
        scaled = name.endswith(("experts.3.down_proj.weight", "experts.4.down_proj.weight"))
        np.testing.assert_allclose(gradients[name], value / 4 if scaled else value, err_msg=name)


def test_shared_experts_with_unequal_router_rows_are_refused(tmp_path):
    values = SMALL | {"num_shared_experts": 2}
    with pytest.raises(UserError, match=r"last 2 rows of model\.layers\.0\.mlp\.gate\.weight differ"):
        read(write(tmp_path, values, tensors_of(values)))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_leaves_come_whole_in_the_stored_precision_largest_first(tmp_path, dtype):
    folder = write(tmp_path / "stored", SMALL, stored := tensors_of(SMALL, dtype=dtype))
    leaves = list(read_leaves(folder, read_config(folder)))
    assert all(leaf.dtype == dtype and leaf.flags.c_contiguous for _, leaf in leaves)
    sizes = [leaf.nbytes for _, leaf in leaves]
    assert sizes == sorted(sizes, reverse=True)
    wide = write(tmp_path / "wide", SMALL, {name: value.astype(np.float32) for name, value in stored.items()})
    widened = dict(read_leaves(wide, read_config(wide)))
    assert dict(leaves).keys() == widened.keys()
    for path, leaf in leaves:
        np.testing.assert_array_equal(leaf, widened[path], err_msg=str(path))


def test_a_leaf_in_several_precisions_comes_in_one_that_holds_them_all(tmp_path):
    tensors = tensors_of(SMALL)
    for name in tensors:
        expert = name.split("experts.")[-1][:1]
        tensors[name] = tensors[name].astype({"0": ml_dtypes.bfloat16, "1": np.float16}.get(expert, np.float64))
    folder = write(tmp_path / "mixed", SMALL, tensors)
    wide = write(tmp_path / "wide", SMALL, {name: value.astype(np.float32) for name, value in tensors.items()})
    params = read(folder)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}  # never float64
    assert_same(params, read(wide)[1])
    for name in tensors:
        tensors[name] = tensors[name].astype(ml_dtypes.bfloat16 if "experts.0" in name else np.float16)
    gate = read(write(folder, SMALL, tensors))[1]["layers"]["00"]["moe"]["routed"]["gate"]
    assert gate.dtype == np.float32  # neither holds the other


@pytest.mark.parametrize("name", ["one shared expert", "two shared", "a dense layer", "always active", "olmoe"])
def test_kept_experts_are_those_of_the_whole_model_and_no_other_is_read(tmp_path, name):
    values = SMALL | VARIANTS[name]
    config = read_config(write(tmp_path, values, {}))
    tensors = zero_shared_rows(tensors_of(values), config)
    whole = read(write(tmp_path, values, tensors))[1]
    left_out = 2
    kept = [[e for e in range(routed) if e != left_out] for routed in config.routed_experts]
    for key in tensors:
        if f"experts.{left_out}." in key:
            tensors[key][:] = np.nan  # would be refused
    write(tmp_path, values, tensors)
    part = read_parameters(tmp_path, config, kept)
    layer = whole["layers"]["01"]["moe"]
    layer["router"] = layer["router"][:, kept[-1]]
    layer["routed"] = {key: leaf[kept[-1]] for key, leaf in layer["routed"].items()}
    assert_same(part["layers"]["01"], whole["layers"]["01"])
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), part, abstract_parameters(config.cut(kept)))


@pytest.mark.parametrize("name", ["one shared expert", "gpt2", "bert classifier"])
def test_large_tensors_are_read_in_pieces(tmp_path, monkeypatch, name):
    values = SMALL | VARIANTS[name]
    whole = read(write(tmp_path, values, tensors_of(values)))[1]
    monkeypatch.setattr(huggingface, "PIECE_BYTES", 100)  # three rows of the embedding
    assert_same(read(tmp_path)[1], whole)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_a_value_that_is_not_finite_is_refused(tmp_path, value, dtype):
    tensors = tensors_of(SMALL, dtype=dtype)
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"][3, 4] = value
    with pytest.raises(
        UserError, match=r"model\.layers\.1\.mlp\.experts\.2\.down_proj\.weight has values that are not"
    ):
        read(write(tmp_path, SMALL, tensors))


def test_float64_beyond_float32_is_refused(tmp_path):
    tensors = tensors_of(SMALL, dtype=np.float64)
    tensors["model.norm.weight"][0] = 1e300
    with pytest.raises(UserError, match=r"model\.norm\.weight has values that are not finite"):
        read(write(tmp_path, SMALL, tensors))


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


REFUSED = {
    "one shared expert": [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"dense_mlp_bias": True},
        {"ghost_extend_eval": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
        {"num_experts_per_layer": [5, 6], "num_shared_experts_per_layer": [1, 2]},
        {"norm_topk_prob": True},
        {"num_shared_experts": 0, "always_active_experts": [0], "norm_topk_prob": True},
        {"head_dim": 16},
        {"quantization_config": {"quant_method": "fp8"}},
        {"architectures": ["EmoForSequenceClassification"]},
    ],
    "olmoe": [{"clip_qkv": 8.0}, {"architectures": ["OlmoeForSequenceClassification"]}],
    "olmo2": [{"tie_word_embeddings": True}],
    "llama": [{"mlp_bias": True}, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}],
    "gpt2": [
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
        {"activation_function": "silu"},
    ],
    "bert": [
        {"hidden_act": "silu"},
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"add_cross_attention": True},
    ],
    "gpt2 classifier": [{"problem_type": "multi_label_classification"}],
}


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, changes in REFUSED.items() for change in changes],
    ids=lambda value: value if isinstance(value, str) else list(value)[-1],
)
def test_what_is_not_supported_is_refused_with_field_and_value(tmp_path, name, change):
    folder = write(tmp_path, SMALL | VARIANTS[name] | change, {})
    with pytest.raises(UserError) as error:
        read_config(folder)
    field, value = list(change.items())[-1]
    assert f"{field}={value!r} is not supported yet" in str(error.value)


def test_an_unknown_family_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(UserError, match=r"model_type='gptj' is not supported; these are: emo, olmoe, llama, olmo2, "):
        read_config(write(tmp_path, SMALL | {"model_type": "gptj"}, {}))


@pytest.mark.parametrize(
    "field", ["num_experts_per_layer", "num_shared_experts_per_layer", "always_active_experts_per_layer"]
)
def test_lists_of_another_length_are_refused(tmp_path, field):
    lists = {"num_experts_per_layer": [5, 5], field: [[0]] if "active" in field else [5]}
    with pytest.raises(UserError, match=rf"{field}=\[.*must have an entry for each of the num_hidden_layers=2 layers"):
        read_config(write(tmp_path, SMALL | lists, {}))


def test_layers_with_shared_beside_layers_with_always_active_experts_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"always_active_experts_per_layer=\[\[0\], \[\]\] leaves .*num_shared_experts=1"
    ):
        read_config(write(tmp_path, SMALL | {"always_active_experts_per_layer": [[0], []]}, {}))


def test_an_incomplete_or_impossible_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    folder = write(tmp_path, {k: v for k, v in SMALL.items() if k != "num_experts"}, {})
    with pytest.raises(UserError, match="'num_experts' is missing"):
        read_config(folder)
    with pytest.raises(UserError, match=r"config\.json: model\.top_k=7 asks for 6 routed experts"):
        read_config(write(tmp_path, SMALL | {"num_experts_per_tok": 7}, {}))
    with pytest.raises(UserError, match=r"hidden_size='8' must be a whole number"):
        read_config(write(tmp_path, SMALL | {"hidden_size": "8"}, {}))
    with pytest.raises(UserError, match=r"num_heads=0 must be at least 1"):
        read_config(write(tmp_path, SMALL | {"num_attention_heads": 0}, {}))
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


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\x10\0\0\0\0\0\0\0{'not': 'JSON'}  "])
def test_what_is_no_safetensors_file_is_reported_as_such(tmp_path, content):
    (write(tmp_path, SMALL, tensors_of(SMALL)) / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read(tmp_path)


def test_a_truncated_file_is_reported_with_the_first_tensor_that_is_cut_off(tmp_path):
    tensors = tensors_of(SMALL)
    file = write(tmp_path, SMALL, tensors) / "model.safetensors"
    whole = file.read_bytes()
    header = json.loads(whole[8:][: int.from_bytes(whole[:8], "little")])
    first, second, *_ = sorted(header, key=lambda name: -header[name]["data_offsets"][1])
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"not a complete .* has {len(whole) - 1} bytes of {len(whole)}, .*{first} is"):
        read(tmp_path)
    file.write_bytes(whole[: -tensors[first].nbytes - 1])
    with pytest.raises(UserError, match=rf"not a complete safetensors file .*tensor {second} is cut off.*copy"):
        read(tmp_path)


def test_everything_is_checked_before_anything_is_read(tmp_path):
    tensors = tensors_of(SMALL)
    tensors["model.embed_tokens.weight"][0, 0] = np.nan
    tensors["model.norm.weight"] = np.ones(7, np.float32)
    folder = write(tmp_path, SMALL, tensors)
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \[7\]"):
        read_leaves(folder, read_config(folder))

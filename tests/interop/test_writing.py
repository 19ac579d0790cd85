"""Written folders: bit for bit what was read, complete or absent, and refused where no published format fits."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from emo_jax.errors import UserError
from emo_jax.interop import read_config, read_leaves, write_folder
from emo_jax.interop.families import FAMILIES
from tests.interop.folders import SMALL, VARIANTS, tensors_of, write, zero_shared_rows

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def published(folder, change=None, dtype="float32"):
    """A folder as others publish it, with the router rows that we write; (config, leaves, tensors)."""
    values = SMALL | {"torch_dtype": dtype} | (change or {})
    tensors = tensors_of(values, dtype=DTYPES[dtype])
    config = read_config(write(folder, values, tensors))
    write(folder, values, zero_shared_rows(tensors, config))
    return config, dict(read_leaves(folder, config)), tensors


def assert_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name


def values_in(folder, name="config.json"):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_writing_is_the_inverse_of_reading_bit_for_bit(tmp_path, name, dtype):
    origin = tmp_path / "origin"
    config, leaves, tensors = published(origin, VARIANTS[name], dtype)
    write_folder(tmp_path / "again", config, leaves.__getitem__, origin=origin)
    assert_bits(load_file(tmp_path / "again" / "model.safetensors"), tensors)
    assert values_in(tmp_path / "again") == values_in(origin)

    write_folder(tmp_path / "alone", config, leaves.__getitem__)
    assert read_config(tmp_path / "alone") == config
    assert_bits(dict(read_leaves(tmp_path / "alone", config)), leaves)
    kind = values_in(origin)["model_type"]
    assert values_in(tmp_path / "alone")["model_type"] == ("llama" if kind == "olmo2_noqknorm_prenorm" else kind)


SUBSETS = {
    "one shared expert": [(1, 3), (0, 2)],
    "per layer": [(0, 2), (1, 4)],
    "a dense layer": [(1, 3)],
    "always active": [(1, 3, 4), (0, 1, 4)],
    "olmoe": [(1, 3, 4), (0, 1, 4)],
}


@pytest.mark.parametrize("with_origin", [True, False])
@pytest.mark.parametrize("name", SUBSETS)
@pytest.mark.parametrize("equal", [True, False])
def test_a_cut_model_is_what_reading_the_subset_gives(tmp_path, name, equal, with_origin):
    origin = tmp_path / "origin"
    whole, _, _ = published(origin, VARIANTS[name])
    kept = SUBSETS[name] if equal else [*SUBSETS[name][:-1], sorted({2, 3, *SUBSETS[name][-1]})]
    config, leaves = whole.cut(kept), dict(read_leaves(origin, whole, kept))
    target = tmp_path / "cut"
    if name == "olmoe" and config.experts_per_layer:
        with pytest.raises(UserError, match=r"olmoe would need model\.experts_per_layer=\(\)"):
            write_folder(target, config, leaves.__getitem__, origin=origin if with_origin else None)
        return
    write_folder(target, config, leaves.__getitem__, origin=origin if with_origin else None)
    assert read_config(target) == config
    assert_bits(dict(read_leaves(target, config)), leaves)
    values, counts = values_in(target), config.layer_experts
    assert values["num_experts"] == min(e for e in counts if e)
    if len(set(counts)) == 1:
        assert values.get("num_experts_per_layer") is None and values.get("num_shared_experts_per_layer") is None
    else:
        assert values["num_experts_per_layer"] == list(counts)


@pytest.mark.parametrize("name", ["one shared expert", "gpt2", "bert classifier"])
def test_shards_have_an_index_and_read_as_one_file(tmp_path, name):
    config, leaves, tensors = published(tmp_path / "origin", VARIANTS[name])
    write_folder(tmp_path / "sharded", config, leaves.__getitem__, shard_bytes=1000)
    index = values_in(tmp_path / "sharded", "model.safetensors.index.json")
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] and count > 3
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    for file in files:
        content = load_file(tmp_path / "sharded" / file)
        assert content.keys() == {name for name, where in index["weight_map"].items() if where == file}
        assert len(content) == 1 or sum(value.nbytes for value in content.values()) <= 1000
        with safetensors.safe_open(tmp_path / "sharded" / file, "numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert_bits(dict(read_leaves(tmp_path / "sharded", config)), leaves)


def test_each_leaf_is_asked_for_once_and_progress_told(tmp_path):
    config, leaves, _ = published(tmp_path / "origin")
    asked, told = [], []

    def leaf(path):
        asked.append(path)
        return leaves[path]

    write_folder(tmp_path / "out", config, leaf, progress=lambda done, total: told.append((done, total)))
    assert sorted(asked) == sorted(leaves)
    assert told == [(i + 1, len(leaves)) for i in range(len(leaves))]


def test_two_shared_experts_in_bfloat16_survive_the_scale_of_their_output(tmp_path):
    config, leaves, tensors = published(tmp_path / "origin", VARIANTS["two shared"], "bfloat16")
    down = leaves["layers", "00", "moe", "shared", "down"]
    stored = tensors["model.layers.0.mlp.experts.3.down_proj.weight"]
    np.testing.assert_array_equal(down[: config.d_expert].astype(np.float32), stored.astype(np.float32).T / 2)


def test_small_files_of_the_origin_come_along_and_its_unknown_fields_stay(tmp_path):
    origin = tmp_path / "origin"
    whole, _, _ = published(origin, {"auto_map": {"AutoConfig": "configuration_emo.EmoConfig"}, "bos_token_id": 7})
    texts = ("configuration_emo.py", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for name in (*texts, "README.md", "pytorch_model.bin", "model.safetensors.index.json", ".hidden"):
        (origin / name).write_text(name)
    (origin / "folder").mkdir()
    kept = [(0, 1), (2, 3)]
    leaves = dict(read_leaves(origin, whole, kept))
    write_folder(tmp_path / "out", whole.cut(kept), leaves.__getitem__, origin=origin)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*texts, "config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == name for name in texts)
    changed = {"num_experts": 3, "architectures": ["EmoForCausalLM"], "initializer_range": 0.02}
    added = {"always_active_experts": None, "always_active_experts_per_layer": None}
    assert values_in(tmp_path / "out") == values_in(origin) | changed | added


@pytest.mark.parametrize(
    ("change", "key"),
    [({"dtype": "float32", "torch_dtype": None}, "dtype"), ({"torch_dtype": "float32"}, "torch_dtype")],
)
def test_another_precision_and_rotation_are_written_where_the_origin_has_them(tmp_path, change, key):
    origin = tmp_path / "origin"
    rope = {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config, leaves, _ = published(origin, change | rope)
    config = dataclasses.replace(config, dtype="bfloat16", rope_theta=5e5)
    write_folder(tmp_path / "out", config, leaves.__getitem__, origin=origin)
    values = values_in(tmp_path / "out")
    assert values[key] == "bfloat16" and values["rope_theta"] is None
    assert values["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5}
    assert read_config(tmp_path / "out") == config


def test_a_folder_without_origin_has_what_a_tokenizer_and_a_generator_need(tmp_path):
    config, leaves, _ = published(tmp_path / "origin")
    tokenizer = tmp_path / "words.json"
    Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a")).save(str(tokenizer))
    out = tmp_path / "out"
    write_folder(out, config, leaves.__getitem__, tokenizer=tokenizer, end_of_text_id=1, context_length=64)
    assert (out / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    settings = values_in(out, "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["model_max_length"] == 64
    assert settings["eos_token"] == "<end>"
    assert values_in(out, "generation_config.json") == {"eos_token_id": 1, "pad_token_id": 1}
    values = values_in(out)
    assert (values["eos_token_id"], values["pad_token_id"], values["bos_token_id"]) == (1, 1, None)
    assert values["max_position_embeddings"] == 64 and values["architectures"] == ["EmoForCausalLM"]
    write_folder(tmp_path / "bare", config, leaves.__getitem__)
    assert {path.name for path in (tmp_path / "bare").iterdir()} == {"config.json", "model.safetensors"}
    assert values_in(tmp_path / "bare")["eos_token_id"] is None


def test_a_folder_that_holds_something_is_refused_before_any_work(tmp_path):
    config, _, _ = published(tmp_path / "origin")
    with pytest.raises(UserError, match=r"origin exists already; give another folder"):
        write_folder(tmp_path / "origin", config, lambda path: pytest.fail("asked for a parameter"))


def test_nothing_is_left_where_writing_fails(tmp_path):
    config, leaves, _ = published(tmp_path / "origin")

    def leaf(path):
        return leaves[path] if path[0] != "head" else leaves[path].T

    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"The parameter head has shape \[11, 8\], but .* makes it \[8, 11\]"):
        write_folder(tmp_path / "empty", config, leaf, shard_bytes=100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "origin"]
    assert not any((tmp_path / "empty").iterdir())
    write_folder(tmp_path / "empty", config, leaves.__getitem__)
    assert_bits(dict(read_leaves(tmp_path / "empty", config)), leaves)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "one shared expert",
            {"norm_placement": "post"},
            r"mixture: emo would need model\.norm_placement='pre' \(it is 'post'\)\.$",
        ),
        (
            "one shared expert",
            {"qk_norm": True},
            r"emo .* model\.qk_norm=False \(it is True\); olmoe .* model\.num_shared_experts=0 \(it is 1\)\.$",
        ),
        ("always active", {"qk_norm": True}, r"olmoe .* model\.always_active_experts=\(\) \(it is \('4 1'"),
        ("one shared expert", {"normalize_top_k": True}, r"emo would need model\.normalize_top_k=False \(it is True\)"),
        ("always active", {"normalize_top_k": True}, r"emo would need model\.normalize_top_k=False \(it is True\)"),
        ("one shared expert", {"labels": ("no", "yes")}, r"emo would need model\.labels=\(\) \(it is \('no', 'yes'\)"),
        ("none shared", {"tied_embeddings": True}, r"mixture: emo .* model\.tied_embeddings=False \(it is True\)"),
        (
            "llama",
            {"qk_norm": True},
            r"dense model: llama .* model\.qk_norm=False \(it is True\); olmo2 .* model\.norm_placement='post'",
        ),
        ("llama", {"feed_forward": "relu"}, r"llama would need model\.feed_forward='swiglu' \(it is 'relu'\)"),
        ("llama", {"biases": True}, r"llama would need model\.biases=False \(it is True\)"),
        ("olmo2", {"tied_embeddings": True}, r"olmo2 would need model\.tied_embeddings=False \(it is True\)"),
        ("gpt2", {"feed_forward": "swiglu"}, r"gpt2 .* model\.feed_forward='gelu_tanh' or 'gelu' or 'relu' \(it is 's"),
        ("gpt2", {"num_kv_heads": 1}, r"gpt2 would need model\.num_kv_heads=0 or 2 \(it is 1\)"),
        ("gpt2", {"token_types": 2}, r"gpt2 would need model\.token_types=0 \(it is 2\)"),
        ("gpt2", {"norm": "rms"}, r"gpt2 would need model\.norm='layer' \(it is 'rms'\)"),
        ("bert", {"token_types": 0}, r"bert would need model\.token_types=1 or 2 \(it is 0\)"),
        ("bert", {"tied_embeddings": False}, r"bert would need model\.tied_embeddings=True \(it is False\)"),
        ("bert", {"causal": True}, r"bert would need model\.causal=False \(it is True\)"),
        ("bert", {"norm_placement": "pre"}, r"bert would need model\.norm_placement='sum' \(it is 'pre'\)"),
    ],
)
def test_what_no_published_format_holds_is_refused_with_the_field(tmp_path, name, change, message):
    config, _, _ = published(tmp_path / "origin", VARIANTS[name])
    config = dataclasses.replace(config, **change)
    with pytest.raises(UserError, match=r"No published format holds this .*" + message):
        write_folder(tmp_path / "out", config, lambda path: pytest.fail("asked for a parameter"))


def test_an_origin_of_another_family_is_refused(tmp_path):
    config, _, _ = published(tmp_path / "emo")
    for name in ("llama", "olmo2", "olmoe"):
        published(tmp_path / name, VARIANTS[name])
        with pytest.raises(UserError, match=rf"config\.json: No folder of model_type='{name}' holds this mixture"):
            write_folder(tmp_path / "out", config, lambda path: pytest.fail("asked"), origin=tmp_path / name)


def test_an_emo_folder_may_be_all_dense(tmp_path):
    dense = {"num_experts_per_layer": [0, 0], "num_shared_experts_per_layer": [0, 0], "dense_intermediate_size": 9}
    config, leaves, tensors = published(tmp_path / "origin", dense)
    write_folder(tmp_path / "out", config, leaves.__getitem__, origin=tmp_path / "origin")
    assert_bits(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_every_family_is_among_the_variants():
    assert {(SMALL | change)["model_type"] for change in VARIANTS.values()} == set(FAMILIES)

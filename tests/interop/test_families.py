"""GPT-2, BERT, classifiers and tied heads: older names, what is skipped, what is missing, released geometries."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from emo_jax.errors import UserError
from emo_jax.interop import missing_leaves, read_config, read_leaves, write_folder
from emo_jax.interop.families import FAMILIES
from emo_jax.interop.fields import model_config
from emo_jax.interop.tensors import leaf_shapes, tensors
from emo_jax.model.size import total_parameters
from tests.interop.folders import SMALL, VARIANTS, bert_shapes, tensors_of, write


def folder_of(folder, name, change=None, extra=None, rename=lambda name: name, dtype=np.float32):
    """A folder of a variant with more tensors, or under other names; (config, leaves)."""
    values = SMALL | VARIANTS[name] | (change or {})
    stored = tensors_of(values, dtype=dtype) | (extra or {})
    write(folder, values, {rename(name): value for name, value in stored.items()})
    config = read_config(folder)
    return config, dict(read_leaves(folder, config))


def assert_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name


def values_in(folder):
    return json.loads((folder / "config.json").read_text())


def of(shapes, seed=1):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


MASKS = of({f"transformer.h.{i}.attn.bias": (1, 1, 7, 7) for i in range(2)} | {"transformer.h.1.attn.masked_bias": ()})
OTHER_HEADS = of(
    {
        "cls.predictions.bias": (11,),
        "cls.predictions.transform.dense.weight": (8, 8),
        "cls.predictions.transform.LayerNorm.gamma": (8,),
        "cls.seq_relationship.weight": (2, 8),
        "pooler.dense.weight": (8, 8),
        "pooler.dense.bias": (8,),
    }
) | {"embeddings.position_ids": np.arange(7).reshape(1, -1)}


def older(name):
    name = name if name.startswith("cls.") else f"bert.{name}"
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize(
    ("name", "extra", "rename"),
    [
        ("gpt2", MASKS, lambda name: name.removeprefix("transformer.")),  # as GPT-2 was released
        ("gpt2", MASKS, lambda name: name),
        ("bert", OTHER_HEADS, older),  # as BERT was released
        ("bert classifier", {}, lambda name: name.removeprefix("bert.")),
        ("llama", {}, lambda name: name.removeprefix("model.")),
    ],
)
def test_names_of_other_versions_read_the_same_and_what_is_not_ours_is_skipped(tmp_path, name, extra, rename):
    config, leaves = folder_of(tmp_path / "now", name)
    again, others = folder_of(tmp_path / "then", name, extra=extra, rename=rename)
    assert again == config
    assert_bits(others, leaves)
    assert leaves.keys() == leaf_shapes(config).keys()


def test_a_tensor_under_two_of_its_names_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tensor (transformer\.)?wte\.weight is there twice, in model\.safetensors"):
        folder_of(tmp_path, "gpt2", extra=of({"wte.weight": (11, 8)}))


def test_fused_attention_is_three_parameters(tmp_path):
    config, leaves = folder_of(tmp_path, "gpt2")
    stored = tensors_of(SMALL | VARIANTS["gpt2"])
    parts = np.split(stored["transformer.h.1.attn.c_attn.weight"], 3, axis=1)
    biases = np.split(stored["transformer.h.1.attn.c_attn.bias"], 3)
    for name, part, bias in zip(("query", "key", "value"), parts, biases, strict=True):
        np.testing.assert_array_equal(leaves["layers", "01", "attention", name].reshape(8, 8), part)
        np.testing.assert_array_equal(leaves["layers", "01", "attention", f"{name}_bias"].reshape(8), bias)
    assert config.d_dense == 32 and config.head_dim == 4


@pytest.mark.parametrize("name", ["tied llama", "gpt2", "untied gpt2", "bert", "bert classifier", "llama classifier"])
def test_written_in_many_files_of_bfloat16_and_without_an_origin(tmp_path, name):
    config, leaves = folder_of(tmp_path / "origin", name, dtype=ml_dtypes.bfloat16)
    assert config.tied_embeddings == (name in ("tied llama", "gpt2") or "bert" in name)
    write_folder(tmp_path / "again", config, leaves.__getitem__, shard_bytes=300)
    files = list((tmp_path / "again").glob("*.safetensors"))
    found = {key: value for file in files for key, value in load_file(file).items()}
    assert len(files) > 5
    assert_bits(found, load_file(tmp_path / "origin" / "model.safetensors"))
    assert read_config(tmp_path / "again") == config
    assert_bits(dict(read_leaves(tmp_path / "again", config)), leaves)


def test_a_trunk_of_bert_is_written_as_one_whatever_class_it_was(tmp_path):
    config, leaves = folder_of(tmp_path / "mlm", "bert", {"architectures": ["BertForMaskedLM"]}, OTHER_HEADS, older)
    write_folder(tmp_path / "again", config, leaves.__getitem__, origin=tmp_path / "mlm")
    assert values_in(tmp_path / "again") == values_in(tmp_path / "mlm") | {"architectures": ["BertModel"]}
    found = load_file(tmp_path / "again" / "model.safetensors")
    assert {name: value.shape for name, value in found.items()} == bert_shapes(SMALL | VARIANTS["bert"])


@pytest.mark.parametrize(
    ("name", "extra", "missing"),
    [
        ("bert", {}, {"pooler", "pooler_bias", "classifier", "classifier_bias"}),
        ("bert", OTHER_HEADS, {"classifier", "classifier_bias"}),
        ("bert classifier", {}, {"classifier", "classifier_bias"}),  # of three labels
        ("llama", {}, {"classifier"}),
        ("tied llama", {}, {"classifier"}),
        ("gpt2", MASKS, {"classifier"}),
        ("one shared expert", {}, {"classifier"}),
        ("llama classifier", {}, {"classifier"}),
    ],
)
def test_what_a_folder_has_of_a_classifier_is_read(tmp_path, name, extra, missing):
    own, leaves = folder_of(tmp_path, name, extra=extra)
    config = dataclasses.replace(own, labels=("no", "yes"))
    absent = missing_leaves(tmp_path, config)
    assert absent == {(part,) for part in missing}
    found = dict(read_leaves(tmp_path, config, skip=absent))
    assert found.keys() == leaf_shapes(config).keys() - absent
    own = {
        path: leaf for path, leaf in leaves.items() if path not in {("head",), ("classifier",), ("classifier_bias",)}
    }
    assert_bits({path: found[path] for path in own}, own)
    with pytest.raises(UserError, match=r"(classifier|pooler|score)\.\S+ (is missing|has shape)"):
        read_leaves(tmp_path, config)


def test_what_a_classifier_has_of_a_language_model_is_read(tmp_path):
    own, leaves = folder_of(tmp_path, "llama classifier")
    config = dataclasses.replace(own, labels=())
    assert missing_leaves(tmp_path, own) == set() and missing_leaves(tmp_path, config) == {("head",)}
    found = dict(read_leaves(tmp_path, config, skip={("head",)}))
    assert_bits(found, {path: leaf for path, leaf in leaves.items() if path != ("classifier",)})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama classifier", r"tensor lm_head\.weight is missing"),
        ("gpt2 classifier", r"tensor score\.weight is not part of such a model, by its config"),
        ("bert classifier", r"tensor classifier\.bias is not part of such a model \(and 1 more\), by its config"),
    ],
)
def test_a_classifier_whose_class_is_not_named_is_refused(tmp_path, name, message):
    folder_of(tmp_path, name)
    (tmp_path / "config.json").write_text(json.dumps(values_in(tmp_path) | {"architectures": None}))
    with pytest.raises(UserError, match=message):
        read_leaves(tmp_path, read_config(tmp_path))


def test_a_parameter_that_no_tensor_is_for_is_named(tmp_path):
    config, _ = folder_of(tmp_path, "gpt2")
    with pytest.raises(UserError, match=r"its family has no tensor for the parameter token_type_embedding"):
        read_leaves(tmp_path, dataclasses.replace(config, token_types=2))


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        ({}, ("no", "maybe", "yes")),  # in the order of their numbers
        ({"id2label": None}, ("LABEL_0", "LABEL_1")),
        ({"id2label": None, "num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": {str(i): f"{i:x}" for i in range(11)}}, tuple("0123456789a")),
    ],
)
def test_labels_are_in_the_order_of_their_numbers(change, labels):
    assert model_config(SMALL | VARIANTS["bert classifier"] | change).labels == labels


@pytest.mark.parametrize("names", [{"0": "value"}, {"1": "no", "2": "yes"}, {"no": 0, "yes": 1}, ["no", "yes"]])
def test_labels_that_are_not_numbered_from_0_are_refused(names):
    with pytest.raises(UserError) as error:
        model_config(SMALL | VARIANTS["gpt2 classifier"] | {"id2label": names})
    assert f"id2label={names!r} must give two labels or more, numbered from 0" in str(error.value)


def test_a_classifier_of_a_language_model_is_written_with_its_class_labels_and_padding(tmp_path):
    for name in ("gpt2", "llama"):
        own, leaves = folder_of(tmp_path / name, name, {"eos_token_id": 5, "pad_token_id": None})
        config = dataclasses.replace(own, labels=("no", "yes"))
        leaves |= {("classifier",): np.ones((8, 2), np.float32)}
        for end in (-1, 3):
            target = tmp_path / f"{name}{end}"
            write_folder(target, config, leaves.__getitem__, origin=tmp_path / name, end_of_text_id=end)
            values = values_in(target)
            assert values["architectures"] == [FAMILIES[name].classifier] and values["pad_token_id"] == (3, 5)[end < 0]
            assert values["id2label"] == {"0": "no", "1": "yes"} and values["label2id"] == {"no": 0, "yes": 1}
            assert read_config(target) == config
            assert load_file(target / "model.safetensors")["score.weight"].shape == (2, 8)
        write_folder(tmp_path / f"new {name}", config, leaves.__getitem__, end_of_text_id=3)
        assert values_in(tmp_path / f"new {name}")["pad_token_id"] == 3
        assert {file.name for file in (tmp_path / f"new {name}").iterdir()} == {"config.json", "model.safetensors"}


def test_an_untied_head_of_a_tied_origin_is_written(tmp_path):
    own, leaves = folder_of(tmp_path / "tied", "tied llama")
    config = dataclasses.replace(own, tied_embeddings=False)
    leaves[("head",)] = np.ones((8, 11), np.float32)  # as a model has that an older version of this project imported
    write_folder(tmp_path / "again", config, leaves.__getitem__, origin=tmp_path / "tied")
    assert read_config(tmp_path / "again") == config
    assert_bits(dict(read_leaves(tmp_path / "again", config)), leaves)


def test_a_split_model_is_refused_with_what_to_do(tmp_path):
    config, leaves = folder_of(tmp_path / "gpt2", "gpt2")
    split = dataclasses.replace(config, split_layers=(1,), split_experts=4, split_top_k=2)
    for origin in (None, tmp_path / "gpt2"):
        with pytest.raises(
            UserError, match=r"model\.split_layers=\(1,\)\); merge it first: python -m emo_jax\.emoe mer"
        ):
            write_folder(tmp_path / "out", split, leaves.__getitem__, origin=origin)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_in_the_tensors_of_its_family(name):
    values = SMALL | VARIANTS[name]
    config = model_config(values)
    assert {tensor.path for tensor in tensors(config, FAMILIES[values["model_type"]])} == leaf_shapes(config).keys()


GPT2_SMALL = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}
BERT_BASE = {
    "architectures": ["BertForMaskedLM"],
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
BERT_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
TWO_LABELS = {"architectures": ["BertForSequenceClassification"]}


@pytest.mark.parametrize(
    ("values", "parameters"),
    [
        (GPT2_SMALL, 124_439_808),
        (GPT2_SMALL | {"n_embd": 1600, "n_head": 25, "n_layer": 48}, 1_557_611_200),
        (BERT_BASE, 108_891_648),  # without the pooler's 590 592
        (BERT_BASE | TWO_LABELS, 109_483_778),
        (BERT_BASE | BERT_LARGE | TWO_LABELS, 335_143_938),
        (LLAMA_1B, 1_235_814_400),
    ],
    ids=["gpt2", "gpt2-xl", "bert-base trunk", "bert-base", "bert-large", "Llama-3.2-1B"],
)
def test_released_geometries_have_the_published_number_of_parameters(values, parameters):
    assert total_parameters(model_config(values)) == parameters


def test_the_stretched_rotation_of_llama_3_is_refused():
    with pytest.raises(UserError, match=r"rope_scaling=\{'factor': 32\.0.*\} is not supported yet"):
        model_config(LLAMA_1B | {"rope_scaling": LLAMA3_ROPE})

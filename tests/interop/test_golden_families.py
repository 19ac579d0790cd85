"""Every published family gives the numbers of its public implementation; see data/README.md."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import emo_jax
from emo_jax import interop
from emo_jax.model import bind
from tests.interop.goldens import FAST_COMPILE

DATA = Path(__file__).parent / "data"
LANGUAGE_MODELS = (
    "emo_always_active",
    "olmoe",
    "olmoe_normalized",
    "olmo2",
    "olmo2_noqknorm_prenorm",
    "llama",
    "llama_tied",
    "gpt2",
)
CLASSIFIERS = ("llama_classifier", "gpt2_classifier", "bert_classifier")


def read(name):
    """Config, parameters and golden values."""
    config = interop.read_config(DATA / name)
    return config, interop.read_parameters(DATA / name, config), load_file(DATA / name / "expected.safetensors")


def computed(config, params, tokens_BS, token_types_BS=None):
    """The final residual stream, and the logits where there is a head."""

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(params, tokens_BS, token_types_BS):
        model = bind(config, params)
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]).reshape(1, -1), tokens_BS.shape)
        hidden_BSD, _ = model(tokens_BS, jnp.ones_like(tokens_BS), positions_BS, token_types_BS=token_types_BS)
        return hidden_BSD, model.logits(hidden_BSD) if config.causal or config.labels else None

    return run(params, tokens_BS.astype(np.int32), token_types_BS)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_logits_and_greedy_continuation(name):
    config, params, expected = read(name)
    generated_BS = expected["generated"]
    padded_BS = np.pad(expected["input_ids"], ((0, 0), (0, generated_BS.shape[1] - expected["input_ids"].shape[1])))
    logits_BSV = np.asarray(computed(config, params, np.concatenate([padded_BS, generated_BS]))[1])
    found_BSV = logits_BSV[:2, : expected["input_ids"].shape[1]]  # causal: what follows has no effect
    assert_close(found_BSV, expected["logits"])
    np.testing.assert_array_equal(logits_BSV[2:, 7:-1].argmax(-1), generated_BS[:, 8:])  # after 8 tokens of prompt


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_of_labels(name):
    config, params, expected = read(name)
    assert config.labels == ("no", "maybe", "yes")
    _, logits_BSV = computed(config, params, expected["input_ids"], expected.get("token_type_ids"))
    assert_close(logits_BSV[:, -1 if config.causal else 0], expected["logits"])
    if "token_type_ids" in expected:
        _, others_BSV = computed(config, params, expected["input_ids"])
        assert np.abs(others_BSV[:, 0] - expected["logits"]).max() > 1e-2


def test_the_trunk_of_bert_and_the_pooler_that_a_classifier_of_it_starts_with():
    config, params, expected = read("bert")
    hidden_BSD, _ = computed(config, params, expected["input_ids"], expected["token_type_ids"])
    assert_close(hidden_BSD, expected["last_hidden_state"])
    assert not config.labels and "pooler" not in params and "head" not in params
    classifier = dataclasses.replace(config, labels=("no", "yes"))
    missing = interop.missing_leaves(DATA / "bert", classifier)
    assert missing == {("classifier",), ("classifier_bias",)}
    leaves = {path[0]: leaf for path, leaf in interop.read_leaves(DATA / "bert", classifier, skip=missing)}
    pooled_BD = np.tanh(np.asarray(hidden_BSD)[:, 0] @ leaves["pooler"] + leaves["pooler_bias"])
    assert_close(pooled_BD, expected["pooler_output"])


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "llama_classifier", "gpt2_classifier"])
def test_loaded_as_a_user_does(name):
    expected, model = load_file(DATA / name / "expected.safetensors"), emo_jax.load(DATA / name)
    logits_BSV = np.asarray(model(expected["input_ids"]))
    assert_close(logits_BSV[:, -1] if model.config.labels else logits_BSV, expected["logits"])
    if not model.config.labels:
        written = model.generate(expected["generated"][:, :8].tolist(), max_new_tokens=12)
        np.testing.assert_array_equal([completion.tokens for completion in written], expected["generated"][:, 8:])


@pytest.mark.parametrize("name", [path.name for path in DATA.iterdir() if path.is_dir()])
def test_written_back_every_tensor_has_its_bytes(tmp_path, name):
    config = interop.read_config(DATA / name)
    leaves = dict(interop.read_leaves(DATA / name, config))
    interop.write_folder(tmp_path / "again", config, leaves.__getitem__, origin=DATA / name)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", DATA / name))
    again, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", DATA / name))
    assert again == original
    pooler = {key for key in wanted if key.startswith("pooler.")}  # of a trunk without labels
    assert found.keys() == wanted.keys() - pooler and len(pooler) == (2 if name == "bert" else 0)
    for key, value in found.items():
        assert value.dtype == wanted[key].dtype and value.tobytes() == wanted[key].tobytes(), key

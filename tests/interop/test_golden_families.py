"""Every published family gives the numbers of its public implementation; see data/README.md."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from emo_jax import interop
from emo_jax.model import bind
from tests.interop.goldens import FAST_COMPILE

DATA = Path(__file__).parent / "data"
MODELS = ("emo_always_active", "olmoe", "olmoe_normalized", "olmo2", "olmo2_noqknorm_prenorm", "llama")


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_continuation(name):
    config = interop.read_config(DATA / name)
    params = interop.read_parameters(DATA / name, config)
    expected = load_file(DATA / name / "expected.safetensors")

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def logits(params, tokens_BS):
        model = bind(config, params)
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]).reshape(1, -1), tokens_BS.shape)
        return model.logits(model(tokens_BS, jnp.ones_like(tokens_BS), positions_BS)[0])

    generated_BS = expected["generated"]
    padded_BS = np.pad(expected["input_ids"], ((0, 0), (0, generated_BS.shape[1] - expected["input_ids"].shape[1])))
    logits_BSV = np.asarray(logits(params, np.concatenate([padded_BS, generated_BS]).astype(np.int32)))
    found_BSV = logits_BSV[:2, : expected["input_ids"].shape[1]]  # causal: what follows has no effect
    np.testing.assert_allclose(found_BSV, expected["logits"], rtol=0, atol=3e-5)
    np.testing.assert_array_equal(logits_BSV[2:, 7:-1].argmax(-1), generated_BS[:, 8:])  # after 8 tokens of prompt

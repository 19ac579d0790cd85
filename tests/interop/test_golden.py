"""Published folders give the public implementation's numbers: logits, losses, every gradient, greedy text."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from emo_jax import interop
from tests.interop.goldens import FAST_COMPILE, GOLDEN, MODELS, loss, needs_golden, relative

pytestmark = needs_golden


@functools.cache
def computed(name):
    """(config, golden values, total loss, parts, gradients by published name, logits of the golden continuation)."""
    expected = load_file(GOLDEN / name / "expected.safetensors")
    config = interop.read_config(GOLDEN / name)
    params = interop.read_parameters(GOLDEN / name, config)
    value_and_grad = jax.value_and_grad(lambda p, tokens: loss(p, config, tokens), has_aux=True)
    step = jax.jit(value_and_grad, compiler_options=FAST_COMPILE)
    (total, parts), gradients = step(params, expected["input_ids"])
    generated_BS = expected["generated"]
    padding = expected["input_ids"].shape[1] - generated_BS.shape[1]
    (_, (_, _, logits_BSV, _)), _ = step(params, np.pad(generated_BS, ((0, 0), (0, padding))))  # causal: no effect
    public = interop.to_public_names(gradients, config, gradients=True)
    return config, expected, total, parts, public, logits_BSV[:, : generated_BS.shape[1]]


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_router_logits(name):
    config, expected, _, (_, _, logits_BSV, routers), *_ = computed(name)
    np.testing.assert_allclose(logits_BSV, expected["logits"], rtol=0, atol=3e-5)
    for i, (logits_BSR, routed) in enumerate(zip(routers, config.routed_experts, strict=True)):
        public_TE = expected[f"router_logits.{i}"]
        assert public_TE.shape[1] == routed + config.num_shared_experts
        np.testing.assert_allclose(logits_BSR.reshape(-1, routed), public_TE[:, :routed], rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", MODELS)
def test_losses(name):
    _, expected, total, (cross_entropy, balance, _, _), *_ = computed(name)
    np.testing.assert_allclose(cross_entropy, expected["ce_loss"][0], rtol=1e-5)
    np.testing.assert_allclose(balance, expected["lb_loss"][0], rtol=1e-5)
    np.testing.assert_allclose(total, expected["loss"][0], rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_gradient(name):
    config, expected, _, _, gradients, _ = computed(name)
    names = [key.removeprefix("grad.") for key in expected if key.startswith("grad.")]
    assert any("experts" in key for key in names) and any("mlp.gate" in key for key in names)
    for key in names:
        public = expected[f"grad.{key}"]
        if "mlp.gate" in key and config.num_shared_experts:
            assert not public[-config.num_shared_experts :].any()  # weight 1 always: no gradient, and ours has no row
        assert gradients[key].shape == public.shape
        assert relative(gradients[key], public) <= 1e-3, key


@pytest.mark.parametrize("name", MODELS)
def test_greedy_continuation(name):
    _, expected, *_, logits_BSV = computed(name)
    generated_BS = expected["generated"]
    np.testing.assert_array_equal(logits_BSV[:, 7:-1].argmax(-1), generated_BS[:, 8:])  # after 8 tokens of prompt


@pytest.mark.parametrize("name", MODELS)
def test_public_names_are_the_inverse_of_reading(name):
    config = interop.read_config(GOLDEN / name)
    public = interop.to_public_names(interop.read_parameters(GOLDEN / name, config), config)
    stored = load_file(GOLDEN / name / "model.safetensors")
    assert public.keys() == stored.keys()
    for key, value in stored.items():
        if "mlp.gate" in key and config.num_shared_experts:
            value[-config.num_shared_experts :] = 0
        np.testing.assert_array_equal(public[key], value, err_msg=key)
        assert public[key].flags.c_contiguous

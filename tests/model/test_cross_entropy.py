"""The language model's loss: the formula's values and derivatives, in any number of chunks, on any mesh.

Letters: B rows, S sequence, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.model import cross_entropy, language_loss, token_losses
from emo_jax.parallel import MeshConfig, make_mesh
from tests import oracle

B, S, D, V = 4, 10, 8, 17
Z_WEIGHT = 0.1


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def inputs(seed: int = 0, kept: float = 0.7):
    rng = np.random.default_rng(seed)
    hidden_BSD, head_DV = rng.normal(size=(B, S, D)), rng.normal(size=(D, V))
    return hidden_BSD, head_DV, rng.integers(0, V, (B, S)).astype(np.int32), rng.random((B, S)) < kept


def by_formula(hidden_BSD, head_DV, targets_BS, mask_BS):
    """Sums and the gradients of the total, a token at a time."""
    sums, by_hidden_BSD, by_head_DV = np.zeros(3), np.zeros_like(hidden_BSD), np.zeros_like(head_DV)
    for b, s in np.argwhere(mask_BS):
        logits_V = hidden_BSD[b, s] @ head_DV
        log_z = oracle.logsumexp(logits_V)
        loss = log_z - logits_V[targets_BS[b, s]]
        sums += [loss + Z_WEIGHT * log_z**2, loss, log_z**2]
        by_logits_V = np.exp(logits_V - log_z) * (1 + 2 * Z_WEIGHT * log_z)
        by_logits_V[targets_BS[b, s]] -= 1
        by_hidden_BSD[b, s] = head_DV @ by_logits_V
        by_head_DV += np.outer(hidden_BSD[b, s], by_logits_V)
    return sums, by_hidden_BSD, by_head_DV


def derived(hidden_BSD, head_DV, targets_BS, mask_BS, mesh=None, factor=0.3):
    """Sums, and `factor` times the gradients of their total."""

    def total(hidden_BSD, head_DV):
        sums = language_loss(hidden_BSD, head_DV, targets_BS, mask_BS, Z_WEIGHT, mesh)
        return factor * sums.total + sums.cross_entropy + sums.logits_z, sums  # the last two carry no gradient

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, sums), grads = run(hidden_BSD, head_DV)
    return sums, *(grad / factor for grad in grads)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.2, 1.0]))
def test_sums_and_gradients_are_the_formulas(seed, kept):
    args = inputs(seed, kept)
    for ours, wanted in zip(derived(*args), by_formula(*args), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunks_change_nothing_and_bound_the_logits_that_exist_at_once(monkeypatch, chunk):
    args = inputs()
    whole, losses = by_formula(*args), token_losses(*args[:3])
    monkeypatch.setattr(cross_entropy, "CHUNK", chunk)
    for ours, wanted in zip(derived(*args), whole, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-11, atol=1e-12)
    for ours, wanted in zip(token_losses(*args[:3]), losses, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-12)
    program = str(jax.make_jaxpr(lambda *a: derived(*a)[1:])(*args))
    size = -(-B * S // -(-B * S // chunk))
    assert f"f64[{size},{V}]" in program and f"f64[{B * S},{V}]" not in program


@pytest.mark.parametrize("data, fsdp", [(4, 1), (2, 2)])
def test_rows_on_several_devices_give_the_sums_and_gradients_of_one(data, fsdp):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp), B, jax.devices()[: data * fsdp])
    args = inputs()
    for ours, wanted in zip(derived(*args, mesh), derived(*args), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-11, atol=1e-12)
    for ours, wanted in zip(token_losses(*args[:3], mesh), token_losses(*args[:3]), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-12)


def test_a_positions_loss_and_hit_are_those_of_its_logits():
    hidden_BSD, head_DV, targets_BS, _ = inputs()
    losses_BS, hits_BS = token_losses(hidden_BSD, head_DV, targets_BS)
    for (b, s), target in np.ndenumerate(targets_BS):
        logits_V = hidden_BSD[b, s] @ head_DV
        np.testing.assert_allclose(losses_BS[b, s], oracle.logsumexp(logits_V) - logits_V[target], rtol=1e-10)
        assert hits_BS[b, s] == (logits_V.argmax() == target)


def test_bfloat16_products_keep_sums_and_the_heads_gradient_in_float32():
    hidden_BSD, head_DV, targets_BS, mask_BS = inputs()
    args = jnp.bfloat16(hidden_BSD), jnp.float32(head_DV), targets_BS, mask_BS
    sums, by_hidden_BSD, by_head_DV = derived(*args)
    assert [x.dtype for x in (*sums, by_hidden_BSD, by_head_DV)] == [jnp.float32] * 3 + [jnp.bfloat16, jnp.float32]
    exact = by_formula(hidden_BSD, head_DV, targets_BS, mask_BS)
    for ours, wanted in zip((np.array(sums), by_hidden_BSD, by_head_DV), exact, strict=True):
        assert np.linalg.norm(np.float64(ours) - wanted) < 0.02 * np.linalg.norm(wanted)

"""The router against the public one: document pools of a fixed size, choices, losses and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emo_jax.model import PoolConfig, balance_loss
from emo_jax.model.routing import route
from tests.interop.goldens import GOLDEN, needs_golden

pytestmark = needs_golden
ROUTERS = ("pool16_full", "pool5_shared2_e32", "pool6_shared1", "pool8_shared0")


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_router_matches_the_public_one(name):
    golden = np.load(GOLDEN / f"router_{name}.npz")
    E, shared, pool = (golden[key].item() for key in ("num_experts", "num_shared_experts", "pool"))
    R, C = E - shared, golden["top_k"].item() - shared
    ids_BS = golden["document_ids"]
    size_BG = np.full((len(ids_BS), ids_BS.max()), pool, np.int32)

    def objective(x_BSD, weight_ED):
        logits_BSR = jnp.einsum("bsd,rd->bsr", x_BSD, weight_ED[:R], precision="highest")
        routing = route(
            logits_BSR, ids_BS, choices=C, pool=PoolConfig(kind="document", min=pool, max=pool), size_BG=size_BG
        )
        totals = routing.totals
        counts_R, tokens = totals.counts_BR.sum(0), totals.tokens_B.sum()
        balance = balance_loss(counts_R, totals.weights_BR.sum(0), tokens, C)
        z = totals.z_B.sum() / tokens
        loss = golden["lb_weight"].item() * balance + golden["z_weight"].item() * z
        # Shared experts come last, with weight 1: their cotangent reaches nothing.
        loss += (routing.weights_BSC * golden["cotangent"][..., :C]).sum()
        return loss, (routing, counts_R, balance, z)

    weight_ED = golden["weight"].reshape(E, -1)
    value_and_grad = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    step = jax.jit(value_and_grad, compiler_options={"xla_backend_optimization_level": 0})  # compiles faster
    (_, (routing, counts_R, balance, z)), (grad_x, grad_weight) = step(golden["x"], weight_ED)
    np.testing.assert_array_equal(routing.indices_BSC, golden["expert_indices"][..., :C])
    np.testing.assert_allclose(routing.weights_BSC, golden["expert_weights"][..., :C], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(counts_R, golden["counts"][:R])
    np.testing.assert_allclose(balance, golden["lb_loss"], rtol=1e-5)
    np.testing.assert_allclose(z, golden["z_loss"], rtol=1e-5)
    assert relative(grad_x, golden["grad_x"]) <= 1e-4
    assert relative(grad_weight, golden["grad_weight"].reshape(E, -1)) <= 1e-4

"""What the backward pass of a layer finds saved."""

import jax
import jax.numpy as jnp
import pytest

from emo_jax.model.remat import REMAT
from emo_jax.parallel import MeshConfig, make_mesh, product


@pytest.mark.parametrize("policy", ["none", "dots", "exchange", "full"])
def test_no_policy_keeps_gathered_weights(policy):
    """Each of four devices keeps no more than its own part of a weight."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2), 8)
    weight = jnp.zeros((64, 8, 32))

    def layer(x_BSD, weight):
        return jnp.sin(product("bsd,dhn->bshn", jnp.sin(x_BSD), weight, ("embed", "heads", "head"), mesh)).sum()

    run = jax.checkpoint(layer, policy=REMAT[policy])
    saved = jax.tree.leaves(jax.vjp(run, jnp.zeros((8, 4, 64)), weight)[1])
    sizes = [leaf.size for leaf in saved if leaf.ndim == 3 and leaf.shape[-1] == 32]
    assert all(size <= weight.size for size in sizes)
    if policy == "none":
        assert any(leaf.shape == (8, 4, 8, 32) for leaf in saved), "activations are kept"

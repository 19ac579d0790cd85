"""Routed experts of a few tokens: each chosen expert's weights are read once, and no others.

Letters: T tokens, C choices a token, R routed experts, U chosen experts, D width, F expert hidden.
"""

import jax
import jax.numpy as jnp


def streamed(
    x_TD: jax.Array,
    indices_TC: jax.Array,
    weights_TC: jax.Array,
    gate_RDF: jax.Array,
    up_RDF: jax.Array,
    down_RFD: jax.Array,
) -> jax.Array:
    """One chosen expert after another, on all tokens at once: reading its weights takes longer than their products."""
    experts = len(gate_RDF)
    chosen_TCR = indices_TC[:, :, None] == jnp.arange(experts, dtype=jnp.int32).reshape(1, 1, -1)
    weights_RT = jnp.where(chosen_TCR, weights_TC[:, :, None], 0).sum(1).T
    chosen_R = chosen_TCR.any((0, 1))
    # Chosen experts first, in their order.
    most = min(indices_TC.size, experts)
    expert_U = jnp.nonzero(chosen_R, size=most, fill_value=experts)[0]

    # One after another: a gather of all of them would be cut into gathers over copies of the stacks on TPU.
    def add(y_TD: jax.Array, expert: jax.Array) -> tuple[jax.Array, None]:
        def share() -> jax.Array:
            gate, up, down = (
                jax.lax.dynamic_index_in_dim(w, expert, keepdims=False).astype(x_TD.dtype)
                for w in (gate_RDF, up_RDF, down_RFD)
            )
            out_TD = (jax.nn.silu(x_TD @ gate) * (x_TD @ up)) @ down
            weight_T = jax.lax.dynamic_index_in_dim(weights_RT, expert, keepdims=False)
            return y_TD + weight_T[:, None] * out_TD.astype(y_TD.dtype)

        return jax.lax.cond(expert < experts, share, lambda: y_TD), None

    wide = jnp.promote_types(weights_TC.dtype, x_TD.dtype)
    y_TD, _ = jax.lax.scan(add, jnp.zeros(x_TD.shape, wide), expert_U)
    return y_TD.astype(x_TD.dtype)

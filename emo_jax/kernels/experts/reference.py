"""Every expert on every token, then the chosen ones kept: slow, memory-hungry and easy to believe."""

import jax
import jax.numpy as jnp


def reference(
    x_TD: jax.Array,
    indices_TC: jax.Array,
    weights_TC: jax.Array,
    gate_RDF: jax.Array,
    up_RDF: jax.Array,
    down_RFD: jax.Array,
) -> jax.Array:
    """Oracle of `routed_experts`; same arguments and result, R / C times the work."""
    experts = gate_RDF.shape[0]
    hidden_TRF = jax.nn.silu(jnp.einsum("td,rdf->trf", x_TD, gate_RDF)) * jnp.einsum("td,rdf->trf", x_TD, up_RDF)
    y_TRD = jnp.einsum("trf,rfd->trd", hidden_TRF, down_RFD)
    chosen_TCR = jax.nn.one_hot(indices_TC, experts, dtype=weights_TC.dtype)
    weights_TR = jnp.einsum("tc,tcr->tr", weights_TC, chosen_TCR)
    return jnp.einsum("tr,trd->td", weights_TR, y_TRD.astype(weights_TR.dtype)).astype(x_TD.dtype)

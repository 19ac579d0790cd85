"""All scores of all heads at once: S × S of them, and easy to believe."""

import jax
import jax.numpy as jnp


def reference(
    query_BSHN: jax.Array,
    key_BSKN: jax.Array,
    value_BSKN: jax.Array,
    document_ids_BS: jax.Array,
    part: tuple[jax.Array | int, int] = (0, 1),
    causal: bool = True,
) -> jax.Array:
    """Oracle of `document_attention`; same arguments and result, every product in float32 or wider."""
    _, length, heads, width = query_BSHN.shape
    groups = heads // key_BSKN.shape[2]
    wide = jnp.promote_types(query_BSHN.dtype, jnp.float32)
    query, key, value = (x.astype(wide) for x in (query_BSHN, key_BSKN, value_BSKN))
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    same_BSS = document_ids_BS[:, :, None] == document_ids_BS[:, None, :]
    visible_BSS = same_BSS & jnp.tril(jnp.ones((1, *same_BSS.shape[1:]), bool)) if causal else same_BSS
    visible_BSS = jax.lax.dynamic_slice_in_dim(visible_BSS, part[0] * length, length, axis=1)
    scores_BHSS = jnp.einsum("bqhn,bkhn->bhqk", query, key, precision="highest") * width**-0.5
    probs_BHSS = jax.nn.softmax(jnp.where(visible_BSS[:, None], scores_BHSS, -jnp.inf))
    return jnp.einsum("bhqk,bkhn->bqhn", probs_BHSS, value, precision="highest").astype(query_BSHN.dtype)

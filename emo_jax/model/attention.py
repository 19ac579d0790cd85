"""Attention within documents, causal or not, with rotary positions or without.

Letters: B rows, S sequence, D model, H query heads, K key/value heads, N head width, M slots of a cache.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from emo_jax.kernels.attention import default_implementation, document_attention
from emo_jax.model.config import ModelConfig
from emo_jax.model.layers import add_bias, rms_norm, vector, weight
from emo_jax.parallel import map_tokens, product


class KeyValues(NamedTuple):
    """What later tokens attend to, of one layer: rotated keys and values, [B, M, K, N] each."""

    key_BMKN: jax.Array
    value_BMKN: jax.Array


class Past(NamedTuple):
    """What a token being decoded attends to: its row's slots from `start_B` on, and itself.

    Attributes:
      cached: of the tokens before it, one a slot; rows are filled from the right end of their prompts.
      start_B: int32, the first slot of each row's document.
      slot: int32 scalar, where the token goes, in every row.
    """

    cached: KeyValues
    start_B: jax.Array
    slot: jax.Array


def rotate(x_BSHN: jax.Array, positions_BS: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding: pairs (i, i + N/2) turn by position · θ^(−2i/N); in float32, returned in x's dtype."""
    half = x_BSHN.shape[-1] // 2
    dtype = jnp.promote_types(x_BSHN.dtype, jnp.float32)
    frequency = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angle_BS1F = positions_BS[:, :, None, None].astype(dtype) * frequency.reshape(1, 1, 1, half)
    cos, sin = jnp.cos(angle_BS1F), jnp.sin(angle_BS1F)
    first, second = jnp.split(x_BSHN.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BSHN.dtype)


def cached_attention(query_B1HN: jax.Array, past: Past) -> jax.Array:
    """Softmax attention of one token a row to the slots start..slot of the cache: [B, 1, H, N]."""
    key_BMKN, value_BMKN = past.cached
    rows, _, heads, width = query_B1HN.shape
    query_BKGN = query_B1HN.reshape(rows, key_BMKN.shape[2], -1, width)  # G query heads share a key head
    wide = jnp.promote_types(query_B1HN.dtype, jnp.float32)
    scores_BKGM = jnp.einsum("bkgn,bmkn->bkgm", query_BKGN, key_BMKN, preferred_element_type=wide)
    slot_1M = jnp.arange(key_BMKN.shape[1], dtype=jnp.int32).reshape(1, -1)
    visible_BM = (slot_1M >= past.start_B[:, None]) & (slot_1M <= past.slot)
    probs_BKGM = jax.nn.softmax(jnp.where(visible_BM[:, None, None], scores_BKGM * width**-0.5, -jnp.inf))
    y_BKGN = jnp.einsum("bkgm,bmkn->bkgn", probs_BKGM.astype(value_BMKN.dtype), value_BMKN)
    return y_BKGN.reshape(rows, 1, heads, width)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, document_ids_BS: jax.Array, mesh: Mesh | None, causal: bool
) -> jax.Array:
    """`document_attention` of each device's own queries; where a row is in parts, all its keys come to each."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    implementation = default_implementation(platform)
    parts = mesh.shape["context"] if mesh is not None else 1
    attention = functools.partial(document_attention, implementation=implementation, causal=causal)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, document_ids_BS: jax.Array) -> jax.Array:
        if parts == 1:
            return attention(q, k, v, document_ids_BS)
        k, v, document_ids_BS = (jax.lax.all_gather(a, "context", axis=1, tiled=True) for a in (k, v, document_ids_BS))
        part = (jax.lax.axis_index("context"), parts)
        return attention(q, k, v, document_ids_BS, part=part)

    # The compiler would gather all rows for a kernel. JAX's kernels do not declare over which mesh axes their results
    # vary, as check_vma asks; all arguments are tokens, so no gradient is a sum that the check would guard.
    run = map_tokens(local, mesh, token_args=4, check_vma=implementation == "chunked")
    return run(q, k, v, document_ids_BS)


class Attention(nnx.Module):
    """Multi-head (or grouped-query) self-attention."""

    def __init__(self, config: ModelConfig):
        d, h, k, n = config.d_model, config.num_heads, config.kv_heads, config.head_dim
        self.query = weight(config, (d, h, n), ("embed", "heads", "head"))
        self.key = weight(config, (d, k, n), ("embed", "heads", "head"))
        self.value = weight(config, (d, k, n), ("embed", "heads", "head"))
        self.out = weight(config, (h, n, d), ("heads", "head", "embed"))
        self.theta, self.epsilon = config.rope_theta, config.norm_epsilon
        self.rotary, self.causal = config.positions == "rotary", config.causal
        if config.biases:
            for name, heads in (("query", h), ("key", k), ("value", k)):
                setattr(self, f"{name}_bias", weight(config, (heads, n), ("heads", "head")))
            self.out_bias = vector(config)
        if config.qk_norm:
            self.query_norm, self.key_norm = vector(config, h * n), vector(config, k * n)

    def __call__(
        self,
        x_BSD: jax.Array,
        document_ids_BS: jax.Array,
        positions_BS: jax.Array,
        past: Past | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """[B, S, D] to [B, S, D], in x's dtype, and what later tokens attend to.

        With a past, S is 1, document ids do not matter, and the token's key and value are added to the cache. The
        mesh's platform, or else the default backend, chooses among the formulations of `kernels.attention`.
        """
        q, k, v = (self._heads(x_BSD, name, mesh) for name in ("query", "key", "value"))
        if hasattr(self, "query_norm"):
            q, k = (self._normalized(*pair) for pair in ((q, self.query_norm), (k, self.key_norm)))
        if self.rotary:
            q, k = (rotate(x, positions_BS, self.theta) for x in (q, k))
        seen = KeyValues(k, v)
        if past is None:
            y_BSHN = _attend(q, k, v, document_ids_BS, mesh, self.causal)
        else:
            added = (
                jax.lax.dynamic_update_slice_in_dim(*pair, past.slot, axis=1)
                for pair in zip(past.cached, seen, strict=True)
            )
            seen = KeyValues(*added)
            y_BSHN = cached_attention(q, past._replace(cached=seen))
        y_BSD = product("bshn,hnd->bsd", y_BSHN, self.out[...], ("heads", "head", "embed"), mesh)
        return add_bias(y_BSD, getattr(self, "out_bias", None)), seen

    def _heads(self, x_BSD: jax.Array, name: str, mesh: Mesh | None) -> jax.Array:
        y_BSHN = product("bsd,dhn->bshn", x_BSD, getattr(self, name)[...], ("embed", "heads", "head"), mesh)
        return add_bias(y_BSHN, getattr(self, f"{name}_bias", None))

    def _normalized(self, x_BSHN: jax.Array, scale: nnx.Param) -> jax.Array:
        """RMSNorm over all heads together."""
        flat = x_BSHN.reshape(*x_BSHN.shape[:2], -1)
        return rms_norm(flat, scale[...], self.epsilon).reshape(x_BSHN.shape)

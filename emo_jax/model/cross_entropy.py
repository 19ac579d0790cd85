"""The language model's loss without [tokens, vocabulary] arrays: tokens go through the head in chunks.

Letters: B rows, S sequence, T tokens, D model, V vocabulary, P tokens of a chunk.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from emo_jax.parallel import map_tokens, rest_spec, scattered, whole

CHUNK = 1024
"""Tokens whose logits exist at once: few enough for a CPU's caches, enough for a TPU to read the head seldom."""


class LanguageLoss(NamedTuple):
    """Sums over loss tokens, float32 or wider; `total` alone carries a gradient.

    Attributes:
      total: cross-entropy + weight · logsumexp(logits)².
      cross_entropy: in nats.
      logits_z: logsumexp(logits)².
    """

    total: jax.Array
    cross_entropy: jax.Array
    logits_z: jax.Array


def language_loss(
    hidden_BSD: jax.Array,
    head_DV: jax.Array,
    targets_BS: jax.Array,
    mask_BS: jax.Array,
    z_weight: float,
    mesh: Mesh | None = None,
) -> LanguageLoss:
    """Cross-entropy and z-term of the head's logits, summed over the tokens in `mask_BS`.

    The forward pass computes the gradients too while a chunk's logits are at hand, so the backward pass needs no
    logits: three products with the head where recomputing would take four.

    Args:
      hidden_BSD: normalised final residual stream, in the dtype of the products.
      head_DV: master weights; their gradient is summed in their own precision.
      targets_BS: int32.
      mask_BS: bool.
      z_weight: of the z-term.
      mesh: rows are split over its devices; None on one device.
    """
    # The head is gathered, and its gradient scattered, where the products are: left to the compiler, all devices would
    # add up whole gradients.
    spec = rest_spec(mesh, ("embed", "vocab"), head_DV.shape)

    def local(hidden_BSD, targets_BS, mask_BS, head_DV):
        hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        return _sums(z_weight, spec, hidden_TD, head_DV, targets_BS.reshape(-1), mask_BS.reshape(-1))

    run = map_tokens(local, mesh, token_args=3, weights=[spec], total=True)
    sums = run(hidden_BSD, targets_BS, mask_BS, head_DV)
    return LanguageLoss(sums[0], *jax.lax.stop_gradient(sums[1:]))


def token_losses(
    hidden_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats of every position, and whether its target has the largest logit: [B, S] each.

    Not for differentiation: that would keep every chunk's logits. Arguments as in `language_loss`.
    """

    def local(hidden_BSD, targets_BS, head_DV):
        head_DV = head_DV.astype(hidden_BSD.dtype)

        def body(chunk):
            hidden_PD, targets_P = chunk
            values = _chunk(hidden_PD, targets_P, head_DV)
            return values.log_z_P - values.target_P, values.target_P >= values.max_P

        rows = _chunked((hidden_BSD.reshape(-1, hidden_BSD.shape[-1]), targets_BS.reshape(-1)))
        parts = jax.lax.map(body, rows)
        return tuple(part.reshape(-1)[: targets_BS.size].reshape(targets_BS.shape) for part in parts)

    return map_tokens(local, mesh, token_args=2)(hidden_BSD, targets_BS, head_DV)


class _Chunk(NamedTuple):
    exp_PV: jax.Array
    sum_P: jax.Array
    max_P: jax.Array
    log_z_P: jax.Array
    target_P: jax.Array
    hit_PV: jax.Array


def _chunk(hidden_PD: jax.Array, targets_P: jax.Array, head_DV: jax.Array) -> _Chunk:
    wide = jnp.promote_types(hidden_PD.dtype, jnp.float32)
    logits_PV = jnp.einsum("pd,dv->pv", hidden_PD, head_DV, preferred_element_type=wide)
    max_P = logits_PV.max(-1)
    # Written out: XLA's CPU backend computes a logsumexp and its gradient five times slower.
    exp_PV = jnp.exp(logits_PV - max_P[:, None])
    sum_P = exp_PV.sum(-1)
    hit_PV = targets_P[:, None] == jnp.arange(logits_PV.shape[1], dtype=targets_P.dtype).reshape(1, -1)
    # A masked sum instead of a gather from [P, V].
    return _Chunk(exp_PV, sum_P, max_P, jnp.log(sum_P) + max_P, jnp.where(hit_PV, logits_PV, 0).sum(-1), hit_PV)


def _chunked(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """[T, ...] as [chunks, P, ...], the last chunk filled up with zeros."""
    tokens = arrays[0].shape[0]
    chunks = max(-(-tokens // CHUNK), 1)
    size = -(-tokens // chunks)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, chunks * size - tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, size, *x.shape[1:])

    return tuple(map(cut, arrays))


def _scan(z_weight: float, spec: PartitionSpec, args: tuple, with_gradients: bool) -> tuple[tuple, Any, Any]:
    """Sums, and the gradients of their total by the hidden stream and the head, which rests split by `spec`."""
    hidden_TD, head_DV, targets_T, mask_T = args
    cast_DV = whole(head_DV.astype(hidden_TD.dtype), spec)
    wide = jnp.promote_types(hidden_TD.dtype, jnp.float32)

    def body(grad_DV, chunk):
        hidden_PD, targets_P, mask_P = chunk
        c = _chunk(hidden_PD, targets_P, cast_DV)
        z_P = jnp.square(c.log_z_P)
        losses_P = c.log_z_P - c.target_P
        sums = [jnp.where(mask_P, x, 0).sum() for x in (losses_P + z_weight * z_P, losses_P, z_P)]
        if not with_gradients:
            return grad_DV, (tuple(sums), None)
        scale_P = jnp.where(mask_P, (1 + 2 * z_weight * c.log_z_P) / c.sum_P, 0)
        grad_PV = c.exp_PV * scale_P[:, None] - (c.hit_PV & mask_P[:, None])
        grad_PV = grad_PV.astype(hidden_PD.dtype)
        grad_DV += jnp.einsum("pd,pv->dv", hidden_PD, grad_PV, preferred_element_type=head_DV.dtype)
        grad_PD = jnp.einsum("pv,dv->pd", grad_PV, cast_DV, preferred_element_type=wide).astype(hidden_PD.dtype)
        return grad_DV, (tuple(sums), grad_PD)

    start: Any = jnp.zeros_like(cast_DV, head_DV.dtype) if with_gradients else None
    grad_DV, (sums, grad_PD) = jax.lax.scan(body, start, _chunked((hidden_TD, targets_T, mask_T)))
    totals = tuple(x.sum() for x in sums)
    if not with_gradients:
        return totals, None, None
    grad_TD = grad_PD.reshape(-1, hidden_TD.shape[1])[: hidden_TD.shape[0]]
    # The backward pass waits for the scatter: the whole gradient of the head would outlive its first layers.
    grad_TD, grad_DV = jax.lax.optimization_barrier((grad_TD, scattered(grad_DV, spec)))
    return totals, grad_TD, grad_DV


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(
    z_weight: float,
    spec: PartitionSpec,
    hidden_TD: jax.Array,
    head_DV: jax.Array,
    targets_T: jax.Array,
    mask_T: jax.Array,
) -> tuple:
    return _scan(z_weight, spec, (hidden_TD, head_DV, targets_T, mask_T), with_gradients=False)[0]


def _sums_fwd(z_weight: float, spec: PartitionSpec, *args: jax.Array) -> tuple[tuple, tuple]:
    totals, grad_TD, grad_DV = _scan(z_weight, spec, args, with_gradients=True)
    return totals, (grad_TD, grad_DV)


def _sums_bwd(z_weight: float, spec: PartitionSpec, grads: tuple, cotangents: tuple) -> tuple:
    by_hidden_TD, by_head_DV = grads
    by_hidden_TD = (by_hidden_TD * cotangents[0]).astype(by_hidden_TD.dtype)  # the product in the wider type
    return by_hidden_TD, (by_head_DV * cotangents[0]).astype(by_head_DV.dtype), None, None


_sums.defvjp(_sums_fwd, _sums_bwd)

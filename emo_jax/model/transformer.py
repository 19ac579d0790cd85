"""The decoder: embedding, blocks of attention and feed-forward, head.

Letters: B rows, S sequence, D model, V vocabulary, G documents a row, L mixture layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from emo_jax.model.attention import Attention
from emo_jax.model.config import ModelConfig, PoolConfig
from emo_jax.model.layers import FeedForward, rms_norm, scale, weight
from emo_jax.model.moe import MixtureOfExperts
from emo_jax.model.routing import PoolDraws, Routing

MAX_LOGITS = 2**24
"""Most logits of a row that exist at once in a loss; longer rows go through in chunks."""

REMAT: dict[str, Callable[..., bool] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nnx.Module):
    """h = x + Attention(norm(x)); y = h + FeedForward(norm(h)); the feed-forward dense or a mixture."""

    def __init__(self, config: ModelConfig, experts: int):
        self.epsilon = config.norm_epsilon
        self.attention_norm = scale(config)
        self.attention = Attention(config)
        self.ffn_norm = scale(config)
        if experts:
            self.moe = MixtureOfExperts(config, experts - config.num_shared_experts)
        else:
            self.ffn = FeedForward(config, config.d_dense)

    def __call__(
        self, x_BSD: jax.Array, document_ids_BS: jax.Array, positions_BS: jax.Array, **routing: Any
    ) -> tuple[jax.Array, Routing | None]:
        """The residual stream after this block, and its routing (None where dense)."""
        normal = rms_norm(x_BSD, self.attention_norm[...], self.epsilon)
        x_BSD = x_BSD + self.attention(normal, document_ids_BS, positions_BS)
        normal = rms_norm(x_BSD, self.ffn_norm[...], self.epsilon)
        if hasattr(self, "moe"):
            y_BSD, decided = self.moe(normal, document_ids_BS, **routing)
            return x_BSD + y_BSD, decided
        return x_BSD + self.ffn(normal), None


class Transformer(nnx.Module):
    """Pre-norm decoder with an untied head; parameters named as in `layers/00/moe/routed/gate`."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.embedding = weight(config, (config.vocab_size, config.d_model), ("vocab", "embed"))
        self.layers = nnx.Dict({f"{i:02d}": Block(config, experts) for i, experts in enumerate(config.layer_experts)})
        self.final_norm = scale(config)
        self.head = weight(config, (config.d_model, config.vocab_size), ("embed", "vocab"))

    def __call__(
        self,
        tokens_BS: jax.Array,
        document_ids_BS: jax.Array,
        positions_BS: jax.Array,
        *,
        pool: PoolConfig | None = None,
        draws: PoolDraws | None = None,
        documents: int = 1,
        mesh: Mesh | None = None,
        implementation: str | None = None,
    ) -> tuple[jax.Array, list[Routing]]:
        """The normalised final residual stream and each mixture layer's routing.

        Args:
          tokens_BS, document_ids_BS, positions_BS: int32, the batch contract of `emo_jax.data`.
          pool, draws: document pools; None for none.
          documents: G, the largest document id.
          mesh: rows are split over its devices; None on one device.
          implementation: of `kernels.experts`; None: the default backend's best.

        Returns:
          [B, S, D] in the config's dtype, input of `logits`; one `Routing` a mixture layer.
        """
        pool = None if pool is None or pool.kind == "none" else pool
        x_BSD = self.embedding[...][tokens_BS].astype(self.config.dtype)
        routings: list[Routing] = []
        for block in self.layers.values():
            graph, state = nnx.split(block)
            context = {
                "pool": pool,
                "layer": len(routings),
                "documents": documents,
                "mesh": mesh,
                "implementation": implementation,
            }

            def run(state, x_BSD, draws, graph=graph, context=context):
                return nnx.merge(graph, state)(x_BSD, document_ids_BS, positions_BS, draws=draws, **context)

            if self.config.remat != "none":
                run = jax.checkpoint(run, policy=REMAT[self.config.remat])
            x_BSD, routing = run(state, x_BSD, draws if pool else None)
            if routing is not None:
                routings.append(routing)
        return rms_norm(x_BSD, self.final_norm[...], self.config.norm_epsilon), routings

    def logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """[B, S, V], float32 or wider, from the result of a call."""
        head_DV = self.head[...].astype(hidden_BSD.dtype)
        wide = jnp.promote_types(hidden_BSD.dtype, jnp.float32)
        return jnp.einsum("bsd,dv->bsv", hidden_BSD, head_DV, preferred_element_type=wide)

    def token_losses(self, hidden_BSD: jax.Array, targets_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy in nats and logsumexp(logits)² of every position, float32 or wider, each [B, S].

        Where the vocabulary is large, positions go through in chunks that the backward pass recomputes, so
        that [B, S, V] never exists.
        """

        def losses(hidden_BSD: jax.Array, targets_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits_BSV = self.logits(hidden_BSD)
            log_z_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
            vocabulary_11V = jnp.arange(logits_BSV.shape[-1], dtype=targets_BS.dtype).reshape(1, 1, -1)
            # A masked sum instead of a gather, whose transpose would scatter into [B, S, V].
            target_BS = jnp.where(targets_BS[..., None] == vocabulary_11V, logits_BSV, 0).sum(-1)
            return log_z_BS - target_BS, jnp.square(log_z_BS)

        rows, length = targets_BS.shape
        chunks = 1
        while length % (2 * chunks) == 0 and length // chunks * self.config.vocab_size > MAX_LOGITS:
            chunks *= 2
        if chunks == 1:
            return losses(hidden_BSD, targets_BS)

        def split(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(rows, chunks, -1, *x.shape[2:]), 1, 0)

        parts = jax.lax.map(jax.checkpoint(lambda args: losses(*args)), (split(hidden_BSD), split(targets_BS)))
        loss_BS, z_BS = (jnp.moveaxis(part, 0, 1).reshape(rows, length) for part in parts)
        return loss_BS, z_BS

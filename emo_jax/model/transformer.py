"""The decoder: embedding, blocks of attention and feed-forward, head.

Letters: B rows, S sequence, D model, V vocabulary, G documents a row, L mixture layers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from emo_jax.model.attention import Attention, KeyValues, Past
from emo_jax.model.config import ModelConfig, PoolConfig
from emo_jax.model.layers import FeedForward, rms_norm, scale, weight
from emo_jax.model.moe import MixtureOfExperts
from emo_jax.model.remat import REMAT
from emo_jax.model.routing import Kept, PoolDraws, Routing
from emo_jax.parallel import MeshConfig, lookup


class Block(nnx.Module):
    """h = x + Attention(norm(x)); y = h + FeedForward(norm(h)); the feed-forward dense or a mixture.

    With norms placed `post`: h = x + norm(Attention(x)); y = h + norm(FeedForward(h)).
    """

    def __init__(self, config: ModelConfig, experts: int, always_active: tuple[int, ...] = ()):
        self.epsilon, self.post = config.norm_epsilon, config.norm_placement == "post"
        self.attention_norm = scale(config)
        self.attention = Attention(config)
        self.ffn_norm = scale(config)
        if experts:
            self.moe = MixtureOfExperts(config, experts - config.num_shared_experts, always_active)
        else:
            self.ffn = FeedForward(config, config.d_dense)

    def __call__(
        self,
        x_BSD: jax.Array,
        document_ids_BS: jax.Array,
        positions_BS: jax.Array,
        past: Past | None = None,
        mesh: Mesh | None = None,
        **routing: Any,
    ) -> tuple[jax.Array, Routing | None, KeyValues]:
        """The residual stream after this block, its routing (None where dense), and what later tokens attend to."""
        x_BSD, read_BSD, seen = self.attend(x_BSD, document_ids_BS, positions_BS, past, mesh)
        decided = None
        if hasattr(self, "moe"):
            y_BSD, decided = self.moe(read_BSD, document_ids_BS, mesh=mesh, **routing)
        else:
            with jax.named_scope("dense"):
                y_BSD = self.ffn(read_BSD, mesh)
        return x_BSD + self._norm(y_BSD, self.ffn_norm, self.post), decided, seen

    def attend(
        self,
        x_BSD: jax.Array,
        document_ids_BS: jax.Array,
        positions_BS: jax.Array,
        past: Past | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[jax.Array, jax.Array, KeyValues]:
        """The residual stream after attention, what the feed-forward reads of it, and what later tokens attend to."""
        read_BSD = self._norm(x_BSD, self.attention_norm, not self.post)
        with jax.named_scope("attention"):
            y_BSD, seen = self.attention(read_BSD, document_ids_BS, positions_BS, past, mesh)
        x_BSD = x_BSD + self._norm(y_BSD, self.attention_norm, self.post)
        return x_BSD, self._norm(x_BSD, self.ffn_norm, not self.post), seen

    def _norm(self, x_BSD: jax.Array, scale: nnx.Param, here: bool) -> jax.Array:
        return rms_norm(x_BSD, scale[...], self.epsilon) if here else x_BSD


@jax.custom_vjp
def _gradients_together(x_BSD: jax.Array, state: nnx.State) -> tuple[jax.Array, nnx.State]:
    """Both as they are. In the backward pass neither gradient goes on before the other is there.

    So a layer's gradients are scattered before the layer below begins; a compiler may put them off to the end, whole.
    """
    return x_BSD, state


_gradients_together.defvjp(lambda *both: (both, None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


class Transformer(nnx.Module):
    """Pre-norm decoder with an untied head; parameters named as in `layers/00/moe/routed/gate`."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.embedding = weight(config, (config.vocab_size, config.d_model), ("vocab", "embed"))
        blocks, mixtures = {}, 0
        for i, experts in enumerate(config.layer_experts):
            blocks[f"{i:02d}"] = Block(config, experts, config.always_active(mixtures) if experts else ())
            mixtures += experts > 0
        self.layers = nnx.Dict(blocks)
        self.final_norm = scale(config)
        self.head = weight(config, (config.d_model, config.vocab_size), ("embed", "vocab"))

    def __call__(
        self, tokens_BS: jax.Array, document_ids_BS: jax.Array, positions_BS: jax.Array, **options: Any
    ) -> tuple[jax.Array, list[Routing]]:
        """`extend` without what decoding needs: the final residual stream, normalised, and routings."""
        return self.extend(tokens_BS, document_ids_BS, positions_BS, **options)[:2]

    def extend(
        self,
        tokens_BS: jax.Array,
        document_ids_BS: jax.Array,
        positions_BS: jax.Array,
        *,
        past: Sequence[Past] | None = None,
        pool: PoolConfig | None = None,
        draws: PoolDraws | None = None,
        voters_BS: jax.Array | None = None,
        documents: int = 1,
        mesh: Mesh | None = None,
        exchange: MeshConfig | None = None,
        implementation: str | None = None,
        kept: Sequence[Kept] | None = None,
    ) -> tuple[jax.Array, list[Routing], list[KeyValues]]:
        """Whole rows of tokens or, with a past, the next token of each row.

        Args:
          tokens_BS, document_ids_BS, positions_BS: int32, the batch contract of `emo_jax.data`.
          past: one a layer; S is 1 then.
          pool, draws: document pools; None for none.
          voters_BS: bool, the tokens whose router probabilities choose the pools; None: all of a document.
          documents: G, the largest document id.
          mesh: tokens are split over its devices, whose platform chooses how they attend; None: the default device.
          exchange: how tokens reach experts on other devices of it; None: by default.
          implementation: of `kernels.experts`; None: the default backend's best.
          kept: the subset of experts in each mixture layer; None: all.

        Returns:
          [B, S, D] in the config's dtype, input of `logits`; one `Routing` a mixture layer; what later tokens attend
          to, one a layer (the cache of `past`, where there is one, with this token's).
        """
        pool = None if pool is None or pool.kind == "none" else pool
        with jax.named_scope("embedding"):
            x_BSD = lookup(self.embedding[...], tokens_BS, self.config.dtype, mesh)
        routings: list[Routing] = []
        seen: list[KeyValues] = []
        graphs, states = zip(*(nnx.split(block) for block in self.layers.values()), strict=True)
        states, spread = list(states), mesh is not None and mesh.size > 1
        for i, graph in enumerate(graphs):
            if spread:
                x_BSD, states[i] = _gradients_together(x_BSD, states[i])
            if spread and i + 1 < len(states):
                # A layer's weights are gathered while the layer before it computes, and not all before the first.
                states[i + 1], _ = jax.lax.optimization_barrier((states[i + 1], x_BSD))
            context = {
                "pool": pool,
                "past": past[len(seen)] if past is not None else None,
                "layer": len(routings),
                "voters_BS": voters_BS,
                "documents": documents,
                "mesh": mesh,
                "exchange": exchange,
                "implementation": implementation,
                "kept": kept[len(routings)] if kept is not None else None,
            }

            def run(state, x_BSD, draws, graph=graph, context=context, name=f"layer_{i:02d}"):
                with jax.named_scope(name):  # for profiles, and for plans of what a step holds
                    return nnx.merge(graph, state)(x_BSD, document_ids_BS, positions_BS, draws=draws, **context)

            if self.config.remat != "none" or spread:
                run = jax.checkpoint(run, policy=REMAT[self.config.remat])
            x_BSD, routing, own = run(states[i], x_BSD, draws if pool else None)
            seen.append(own)
            if routing is not None:
                routings.append(routing)
        return rms_norm(x_BSD, self.final_norm[...], self.config.norm_epsilon), routings, seen

    def logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """[B, S, V], float32 or wider, from the result of a call."""
        head_DV = self.head[...].astype(hidden_BSD.dtype)
        wide = jnp.promote_types(hidden_BSD.dtype, jnp.float32)
        return jnp.einsum("bsd,dv->bsv", hidden_BSD, head_DV, preferred_element_type=wide)

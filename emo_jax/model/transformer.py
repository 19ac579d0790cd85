"""The transformer: embedding, blocks of attention and feed-forward, head.

Letters: B rows, S sequence, D model, V vocabulary, G documents a row, L mixture layers.
"""

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from emo_jax.errors import require
from emo_jax.model.attention import Attention, KeyValues, Past
from emo_jax.model.config import ModelConfig, PoolConfig
from emo_jax.model.emergent import EmergentExperts
from emo_jax.model.layers import FeedForward, add_norm, apply_norm, vector, weight
from emo_jax.model.moe import MixtureOfExperts
from emo_jax.model.remat import REMAT
from emo_jax.model.routing import Kept, PoolDraws, Routing
from emo_jax.parallel import MeshConfig, lookup


class Block(nnx.Module):
    """h = x + Attention(norm(x)); y = h + FeedForward(norm(h)); the feed-forward dense, split or a mixture.

    With norms placed `post`: h = x + norm(Attention(x)); y = h + norm(FeedForward(h)). On the `sum`:
    h = norm(x + Attention(x)); y = norm(h + FeedForward(h)).
    """

    def __init__(self, config: ModelConfig, layer: int):
        self.epsilon, self.placement = config.norm_epsilon, config.norm_placement
        add_norm(self, config, "attention_norm")
        self.attention = Attention(config)
        add_norm(self, config, "ffn_norm")
        experts = config.layer_experts[layer]
        self.routes = experts > 0 or layer in config.split_layers
        if experts:
            mixtures = sum(count > 0 for count in config.layer_experts[:layer])
            self.moe = MixtureOfExperts(config, experts - config.num_shared_experts, config.always_active(mixtures))
        else:
            self.ffn = EmergentExperts(config, layer) if self.routes else FeedForward(config, config.d_dense)

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
        if self.routes:
            y_BSD, decided = self.routed(read_BSD, document_ids_BS, mesh=mesh, **routing)
        else:
            with jax.named_scope("dense"):
                y_BSD = self.ffn(read_BSD, mesh)
        return self._added(x_BSD, y_BSD, "ffn_norm"), decided, seen

    @property
    def routed(self) -> MixtureOfExperts | EmergentExperts:
        """The feed-forward of a block that routes tokens."""
        return getattr(self, "moe", None) or cast("EmergentExperts", self.ffn)

    def attend(
        self,
        x_BSD: jax.Array,
        document_ids_BS: jax.Array,
        positions_BS: jax.Array,
        past: Past | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[jax.Array, jax.Array, KeyValues]:
        """The residual stream after attention, what the feed-forward reads of it, and what later tokens attend to."""
        read_BSD = self._norm(x_BSD, "attention_norm", self.placement == "pre")
        with jax.named_scope("attention"):
            y_BSD, seen = self.attention(read_BSD, document_ids_BS, positions_BS, past, mesh)
        x_BSD = self._added(x_BSD, y_BSD, "attention_norm")
        return x_BSD, self._norm(x_BSD, "ffn_norm", self.placement == "pre"), seen

    def _added(self, x_BSD: jax.Array, y_BSD: jax.Array, norm: str) -> jax.Array:
        """The residual stream with a layer's output."""
        x_BSD += self._norm(y_BSD, norm, self.placement == "post")
        return self._norm(x_BSD, norm, self.placement == "sum")

    def _norm(self, x_BSD: jax.Array, name: str, here: bool) -> jax.Array:
        return apply_norm(self, name, x_BSD, self.epsilon) if here else x_BSD


@jax.custom_vjp
def _gradients_together(x_BSD: jax.Array, state: nnx.State) -> tuple[jax.Array, nnx.State]:
    """Both as they are. In the backward pass neither gradient goes on before the other is there.

    So a layer's gradients are scattered before the layer below begins; a compiler may put them off to the end, whole.
    """
    return x_BSD, state


_gradients_together.defvjp(lambda *both: (both, None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


class Transformer(nnx.Module):
    """Blocks between an embedding and a head; parameters named as in `layers/00/moe/routed/gate`."""

    def __init__(self, config: ModelConfig):
        self.config = config
        d = config.d_model
        self.embedding = weight(config, (config.vocab_size, d), ("vocab", "embed"))
        if config.positions == "learned":
            self.position_embedding = weight(config, (config.max_positions, d), ("vocab", "embed"))
        if config.token_types:
            self.token_type_embedding = weight(config, (config.token_types, d), ("vocab", "embed"))
        self.layers = nnx.Dict({f"{i:02d}": Block(config, i) for i in range(config.num_layers)})
        add_norm(self, config, "embedding_norm" if config.norm_placement == "sum" else "final_norm")
        if config.labels:
            if not config.causal:
                self.pooler = weight(config, (d, d), ("embed", "head"))
                self.pooler_bias = vector(config)
            self.classifier = weight(config, (d, len(config.labels)), ("embed", "head"))
            if config.biases and not config.causal:
                self.classifier_bias = vector(config, len(config.labels))
        elif config.causal and not config.tied_embeddings:  # an encoder predicts no token
            self.head = weight(config, (d, config.vocab_size), ("embed", "vocab"))

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
        token_types_BS: jax.Array | None = None,
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
          token_types_BS: int32, which part of its document a token is of; None: all of the first.

        Returns:
          [B, S, D] in the config's dtype, input of `readout`; one `Routing` a mixture layer; what later tokens attend
          to, one a layer (the cache of `past`, where there is one, with this token's).
        """
        pool = None if pool is None or pool.kind == "none" else pool
        if pool is None and draws is not None:
            draws = draws._replace(size_BLG=None, seed_BLG=None)
        with jax.named_scope("embedding"):
            x_BSD = self.embedded(tokens_BS, positions_BS, token_types_BS, mesh)
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
            x_BSD, routing, own = run(states[i], x_BSD, draws)
            seen.append(own)
            if routing is not None:
                routings.append(routing)
        if self.config.norm_placement != "sum":
            x_BSD = apply_norm(self, "final_norm", x_BSD, self.config.norm_epsilon)
        return x_BSD, routings, seen

    def embedded(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        token_types_BS: jax.Array | None = None,
        mesh: Mesh | None = None,
    ) -> jax.Array:
        """What the first block reads, [B, S, D]; arguments as in `extend`."""
        dtype = self.config.dtype
        x_BSD = lookup(self.embedding[...], tokens_BS, dtype, mesh)
        if self.config.positions == "learned":
            x_BSD += lookup(self.position_embedding[...], positions_BS, dtype, mesh)
        if self.config.token_types:
            types_BS = jnp.zeros_like(tokens_BS) if token_types_BS is None else token_types_BS
            x_BSD += lookup(self.token_type_embedding[...], types_BS, dtype, mesh)
        if self.config.norm_placement == "sum":
            x_BSD = apply_norm(self, "embedding_norm", x_BSD, self.config.norm_epsilon)
        return x_BSD

    def readout(self, hidden_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features [B, S, D] and the head [D, V] whose product are the logits, from the result of a call.

        Of a classifier V is its labels, and the logits of a document are those of the token that its label stands at:
        its first in an encoder, its last in a decoder. A bias is one more feature, 1 everywhere.

        Raises:
          UserError: an encoder without labels has no head.
        """
        require(
            self.config.causal or bool(self.config.labels),
            "The model is an encoder without a head (model.causal=False, model.labels=()): fine-tune it on texts with "
            "labels (emo_jax.finetune).",
        )
        if not self.config.labels:
            return hidden_BSD, self.embedding[...].T if self.config.tied_embeddings else self.head[...]
        head_DV = self.classifier[...]
        if hasattr(self, "pooler"):
            wide = jnp.promote_types(hidden_BSD.dtype, jnp.float32)
            pooled_BSD = jnp.einsum("bsd,de->bse", hidden_BSD, self.pooler[...].astype(hidden_BSD.dtype))
            bias_11D = self.pooler_bias[...].reshape(1, 1, -1)
            hidden_BSD = jnp.tanh(pooled_BSD.astype(wide) + bias_11D).astype(hidden_BSD.dtype)
        if hasattr(self, "classifier_bias"):
            ones_BS1 = jnp.ones((*hidden_BSD.shape[:2], 1), hidden_BSD.dtype)
            hidden_BSD = jnp.concatenate([hidden_BSD, ones_BS1], axis=-1)
            head_DV = jnp.concatenate([head_DV, self.classifier_bias[...].reshape(1, -1)])
        return hidden_BSD, head_DV

    def logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """[B, S, V], float32 or wider, from the result of a call."""
        features_BSD, head_DV = self.readout(hidden_BSD)
        wide = jnp.promote_types(hidden_BSD.dtype, jnp.float32)
        return jnp.einsum("bsd,dv->bsv", features_BSD, head_DV.astype(hidden_BSD.dtype), preferred_element_type=wide)

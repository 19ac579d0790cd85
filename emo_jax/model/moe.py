"""A mixture layer: the router, its routed experts, and the shared ones as a dense feed-forward.

Letters: B rows, S sequence, D model, R routed experts, F expert hidden, G documents a row, C choices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from emo_jax.kernels.experts import best_implementation, expert_norms, routed_experts
from emo_jax.kernels.routing import default_implementation
from emo_jax.model.config import ModelConfig, PoolConfig
from emo_jax.model.layers import FeedForward, weight
from emo_jax.model.routing import Kept, PoolDraws, Routing, route
from emo_jax.parallel import TOKENS, MeshConfig, map_experts, product


class RoutedExperts(nnx.Module):
    """Weights of the R routed experts, stacked."""

    def __init__(self, config: ModelConfig, experts: int):
        d, f = config.d_model, config.d_expert
        self.gate = weight(config, (experts, d, f), ("routed", "embed", "mlp"))
        self.up = weight(config, (experts, d, f), ("routed", "embed", "mlp"))
        self.down = weight(config, (experts, f, d), ("routed", "mlp", "embed"))


class MixtureOfExperts(nnx.Module):
    """y = Σ_chosen w · Expert(x) + Σ_shared Expert(x) (paper section 2)."""

    def __init__(self, config: ModelConfig, experts: int, always_active: tuple[int, ...] = ()):
        self.config, self.always_active = config, always_active
        self.router = weight(config, (config.d_model, experts), ("embed", "expert"))
        self.routed = RoutedExperts(config, experts)
        if config.num_shared_experts:
            self.shared = FeedForward(config, config.num_shared_experts * config.d_expert)

    def router_logits(self, x_BSD: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """z, [B, S, R], float32 or wider."""
        wide = jnp.promote_types(x_BSD.dtype, jnp.float32)
        # The default float32 product is bfloat16 on TPU and TF32 on GPU, and flips choices.
        router = self.router[...]
        return product("bsd,dr->bsr", x_BSD.astype(wide), router, ("embed", "expert"), mesh, precision="highest")

    def __call__(
        self,
        x_BSD: jax.Array,
        document_ids_BS: jax.Array,
        *,
        pool: PoolConfig | None = None,
        draws: PoolDraws | None = None,
        voters_BS: jax.Array | None = None,
        layer: int = 0,
        documents: int = 1,
        mesh: Mesh | None = None,
        exchange: MeshConfig | None = None,
        implementation: str | None = None,
        kept: Kept | None = None,
    ) -> tuple[jax.Array, Routing]:
        """The layer's output [B, S, D], 0 for tokens of document 0, and its routing.

        Args:
          x_BSD: normalised input.
          document_ids_BS: int32, 0..G.
          pool, draws: document pools, or None for none.
          voters_BS: bool, the tokens that choose them; None: all of a document.
          layer: this layer's place among the mixture layers, for `draws`.
          documents: G.
          mesh: where tokens are split over devices; each dispatches its own.
          exchange: how they reach experts on other devices; None: by default.
          implementation: of `kernels.experts`.
          kept: a subset of the experts, or None for all.
        """
        with jax.named_scope("router"):
            decide = functools.partial(
                route,
                choices=self.config.num_choices,
                normalize=self.config.normalize_top_k,
                pool=pool,
                documents=documents,
                always_active=self.always_active,
            )
            draw: dict[str, Any] = {} if draws is None else draws.pools(layer)
            logits_BSR = self.router_logits(x_BSD, mesh)
            if voters_BS is None and kept is None:
                routing = _by_rows(decide, mesh)(logits_BSR, document_ids_BS, **draw)
            else:
                routing = decide(logits_BSR, document_ids_BS, voters_BS=voters_BS, kept=kept, **draw)

        weights = [w[...] for w in (self.routed.gate, self.routed.up, self.routed.down)]
        implementation = implementation or best_implementation(document_ids_BS.size)
        if implementation != "streamed":  # which converts no more than it reads
            weights = [w.astype(x_BSD.dtype) for w in weights]
        compute = functools.partial(routed_experts, implementation=implementation)
        dispatched = self.config.remat in ("none", "exchange")
        run = map_experts(compute, mesh, exchange or MeshConfig(), keep_dispatched=dispatched)
        with jax.named_scope("experts"):
            y_BSD, load = run(x_BSD, routing.indices_BSC, routing.weights_BSC, *weights)
        if self.config.num_shared_experts:
            with jax.named_scope("shared"):
                y_BSD += jnp.where(document_ids_BS[..., None] > 0, self.shared(x_BSD, mesh), 0)
        return y_BSD, routing._replace(load_NC=load)

    def choice_weights(self, routing: Routing) -> jax.Array:
        """The weight of each choice's expert, [B, S, C]."""
        return routing.weights_BSC

    def expert_norms(self, x_BSD: jax.Array, indices_BSC: jax.Array) -> jax.Array:
        """‖Expert(x)‖₂ of the chosen experts: [B, S, C], float32 or wider."""
        weights = [w[...].astype(x_BSD.dtype) for w in (self.routed.gate, self.routed.up, self.routed.down)]
        flat_TD, indices_TC = x_BSD.reshape(-1, x_BSD.shape[-1]), indices_BSC.reshape(-1, indices_BSC.shape[-1])
        return expert_norms(flat_TD, indices_TC, *weights).reshape(indices_BSC.shape)


def _by_rows(decide: Callable[..., Routing], mesh: Mesh | None) -> Callable[..., Routing]:
    """On TPUs with whole rows, `decide` by a kernel, each device for its own rows; else itself, for the compiler."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    implementation = default_implementation(platform)
    if implementation == "xla" or (mesh is not None and mesh.shape["context"] > 1):
        return decide
    decide = functools.partial(decide, implementation=implementation)
    if mesh is None or mesh.size == 1:
        return decide

    def mapped(logits_BSR: jax.Array, document_ids_BS: jax.Array, **draw: jax.Array) -> Routing:
        def local(logits_BSR: jax.Array, document_ids_BS: jax.Array, draw: dict[str, jax.Array]) -> Routing:
            return decide(logits_BSR, document_ids_BS, **draw)

        # check_vma, of which the kernel knows nothing, guards what devices share: here all that goes in and comes out
        # is of single rows, the totals too, so no value and no gradient is a sum over devices.
        rows = PartitionSpec(TOKENS[0])
        run = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        return run(logits_BSR, document_ids_BS, draw)

    return mapped

"""A dense feed-forward split into emergent experts: blocks of its own neurons, of which a token uses some.

EMoE (arXiv 2310.10908, section 3), and two relatives that learn a gate: EMoE-L, and GMoE, whose experts are copies.

Every neuron is computed, and those of experts that a token does not use are multiplied by 0: an expert is a few dozen
neurons wide, and products so narrow, of tokens sorted by expert, take longer than the ones they save (BUILD_NOTES.md).

Letters: B rows, S sequence, D model, F hidden, N experts (R in routing), C choices, P width of the cosine gate.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from emo_jax.model.config import ModelConfig, PoolConfig
from emo_jax.model.layers import FeedForward, vector, weight
from emo_jax.model.routing import Kept, PoolDraws, Routing, route
from emo_jax.parallel import MeshConfig, product

COSINE_WIDTH = 256
"""P, at most D: what the public EMoE code compares tokens and experts in."""
COSINE_SCALE = (np.log(2), np.log(100))
"""Logarithms of the factor of the cosines, to begin with and at most (the public code)."""


class EmergentExperts(FeedForward):
    """y = down(act(x) ⊙ m), m the weight of each neuron's expert: 1 or 0 with the average-key gate (hard combine).

    Neurons lie expert by expert; `order` says which neuron of the dense layer each was. So with all experts used the
    layer computes what the dense one does, and a merge only puts neurons back where they were. The second layer's bias
    is added once: the paper gives each of a token's C experts 1/C of it.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, config.feed_forward_width(layer))
        self.config = config
        if not config.split_copies:
            self.order = nnx.Param(jnp.zeros(config.d_dense, jnp.int32), out_sharding=("norm",))
        if config.split_gate == "cosine":
            width = min(COSINE_WIDTH, config.d_model)
            self.gate_projection = weight(config, (config.d_model, width), ("embed", "head"))
            self.gate_experts = weight(config, (width, config.split_experts), ("head", "expert"))
            self.gate_scale = vector(config, 1)

    def router_logits(self, x_BSD: jax.Array, mesh: Mesh | None = None) -> jax.Array:
        """Scores of the experts [B, S, N], float32 or wider.

        With the average-key gate x · the mean of the expert's first weights (the paper's avg-k), in which no gradient
        reaches the weights; it is made of them anew each time. With the cosine gate exp(scale) · cos(x W, expert).
        """
        wide = jnp.promote_types(x_BSD.dtype, jnp.float32)
        x_BSD, n = x_BSD.astype(wide), self.config.split_experts
        if self.config.split_gate == "average_key":
            first_DF = jax.lax.stop_gradient((self.gate if hasattr(self, "gate") else self.up)[...]).astype(wide)
            key_DN = first_DF.reshape(len(first_DF), n, -1).mean(-1)
            return product("bsd,dr->bsr", x_BSD, key_DN, ("embed", "expert"), mesh, precision="highest")
        z_BSP = product("bsd,dp->bsp", x_BSD, self.gate_projection[...], ("embed", "head"), mesh, precision="highest")
        unit_PN = _unit(self.gate_experts[...].astype(wide), axis=0)
        cosine_BSN = jnp.einsum("bsp,pr->bsr", _unit(z_BSP, axis=-1), unit_PN, precision="highest")
        return cosine_BSN * jnp.exp(jnp.minimum(self.gate_scale[...], COSINE_SCALE[1])).reshape(1, 1, 1)

    def route(self, x_BSD: jax.Array, document_ids_BS: jax.Array, mesh: Mesh | None = None, **options: Any) -> Routing:
        """Which experts tokens use; options as in `routing.route`."""
        config = self.config
        return route(
            self.router_logits(x_BSD, mesh) + options.pop("noise_BSN", 0),
            document_ids_BS,
            choices=config.split_top_k,
            normalize=config.split_gate == "cosine",
            partial=config.fewest_experts < config.split_top_k,
            **options,
        )

    def choice_weights(self, routing: Routing) -> jax.Array:
        """What the neurons of each choice's expert are multiplied by, [B, S, C]; 0 where there is no choice."""
        used_BSC = (routing.indices_BSC < self.config.split_experts).astype(routing.weights_BSC.dtype)
        if self.config.split_gate == "average_key":
            return used_BSC
        return routing.weights_BSC * (1 if self.config.split_copies else used_BSC.sum(-1, keepdims=True))

    def __call__(  # type: ignore[override]  # a dense layer routes nothing
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
        """The layer's output [B, S, D] and its routing; arguments as those of `MixtureOfExperts`.

        `exchange` and `implementation`, of dispatched experts, are not used: these stay where they are.
        """
        del exchange, implementation
        options: dict[str, Any] = {"pool": pool, "voters_BS": voters_BS, "documents": documents, "kept": kept}
        options |= {} if draws is None else draws.pools(layer)
        if draws is not None and draws.noise_BL2 is not None:
            shape = (x_BSD.shape[1], self.config.split_experts)
            options["noise_BSN"] = _normal(draws.noise_BL2[:, layer], shape) * draws.noise_scale_B[:, None, None]
        with jax.named_scope("router"):
            routing = self.route(x_BSD, document_ids_BS, mesh, **options)
        with jax.named_scope("experts"):
            hidden_BSF = self.hidden(x_BSD, mesh)
            blocks, weight_BSC = (*hidden_BSF.shape[:2], self.config.split_experts, -1), self.choice_weights(routing)
            chosen_BSCN = jax.nn.one_hot(routing.indices_BSC, blocks[2], dtype=weight_BSC.dtype)
            weight_BSN1 = (chosen_BSCN * weight_BSC[..., None]).sum(2)[..., None].astype(hidden_BSF.dtype)
            hidden_BSF = (hidden_BSF.reshape(blocks) * weight_BSN1).reshape(hidden_BSF.shape)
            return self.output(hidden_BSF, mesh), routing

    def expert_norms(self, x_BSD: jax.Array, indices_BSC: jax.Array) -> jax.Array:
        """‖Expert(x)‖₂ of the chosen experts, without the second layer's bias: [B, S, C], float32 or wider."""
        wide = jnp.promote_types(x_BSD.dtype, jnp.float32)
        n = self.config.split_experts
        hidden_BSNM = self.hidden(x_BSD).astype(wide).reshape(*x_BSD.shape[:2], n, -1)
        down_NMD = self.down[...].astype(wide).reshape(n, -1, x_BSD.shape[-1])
        gram_NMM = jnp.einsum("nmd,nkd->nmk", down_NMD, down_NMD, precision="highest")
        square_BSN = jnp.einsum("bsnm,nmk,bsnk->bsn", hidden_BSNM, gram_NMM, hidden_BSNM, precision="highest")
        norm_BSN = jnp.sqrt(jnp.maximum(square_BSN, 0))
        return jnp.take_along_axis(norm_BSN, jnp.minimum(indices_BSC, n - 1), axis=-1) * (indices_BSC < n)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    """Divided by its norm along an axis; as it is where that is 0, also in the gradient."""
    square = jnp.square(x).sum(axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _normal(key_B2: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal draws [B, *shape], float32, from each row's key data."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.wrap_key_data(key, impl="threefry2x32"), shape))(key_B2)

"""What the model is, as numbers: architecture, document pools, router losses."""

import dataclasses
from collections.abc import Sequence

from emo_jax.errors import require, require_choice

POOL_KINDS = ("none", "document", "random")
BALANCE_SCOPES = ("global", "buffer", "microbatch", "local")
NORM_PLACEMENTS = ("pre", "post")
REMAT_POLICIES = ("none", "dots", "exchange", "full")
DTYPES = ("bfloat16", "float32", "float64")


@dataclasses.dataclass
class ModelConfig:
    """A decoder-only transformer whose feed-forward layers are dense or mixtures of experts.

    E, K count shared experts, as the papers do: R = E − shared are routed, C = K − shared are chosen.
    """

    vocab_size: int = 100_352
    """V: rows of the embedding and of the (untied) head."""
    d_model: int = 2048
    """D: width of the residual stream."""
    num_layers: int = 16
    """L."""
    num_heads: int = 16
    """H: query heads; the head dimension is D / H."""
    num_kv_heads: int = 0
    """Key/value heads; 0: as many as query heads."""
    rope_theta: float = 500_000.0
    """Base of the rotary position embedding."""
    norm_epsilon: float = 1e-6
    """ε of RMSNorm."""
    norm_placement: str = "pre"
    """Where norms act: `pre`, on what attention and feed-forward read; `post`, on what they return (OLMo 2)."""
    qk_norm: bool = False
    """RMSNorm over the queries and over the keys of all heads together, before their rotation (OLMo 2, OLMoE)."""
    num_experts: int = 128
    """E: experts of a mixture layer; 0: every layer is dense."""
    num_shared_experts: int = 1
    """Experts that every token uses, with weight 1."""
    top_k: int = 8
    """K: experts a token uses, the shared ones included."""
    d_expert: int = 1024
    """F: hidden width of one expert."""
    experts_per_layer: tuple[int, ...] = ()
    """E of each layer (0: a dense layer), where they differ; empty: `num_experts` in all."""
    d_dense: int = 0
    """Hidden width of dense feed-forward layers; needed where a layer has no experts."""
    normalize_top_k: bool = False
    """Scale a token's routed weights to sum to 1 (other published mixtures do; EMO does not)."""
    always_active_experts: tuple[str, ...] = ()
    """Routed experts that every token chooses, an entry a mixture layer as in '0 5'; they count in K and keep the
    weight that the router gives them (unlike shared ones). Empty: none."""
    init_std: float = 0.02
    """Standard deviation of the initial weights, cut at three of it."""
    dtype: str = "bfloat16"
    """Of activations and matrix products; master weights are float32 (float64 with it, for verification)."""
    remat: str = "none"
    """What the backward pass finds saved of a layer. `none`: everything but gathered weights; `dots`: matrix products
    without a batch dimension; `exchange`: its input and what crossed the mesh's `expert` axis; `full`: only its input;
    each also what the router decided."""

    @property
    def head_dim(self) -> int:
        """N: width of one attention head."""
        return self.d_model // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def layer_experts(self) -> tuple[int, ...]:
        """E of each layer; 0 for a dense one."""
        return tuple(self.experts_per_layer) or (self.num_experts,) * self.num_layers

    @property
    def routed_experts(self) -> tuple[int, ...]:
        """R of each mixture layer, in order; dense layers are left out."""
        return tuple(e - self.num_shared_experts for e in self.layer_experts if e)

    @property
    def num_choices(self) -> int:
        """C: routed experts a token uses."""
        return self.top_k - self.num_shared_experts

    def always_active(self, layer: int) -> tuple[int, ...]:
        """Those of `always_active_experts` in one mixture layer."""
        return tuple(int(e) for e in self.always_active_experts[layer].split()) if self.always_active_experts else ()

    def with_routed_experts(self, counts: Sequence[int]) -> "ModelConfig":
        """The same model with other numbers of routed experts, one a mixture layer."""
        left = iter(counts)
        totals = tuple(next(left) + self.num_shared_experts if experts else 0 for experts in self.layer_experts)
        equal = len(set(totals)) == 1
        return dataclasses.replace(self, num_experts=max(totals), experts_per_layer=() if equal else totals)

    def cut(self, kept: Sequence[Sequence[int]]) -> "ModelConfig":
        """The same model with some of its routed experts, ascending, renumbered from 0; one list a mixture layer.

        Raises:
          UserError: where an always active expert is not kept.
        """
        always = []
        for layer, experts in enumerate(kept):
            for expert in self.always_active(layer):
                require(
                    expert in experts,
                    f"The subset leaves out expert {expert} of mixture layer {layer}, which every token uses "
                    "(model.always_active_experts); keep it.",
                )
            always.append(" ".join(str(list(experts).index(expert)) for expert in self.always_active(layer)))
        smaller = self.with_routed_experts([len(experts) for experts in kept])
        return dataclasses.replace(smaller, always_active_experts=tuple(always) if any(always) else ())

    def validate(self) -> None:
        """Raises `UserError` naming the first field that cannot work."""
        for name in ("vocab_size", "d_model", "num_layers", "num_heads"):
            require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1.")
        require(
            self.d_model % self.num_heads == 0 and self.head_dim % 2 == 0,
            f"model.num_heads={self.num_heads} must divide model.d_model={self.d_model} into heads of even width.",
        )
        require(
            self.num_kv_heads >= 0 and self.num_heads % self.kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads} must divide model.num_heads={self.num_heads}, or be 0.",
        )
        for name in ("rope_theta", "norm_epsilon", "init_std"):
            require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive.")
        require_choice("model.dtype", self.dtype, DTYPES)
        require_choice("model.norm_placement", self.norm_placement, NORM_PLACEMENTS)
        require_choice("model.remat", self.remat, REMAT_POLICIES)
        require(
            len(self.layer_experts) == self.num_layers,
            f"model.experts_per_layer has {len(self.experts_per_layer)} entries for "
            f"model.num_layers={self.num_layers} layers; give one a layer or none at all.",
        )
        if 0 in self.layer_experts:
            require(
                self.d_dense >= 1,
                f"model.d_dense={self.d_dense} must be at least 1: layer "
                f"{self.layer_experts.index(0)} has no experts and needs a dense feed-forward width.",
            )
        if self.routed_experts:
            require(self.num_shared_experts >= 0, f"model.num_shared_experts={self.num_shared_experts} is negative.")
            require(self.d_expert >= 1, f"model.d_expert={self.d_expert} must be at least 1.")
            require(
                self.num_choices >= 1,
                f"model.top_k={self.top_k} counts the {self.num_shared_experts} shared experts and must exceed them.",
            )
            require(
                self.num_choices <= min(self.routed_experts),
                f"model.top_k={self.top_k} asks for {self.num_choices} routed experts, but a layer has only "
                f"{min(self.routed_experts)}; lower top_k or raise the number of experts.",
            )
        self._validate_always_active()

    def _validate_always_active(self) -> None:
        if not self.always_active_experts:
            return
        require(
            len(self.always_active_experts) == len(self.routed_experts),
            f"model.always_active_experts has {len(self.always_active_experts)} entries for "
            f"{len(self.routed_experts)} mixture layers; give one a layer, as in ('0', '0'), or none at all.",
        )
        for layer, routed in enumerate(self.routed_experts):
            text = self.always_active_experts[layer]
            experts = [int(part) for part in text.split() if part.isdecimal()]
            require(
                len(set(experts)) == len(text.split()) < self.num_choices and all(e < routed for e in experts),
                f"model.always_active_experts has {text!r} for mixture layer {layer}: give different numbers of "
                f"0..{routed - 1}, fewer than the {self.num_choices} routed experts that a token uses.",
            )


@dataclasses.dataclass
class PoolConfig:
    """Which routed experts a document may use while training (paper section 3)."""

    kind: str = "document"
    """`document`: the experts its tokens ask for most (EMO). `random`: as many, drawn at random: the
    ablation that separates restricted from coherent. `none`: all of them, a standard mixture."""
    min: int = 8
    """Smallest pool; sizes are drawn uniformly from min..max, per layer and document."""
    max: int = 128
    """Largest pool; at R or more, a document uses every expert."""
    forced: int = 0
    """The last so many routed experts belong to every pool and count towards its size."""
    whole_fraction: float = 0.0
    """Share of documents that use every expert, in all layers; the others draw a size."""
    whole_step: int = 0
    """Before this step there are no such documents: experts take sides first, then learn to work without pools too."""
    start_step: int = 0
    """Before this step there are no pools: a standard mixture annealed into EMO."""
    narrowing_steps: int = 0
    """From `start_step` on, both ends of the range move linearly from all routed experts to min..max over so many
    steps; 0: at once."""

    def validate(self, model: ModelConfig) -> None:
        """Raises `UserError` naming the first field that cannot work with `model`."""
        require_choice("pool.kind", self.kind, POOL_KINDS)
        if self.kind == "none":
            return
        require(
            bool(model.routed_experts),
            f"pool.kind={self.kind!r} needs experts, but this model is dense; set pool.kind=none.",
        )
        experts = max(model.layer_experts)
        require(
            model.num_choices <= self.min <= self.max <= experts,
            f"pool.min={self.min} and pool.max={self.max} must satisfy "
            f"{model.num_choices} (routed experts a token chooses) ≤ min ≤ max ≤ {experts} (model.num_experts).",
        )
        require(
            0 <= self.forced <= self.min,
            f"pool.forced={self.forced} must lie in 0..pool.min={self.min}: forced experts count towards the pool.",
        )
        require(0 <= self.whole_fraction <= 1, f"pool.whole_fraction={self.whole_fraction} must lie in 0..1.")
        require(
            self.whole_step == 0 or self.whole_fraction > 0,
            f"pool.whole_step={self.whole_step} is when documents without pools begin, and pool.whole_fraction=0 has "
            "none; set a share, as in 0.5.",
        )
        for name in ("start_step", "narrowing_steps", "whole_step"):
            require(getattr(self, name) >= 0, f"pool.{name}={getattr(self, name)} is negative.")


@dataclasses.dataclass
class BalanceConfig:
    """Losses that keep the router healthy. Weights are totals: each mixture layer adds its share."""

    weight: float = 0.1
    """Of the balance loss; 1.0 is its value at perfect balance."""
    scope: str = "global"
    """Tokens over which load is balanced. `global`: the whole step. `buffer`: a running count over the
    step's microbatches (arXiv 2501.11873, algorithm 1). `microbatch`: each microbatch, across devices
    (the public EMO code). `local`: each group of `local_rows` rows, which the paper shows failing."""
    local_rows: int = 1
    """Rows in a group of the `local` scope."""
    router_z_weight: float = 1e-3
    """Of the mean squared log-partition of the router logits."""

    def validate(self) -> None:
        """Raises `UserError` naming the first field that cannot work."""
        require_choice("balance.scope", self.scope, BALANCE_SCOPES)
        require(self.weight >= 0, f"balance.weight={self.weight} is negative.")
        require(self.router_z_weight >= 0, f"balance.router_z_weight={self.router_z_weight} is negative.")
        require(self.local_rows >= 1, f"balance.local_rows={self.local_rows} must be at least 1.")

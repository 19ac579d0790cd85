"""What the model is, as numbers: architecture, document pools, router losses."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from emo_jax.errors import nearest_divisors, require, require_choice

POOL_KINDS = ("none", "document", "random")
BALANCE_SCOPES = ("global", "buffer", "microbatch", "local")
NORMS = ("rms", "layer")
NORM_PLACEMENTS = ("pre", "post", "sum")
POSITIONS = ("rotary", "learned")
FEED_FORWARDS = ("swiglu", "gelu", "gelu_tanh", "relu")
SPLIT_GATES = ("average_key", "cosine")
BALANCE_KINDS = ("load", "importance")
REMAT_POLICIES = ("none", "dots", "exchange", "full")
DTYPES = ("bfloat16", "float32", "float64")


@dataclasses.dataclass
class ModelConfig:
    """A transformer whose feed-forward layers are dense, split into emergent experts, or mixtures of experts.

    E, K count shared experts, as the papers do: R = E − shared are routed, C = K − shared are chosen. Each of the
    N experts of a split layer is routed.
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
    causal: bool = True
    """A token attends to itself and what is before it; false: to its whole document (encoders, such as BERT)."""
    positions: str = "rotary"
    """`rotary` embedding of queries and keys, or a `learned` vector a place, added to the token's (GPT-2, BERT)."""
    max_positions: int = 0
    """Learned positions, the longest document that can be read; 0 with rotary ones, which have no end."""
    rope_theta: float = 500_000.0
    """Base of the rotary position embedding."""
    norm: str = "rms"
    """`rms`: RMSNorm; `layer`: LayerNorm with a bias (GPT-2, BERT)."""
    norm_epsilon: float = 1e-6
    """ε of either."""
    norm_placement: str = "pre"
    """Where norms act: `pre`, on what attention and feed-forward read; `post`, on what they return (OLMo 2); `sum`, on
    the residual stream behind each of them, and behind the embedding instead of before the head (BERT)."""
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
    feed_forward: str = "swiglu"
    """Of dense layers: gated `swiglu`; or two matrices with `gelu`, its tanh form `gelu_tanh`, or `relu` between."""
    biases: bool = False
    """Attention and dense feed-forward layers add biases (GPT-2, BERT)."""
    split_layers: tuple[int, ...] = ()
    """Dense layers whose hidden neurons are split into emergent experts (arXiv 2310.10908), ascending; empty: none."""
    split_experts: int = 0
    """N: experts of a split layer, of d_dense / N neurons each."""
    split_top_k: int = 0
    """Of them, those that a token uses. N: all, or all that its document's pool or a subset leaves."""
    split_gate: str = "average_key"
    """`average_key`: experts are scored by x · the mean of their neurons' first weights, and chosen ones count fully
    (EMoE). `cosine`: a learned gate (EMoE-L), whose weights of the chosen ones sum to their number."""
    split_copies: bool = False
    """Every expert of a split layer is a whole feed-forward of width d_dense, a copy to begin with, and weights sum to
    1 (GMoE, a baseline with N times the parameters)."""
    normalize_top_k: bool = False
    """Scale a token's routed weights to sum to 1 (other published mixtures do; EMO does not)."""
    always_active_experts: tuple[str, ...] = ()
    """Routed experts that every token chooses, an entry a mixture layer as in '0 5'; they count in K and keep the
    weight that the router gives them (unlike shared ones). Empty: none."""
    token_types: int = 0
    """Vectors that tell a text's parts apart, added to its tokens'; 0: none (BERT has 2, for pairs of texts)."""
    tied_embeddings: bool = False
    """The head is the embedding."""
    labels: tuple[str, ...] = ()
    """Of a classifier of documents: what they can be; its head has an output a label. Empty: a language model."""
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
        """R of each mixture or split layer, in order; dense layers are left out."""
        if self.split_layers:
            return (self.split_experts,) * len(self.split_layers)
        return tuple(e - self.num_shared_experts for e in self.layer_experts if e)

    @property
    def routing_layers(self) -> list[int]:
        """Places of the mixture or split layers."""
        return list(self.split_layers) or [i for i, experts in enumerate(self.layer_experts) if experts]

    @property
    def shared_experts(self) -> int:
        """Shared experts of a layer with routed ones; a split layer has none."""
        return 0 if self.split_layers else self.num_shared_experts

    @property
    def num_choices(self) -> int:
        """C: routed experts a token uses."""
        return self.split_top_k if self.split_layers else self.top_k - self.num_shared_experts

    @property
    def fewest_experts(self) -> int:
        """Routed experts that a pool or a subset must leave: C, or 1 where a token uses all there are (C = N)."""
        return 1 if self.split_layers and self.split_top_k == self.split_experts else self.num_choices

    @property
    def label_fields(self) -> dict[str, Any]:
        """How texts with labels are read for this model, as fields of `DataConfig`: as `readout` reads them."""
        return {"label_at": "last" if self.causal else "first", "special_tokens": not self.causal}

    def feed_forward_width(self, layer: int) -> int:
        """Hidden width of a dense or split layer."""
        copies = self.split_experts if self.split_copies and layer in self.split_layers else 1
        return copies * self.d_dense

    def always_active(self, layer: int) -> tuple[int, ...]:
        """Those of `always_active_experts` in one mixture layer."""
        return tuple(int(e) for e in self.always_active_experts[layer].split()) if self.always_active_experts else ()

    def with_routed_experts(self, counts: Sequence[int]) -> "ModelConfig":
        """The same model with other numbers of routed experts, one a mixture layer."""
        require(
            not self.split_layers,
            "The experts of a split model (model.split_layers) are parts of one feed-forward: none can be cut out or "
            "added. Apply the subset as a mask (emo_jax.evaluate --subset, Model.apply_subset), or merge the model "
            "first (python -m emo_jax.emoe merge).",
        )
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
        rotary = self.positions == "rotary"
        require(
            self.d_model % self.num_heads == 0 and (self.head_dim % 2 == 0 or not rotary),
            f"model.num_heads={self.num_heads} must divide model.d_model={self.d_model} into heads of even width.",
        )
        require_choice("model.positions", self.positions, POSITIONS)
        require(
            self.max_positions == 0 if rotary else self.max_positions >= 1,
            f"model.max_positions={self.max_positions} with model.positions={self.positions!r}: give the number of "
            "learned positions, and 0 with rotary ones.",
        )
        require(
            self.num_kv_heads >= 0 and self.num_heads % self.kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads} must divide model.num_heads={self.num_heads}, or be 0.",
        )
        for name in ("rope_theta", "norm_epsilon", "init_std"):
            require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive.")
        require_choice("model.dtype", self.dtype, DTYPES)
        require_choice("model.norm", self.norm, NORMS)
        require_choice("model.norm_placement", self.norm_placement, NORM_PLACEMENTS)
        require(
            self.norm == "rms" or not self.qk_norm,
            "model.qk_norm=True is an RMSNorm; it does not go with model.norm='layer'.",
        )
        require_choice("model.feed_forward", self.feed_forward, FEED_FORWARDS)
        require(self.token_types >= 0, f"model.token_types={self.token_types} is negative; 0 has none.")
        require(
            len(self.labels) != 1 and len(set(self.labels)) == len(self.labels),
            f"model.labels={self.labels!r} must be at least two different names, or empty for a language model.",
        )
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
        if any(self.layer_experts):
            require(
                self.feed_forward == "swiglu" and self.causal and not self.biases,
                f"A mixture's experts are of SwiGLU, without biases and causal: it does not go with "
                f"model.feed_forward={self.feed_forward!r}, model.biases={self.biases}, model.causal={self.causal}.",
            )
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
        self._validate_split()

    def _validate_split(self) -> None:
        if not self.split_layers:
            return
        require(
            not any(self.layer_experts),
            f"model.split_layers={self.split_layers} splits dense layers, but this model has mixtures; only dense "
            "models are split.",
        )
        layers, wrong = self.split_layers, [i for i in self.split_layers if not 0 <= i < self.num_layers]
        require(
            not wrong,
            f"model.split_layers={layers} names layer {wrong[0] if wrong else ''}, which does not exist; the model's "
            f"layers are 0..{self.num_layers - 1}.",
        )
        require(
            list(layers) == sorted(set(layers)),
            f"model.split_layers={layers} must be ascending, each layer once.",
        )
        n, k = self.split_experts, self.split_top_k
        require(n >= 2, f"model.split_experts={n} must be at least 2.")
        if not self.split_copies:
            require(
                self.d_dense % n == 0,
                f"model.split_experts={n} does not divide the {self.d_dense} hidden neurons of a layer "
                f"(model.d_dense), and experts must be equal in size; try {nearest_divisors(n, self.d_dense, 2)}.",
            )
        require(
            1 <= k <= n,
            f"model.split_top_k={k} must lie in 1..{n}: a token cannot use more than the {n} experts of a split layer "
            "(model.split_experts).",
        )
        require_choice("model.split_gate", self.split_gate, SPLIT_GATES)
        require(
            self.split_gate == "cosine" or not self.split_copies,
            f"model.split_gate={self.split_gate!r} cannot tell copies of one feed-forward apart; with "
            "model.split_copies=True set model.split_gate=cosine.",
        )

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
        experts = max(model.routed_experts) + model.shared_experts
        require(
            model.fewest_experts <= self.min <= self.max <= experts,
            f"pool.min={self.min} and pool.max={self.max} must satisfy "
            f"{model.fewest_experts} (routed experts a token chooses) ≤ min ≤ max ≤ {experts} "
            f"(model.{'split_experts' if model.split_layers else 'num_experts'}).",
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
    """Of the balance loss."""
    kind: str = "load"
    """`load`: experts' shares of the choices times their mean weights, 1 at perfect balance (the papers on mixtures).
    `importance`: the squared coefficient of variation of their summed weights, 0 at perfect balance (arXiv 1701.06538,
    equation 7; what EMoE uses)."""
    gate_noise: float = 0.0
    """Gaussian noise of this standard deviation over N on the scores of the experts of split layers, in training (EMoE
    uses 1)."""
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
        require_choice("balance.kind", self.kind, BALANCE_KINDS)
        require(
            self.kind == "load" or self.scope != "buffer",
            "balance.scope='buffer' counts choices, which balance.kind='importance' does not use; use 'global'.",
        )
        require(self.gate_noise >= 0, f"balance.gate_noise={self.gate_noise} is negative; 0 is none.")
        require(self.weight >= 0, f"balance.weight={self.weight} is negative.")
        require(self.router_z_weight >= 0, f"balance.router_z_weight={self.router_z_weight} is negative.")
        require(self.local_rows >= 1, f"balance.local_rows={self.local_rows} must be at least 1.")

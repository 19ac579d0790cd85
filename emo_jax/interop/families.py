"""Published families of Hugging Face folders: what they call our config's fields and parameters, and how they lie.

Published linear weights are [out, in] and experts are separate tensors, the shared ones last in each layer's stack.
Ours are [in, out], experts stacked, shared experts one feed-forward of width s·F beside them, without router columns.

The public EMO code weights a token's s shared experts by a softmax over their own s router logits; training, and this
project, use 1 for each. With one shared expert the two agree. With more, the sum is 1 instead of s: reading divides
`down` of the shared experts by s and writing multiplies it. That is exact where their router rows are equal (we write
zeros) and impossible where they are not: such a folder is refused. Both are computed in float32 and rounded to the
tensor's precision: bit for bit invertible where s is a power of two (unless a float16 value gets subnormal), else not.

Letters: V vocabulary, D model, H query heads, K key/value heads, N head width, E experts, R routed experts,
s shared experts, F expert hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from emo_jax.errors import UserError, require
from emo_jax.model import ModelConfig


class Family(NamedTuple):
    """What tells a published architecture from the others.

    Attributes:
      architecture: the class that config.json names.
      norms: published names of a layer's norms, and ours.
      off: fields of config.json that we have nothing for, and the value that means they are not used.
      norm_placement, qk_norm: as in `ModelConfig`.
      mixture: its layers have experts.
      varied: layers may also be dense or have other numbers of experts, and experts may be shared or always active.
      tied: the head may be the embedding.
    """

    architecture: str
    norms: dict[str, str]
    off: dict[str, Any] = {}  # noqa: RUF012  (nothing writes to it)
    norm_placement: str = "pre"
    qk_norm: bool = False
    mixture: bool = False
    varied: bool = False
    tied: bool = False


_NAMED_PRE = {"pre_attention_layernorm": "attention_norm", "pre_feedforward_layernorm": "ffn_norm"}
_NAMED_POST = {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "ffn_norm"}
_NAMED_BY_PLACE = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}

FAMILIES = {
    "emo": Family(
        "EmoForCausalLM", _NAMED_PRE, {"dense_mlp_bias": False, "ghost_extend_eval": False}, mixture=True, varied=True
    ),
    "olmoe": Family("OlmoeForCausalLM", _NAMED_BY_PLACE, {"clip_qkv": None}, qk_norm=True, mixture=True),
    "llama": Family("LlamaForCausalLM", _NAMED_BY_PLACE, {"mlp_bias": False}, tied=True),
    "olmo2": Family("Olmo2ForCausalLM", _NAMED_POST, norm_placement="post", qk_norm=True),
    "olmo2_noqknorm_prenorm": Family("Olmo2NoQKNormPrenormForCausalLM", _NAMED_PRE),
}
"""By `model_type`. Of two that could hold a model, the first is written."""

_OFF = {"attention_bias": False, "quantization_config": None}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)
_REQUIRED_OF_MIXTURES = ("num_experts", "num_experts_per_tok")

_ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
_QK_NORM = {"q_norm": "query_norm", "k_norm": "key_norm"}
_FEED_FORWARD = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def family_of(values: dict[str, Any]) -> Family:
    """The family of a published config.

    Raises:
      UserError: its `model_type` is none of them.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type={kind!r} is not supported; these are: {', '.join(FAMILIES)}.")
    return FAMILIES[kind]


def is_tied(values: dict[str, Any]) -> bool:
    """The published config says that the head is the embedding, and is not stored."""
    return bool(values.get("tie_word_embeddings"))


def model_config(values: dict[str, Any]) -> ModelConfig:
    """The model that a published config describes.

    `dtype` is bfloat16 where `dtype` or `torch_dtype` there is, and float32 otherwise. Of a dense model, the fields of
    experts keep their defaults.

    Raises:
      UserError: something is missing, impossible or not supported; names the field and its value.
    """
    family = family_of(values)
    needed = (*_REQUIRED, *(_REQUIRED_OF_MIXTURES if family.mixture else ()))
    for field in (*needed, *(("num_shared_experts",) if family.varied else ())):
        value = values.get(field)
        require(value is not None, f"the field {field!r} is missing.")
        kind = float if field == "rms_norm_eps" else int
        require(
            isinstance(value, (int, kind)), f"{field}={value!r} must be {'a' if kind is float else 'a whole'} number."
        )

    for field in (*_OFF, *family.off, *(() if family.tied else ("tie_word_embeddings",))):
        if values.get(field) is not None and values[field] is not False:
            _refuse(values, field)
    if values.get("hidden_act", "silu") != "silu":
        _refuse(values, "hidden_act")
    for field in ("rope_scaling", "rope_parameters"):
        rope = values.get(field) or {}
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            _refuse(values, field)
    theta = values.get("rope_theta") or (values.get("rope_parameters") or {}).get("rope_theta")
    if theta is None:
        raise UserError("the field 'rope_theta' is missing.")
    heads = values["num_attention_heads"]
    head_dim = values["hidden_size"] // max(heads, 1)
    if values.get("head_dim") not in (None, head_dim):
        _refuse(values, "head_dim")

    config = ModelConfig(
        vocab_size=values["vocab_size"],
        d_model=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        rope_theta=float(theta),
        norm_epsilon=values["rms_norm_eps"],
        norm_placement=family.norm_placement,
        qk_norm=family.qk_norm,
        init_std=values.get("initializer_range") or ModelConfig.init_std,
        dtype="bfloat16" if (values.get("dtype") or values.get("torch_dtype")) == "bfloat16" else "float32",
        **_feed_forward_fields(values, family),
    )
    config.validate()
    return config


def _refuse(values: dict[str, Any], field: str) -> None:
    raise UserError(f"{field}={values[field]!r} is not supported yet.")


def _feed_forward_fields(values: dict[str, Any], family: Family) -> dict[str, Any]:
    """Those fields of our config that say what feed-forward layers there are."""
    layers = values["num_hidden_layers"]
    counts = (values["num_experts"] if family.mixture else 0,) * layers
    shared: tuple[int, ...] = (0,) * layers
    always: list[Any] = [()] * layers
    if family.varied:
        shared = (values["num_shared_experts"],) * layers
        if values.get("num_experts_per_layer"):
            counts = tuple(_per_layer(values, "num_experts_per_layer"))
            if values.get("num_shared_experts_per_layer"):
                shared = tuple(_per_layer(values, "num_shared_experts_per_layer"))
        if values.get("always_active_experts_per_layer"):
            always = _per_layer(values, "always_active_experts_per_layer")
        elif values.get("always_active_experts"):
            always = [values["always_active_experts"]] * layers
    mixtures = [i for i, experts in enumerate(counts) if experts]
    if not mixtures:
        width = values.get("dense_intermediate_size") if family.varied else values["intermediate_size"]
        return {"num_experts": 0, "d_dense": width or 0}

    always = [list(always[i] or ()) for i in mixtures]
    # The public code shares no expert of a layer that has always active ones.
    shared = tuple(0 if experts else shared[i] for i, experts in zip(mixtures, always, strict=True))
    if len(set(shared)) > 1 and any(always):
        raise UserError(
            f"always_active_experts_per_layer={values['always_active_experts_per_layer']!r} leaves some mixture layers "
            f"with num_shared_experts={max(shared)} shared experts instead; that is not supported. Give each such "
            "layer always active ones, or set num_shared_experts to 0."
        )
    if len(set(shared)) > 1:
        _refuse(values, "num_shared_experts_per_layer")
    if values.get("norm_topk_prob") and (shared[0] or any(always)):
        _refuse(values, "norm_topk_prob")
    return {
        "num_experts": max(counts),
        "experts_per_layer": () if len(set(counts)) == 1 else counts,
        "num_shared_experts": shared[0],
        "top_k": values["num_experts_per_tok"],
        "d_expert": values["intermediate_size"],
        "d_dense": values.get("dense_intermediate_size") or 0,
        "normalize_top_k": bool(values.get("norm_topk_prob")),
        "always_active_experts": tuple(" ".join(map(str, experts)) for experts in always) if any(always) else (),
    }


def _per_layer(values: dict[str, Any], field: str) -> list[Any]:
    layers = values["num_hidden_layers"]
    require(
        isinstance(values[field], list) and len(values[field]) == layers,
        f"{field}={values[field]!r} must have an entry for each of the num_hidden_layers={layers} layers.",
    )
    return values[field]


def family_for(config: ModelConfig, model_type: str | None = None) -> str:
    """The `model_type` that can hold such a model.

    Args:
      config: of the model.
      model_type: the one wanted; None: any.

    Raises:
      UserError: none can, or the one wanted cannot; names the field of `config` that stands in the way.
    """
    mixture = bool(config.routed_experts)
    fitting = [
        name
        for name, family in FAMILIES.items()
        if (family.norm_placement, family.qk_norm) == (config.norm_placement, config.qk_norm)
        and (family.mixture == mixture or (name == model_type and family.varied))
    ]
    wanted = "published format" if model_type is None else f"folder of model_type={model_type!r}"
    if not fitting or model_type not in (None, *fitting):
        raise UserError(
            f"No {wanted} holds a {'mixture' if mixture else 'dense model'} with model.norm_placement="
            f"{config.norm_placement!r} and model.qk_norm={config.qk_norm}."
        )
    name = model_type or fitting[0]
    if mixture and not FAMILIES[name].varied:
        for field in ("experts_per_layer", "num_shared_experts", "always_active_experts"):
            value = getattr(config, field)
            require(not value, f"No {wanted} holds a mixture with model.qk_norm=True and model.{field}={value!r}.")
    if mixture and config.normalize_top_k:
        for field in ("num_shared_experts", "always_active_experts"):
            value = getattr(config, field)
            require(
                not value, f"No {wanted} holds a model with model.normalize_top_k=True and model.{field}={value!r}."
            )
    return name


def published_fields(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The fields of config.json that follow from ours; `torch_dtype` is `config.dtype`, whatever tensors are stored in.

    Where mixture layers have different numbers of experts, lists give them and `num_experts` is the smallest; where
    all layers are alike there are no lists, which not every public loader knows.
    """
    family = FAMILIES[model_type]
    counts = config.layer_experts
    fields: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_expert if family.mixture else config.d_dense,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
    }
    if family.mixture:
        fields |= {
            "num_experts": min((e for e in counts if e), default=0),
            "num_experts_per_tok": config.top_k,
            "norm_topk_prob": config.normalize_top_k,
        }
    if family.varied:
        alike = len(set(counts)) == 1
        shared = config.num_shared_experts if any(counts) else 0
        active = [list(config.always_active(i)) for i in range(len(config.routed_experts))]
        left = iter(active)
        per_layer = [next(left) if e else [] for e in counts] if any(active) else None
        everywhere = active[0] if active and all(experts == active[0] for experts in active) else []
        fields |= {
            "num_shared_experts": shared,
            "num_experts_per_layer": None if alike else list(counts),
            "num_shared_experts_per_layer": None if alike else [shared if e else 0 for e in counts],
            "always_active_experts": everywhere or None,
            "always_active_experts_per_layer": None if everywhere else per_layer,
            "dense_intermediate_size": config.d_dense or None,
        }
    return fields


def fixed_fields(model_type: str) -> dict[str, Any]:
    """The other fields of config.json that public loaders want, the same for every model of a family."""
    family = FAMILIES[model_type]
    losses = {"output_router_logits": False, "router_aux_loss_coef": 0.01} if family.mixture else {}
    shared = {"hidden_act": "silu", "rope_scaling": None, "attention_dropout": 0.0, "use_cache": True}
    return shared | losses | {"attention_bias": False} | family.off


class Tensor(NamedTuple):
    """A published tensor and where it lies in our parameters.

    Attributes:
      name: published.
      path: of our parameter.
      view: of our parameter (a view, so that it can be written to), in the published layout.
      rows: that the published tensor has, where they are not those of `view`: a router's.
      unrouted: the last so many of them, of the shared experts, which ours has not.
      chosen: which of the others are ours; None: all.
      divisor: ours is the published value divided by it.
    """

    name: str
    path: tuple[str, ...]
    view: Callable[[np.ndarray], np.ndarray]
    rows: int = 0
    unrouted: int = 0
    chosen: tuple[int, ...] | None = None
    divisor: int = 1

    def published(self, leaf: np.ndarray, *, gradients: bool = False) -> np.ndarray:
        """The published tensor, contiguous and never a view of `leaf`; `gradients` as in `to_public_names`."""
        value = self.view(leaf)
        if self.unrouted:
            value = np.concatenate([value, np.zeros((self.unrouted, value.shape[1]), value.dtype)])
        value = np.array(value, order="C")
        return scaled(value, over=self.divisor) if gradients else scaled(value, times=self.divisor)


def scaled(value: np.ndarray, times: int = 1, over: int = 1) -> np.ndarray:
    """Returns value · times / over, computed in float32 or wider, in value's dtype."""
    if times == over:
        return value
    wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return (wide * times / over).astype(value.dtype)


def tensors(
    config: ModelConfig, family: Family, kept: Sequence[Sequence[int]] | None = None, tied: bool = False
) -> Iterator[Tensor]:
    """Every published tensor of such a model; with `kept`, those of it cut to these experts, ours renumbered.

    With `tied`, the head is a second view of the embedding's tensor.
    """
    chosen = iter(kept or ())
    yield Tensor("model.embed_tokens.weight", ("embedding",), _same)
    for i, experts in enumerate(config.layer_experts):
        here, ours = f"model.layers.{i}", ("layers", f"{i:02d}")
        for public, own in family.norms.items():
            yield Tensor(f"{here}.{public}.weight", (*ours, own), _same)
        for public, own in _ATTENTION.items():
            view = _heads_in if own == "out" else _heads_out
            yield Tensor(f"{here}.self_attn.{public}.weight", (*ours, "attention", own), view)
        for public, own in _QK_NORM.items() if family.qk_norm else ():
            yield Tensor(f"{here}.self_attn.{public}.weight", (*ours, "attention", own), _same)
        if experts:
            experts_kept = None if kept is None else tuple(next(chosen))
            yield from _mixture(f"{here}.mlp", (*ours, "moe"), experts, config, experts_kept)
        else:
            for public, own in _FEED_FORWARD.items():
                yield Tensor(f"{here}.mlp.{public}.weight", (*ours, "ffn", own), np.transpose)
    yield Tensor("model.norm.weight", ("final_norm",), _same)
    yield Tensor("model.embed_tokens.weight" if tied else "lm_head.weight", ("head",), np.transpose)


def _mixture(
    here: str, ours: tuple[str, ...], experts: int, config: ModelConfig, kept: tuple[int, ...] | None
) -> Iterator[Tensor]:
    """The tensors of one mixture layer of E experts, or of those that are kept."""
    shared, hidden = config.num_shared_experts, config.d_expert
    routed = experts - shared
    yield Tensor(f"{here}.gate.weight", (*ours, "router"), np.transpose, routed + shared, shared, kept)
    for public, own in _FEED_FORWARD.items():
        for place, e in enumerate(range(routed) if kept is None else kept):
            yield Tensor(f"{here}.experts.{e}.{public}.weight", (*ours, "routed", own), _transposed(place))
        for j in range(shared):
            name = f"{here}.experts.{routed + j}.{public}.weight"
            part = slice(j * hidden, (j + 1) * hidden)
            if own == "down":
                yield Tensor(name, (*ours, "shared", own), _transposed(part), divisor=shared)
            else:
                yield Tensor(name, (*ours, "shared", own), _transposed(slice(None), part))


def _transposed(*index: int | slice) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: w[index].T


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _heads_out(w_DHN: np.ndarray) -> np.ndarray:
    """[H·N, D]: the published layout of a projection to heads."""
    return w_DHN.reshape(w_DHN.shape[0], -1).T


def _heads_in(w_HND: np.ndarray) -> np.ndarray:
    """[D, H·N]: the published layout of the projection from heads."""
    return w_HND.reshape(-1, w_HND.shape[-1]).T

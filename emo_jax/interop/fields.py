"""config.json and our config, each as the other says it."""

from typing import Any

from emo_jax.errors import UserError, require
from emo_jax.interop.families import FAMILIES, Family, family_of
from emo_jax.model import ModelConfig


def is_classifier(values: dict[str, Any]) -> bool:
    """A published config names its family's class with labels."""
    family = family_of(values)
    return bool(family.classifier) and family.classifier in (values.get("architectures") or ())


def model_config(values: dict[str, Any]) -> ModelConfig:
    """The model that a published config describes.

    `dtype` is bfloat16 where `dtype` or `torch_dtype` there is, and float32 otherwise. Of a dense model, the fields of
    experts keep their defaults.

    Raises:
      UserError: something is missing, impossible or not supported; names the field and its value.
    """
    family = family_of(values)
    _check(values, family)
    fields = family.model | {own: values[public] for own, public in family.fields.items()}
    if family.tied is not None:
        fields["tied_embeddings"] = bool(values.get("tie_word_embeddings", family.tied))
    if family.rotary:
        fields |= _rotary_fields(values)
    config = ModelConfig(
        **fields,
        labels=_labels(values) if is_classifier(values) else (),
        init_std=values.get("initializer_range") or ModelConfig.init_std,
        dtype="bfloat16" if (values.get("dtype") or values.get("torch_dtype")) == "bfloat16" else "float32",
        **_feed_forward_fields(values, family),
    )
    config.validate()
    return config


def _check(values: dict[str, Any], family: Family) -> None:
    """Refuses what is missing, no number, or asks for what we have not."""
    needed = (*family.fields.values(), *family.required)
    for field in needed:
        require(values.get(field) is not None, f"the field {field!r} is missing.")
    for field in (*needed, family.width, "num_labels"):
        value, exact = values.get(field), field != family.fields["norm_epsilon"]
        require(
            isinstance(value, int if exact else (int, float)) or value is None,
            f"{field}={value!r} must be {'a whole' if exact else 'a'} number.",
        )
    off = {"quantization_config": None} | family.off
    if family.tied is None and family.causal:
        off["tie_word_embeddings"] = False
    for field, value in off.items():
        if values.get(field, value) not in ((value,) if value else (value, None)):
            _refuse(values, field)
    if (values.get(family.activation) or next(iter(family.activations))) not in family.activations:
        _refuse(values, family.activation)
    for name in values.get("architectures") or ():
        if "ForSequenceClassification" in name and name != family.classifier:
            _refuse(values, "architectures")


def _refuse(values: dict[str, Any], field: str) -> None:
    raise UserError(f"{field}={values[field]!r} is not supported yet.")


def _rotary_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Those fields of our config that families with rotary positions have."""
    for field in ("rope_scaling", "rope_parameters"):
        rope = values.get(field) or {}
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            _refuse(values, field)
    theta = values.get("rope_theta") or (values.get("rope_parameters") or {}).get("rope_theta")
    if theta is None:
        raise UserError("the field 'rope_theta' is missing.")
    heads = values["num_attention_heads"]
    if values.get("head_dim") not in (None, values["hidden_size"] // max(heads, 1)):
        _refuse(values, "head_dim")
    return {"rope_theta": float(theta), "num_kv_heads": values.get("num_key_value_heads") or heads}


def _labels(values: dict[str, Any]) -> tuple[str, ...]:
    """What a classifier's documents can be, in the order of their numbers."""
    if values.get("problem_type") not in (None, "single_label_classification"):
        _refuse(values, "problem_type")
    names = values.get("id2label")
    if names is None:
        names = {i: f"LABEL_{i}" for i in range(values.get("num_labels") or 2)}  # as transformers names them
    require(
        isinstance(names, dict) and len(names) > 1 and {str(key) for key in names} == {*map(str, range(len(names)))},
        f"id2label={names!r} must give two labels or more, numbered from 0.",
    )
    by_number = {str(key): str(name) for key, name in names.items()}
    return tuple(by_number[str(i)] for i in range(len(names)))


def _feed_forward_fields(values: dict[str, Any], family: Family) -> dict[str, Any]:
    """Those fields of our config that say what feed-forward layers there are."""
    layers = values[family.fields["num_layers"]]
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
        width = values.get(family.width) or 4 * values[family.fields["d_model"]]
        return {
            "num_experts": 0,
            "d_dense": values.get("dense_intermediate_size") or 0 if family.varied else width,
            "feed_forward": family.activations[values.get(family.activation) or next(iter(family.activations))],
        }

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


def published_fields(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """The fields of config.json that follow from ours; `torch_dtype` is `config.dtype`, whatever tensors are stored in.

    Where mixture layers have different numbers of experts, lists give them and `num_experts` is the smallest; where
    all layers are alike there are no lists, which not every public loader knows.
    """
    family = FAMILIES[model_type]
    counts = config.layer_experts
    names = {own: public for public, own in reversed(family.activations.items())}
    fields: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [family.class_of(config)],
        **{public: getattr(config, own) for own, public in family.fields.items()},
        family.width: config.d_expert if family.mixture else config.d_dense,
        family.activation: names[config.feed_forward],
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings or not config.causal,
        "torch_dtype": config.dtype,
    }
    if family.rotary:
        fields |= {"num_key_value_heads": config.kv_heads, "rope_theta": config.rope_theta}
    if config.labels:
        fields["id2label"] = {str(i): name for i, name in enumerate(config.labels)}
        fields["label2id"] = {name: i for i, name in enumerate(config.labels)}
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
    rotary = {"rope_scaling": None, "attention_dropout": 0.0} if family.rotary else {}
    return {"use_cache": True} | rotary | losses | family.off

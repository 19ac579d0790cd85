"""Published families of Hugging Face folders, as tables: what each calls our config's fields and our parameters.

Which can hold a model, and what stands in the way of the others, follows from the same tables. `fields` reads and
writes config.json with them, `tensors` says how published weights lie in ours.

A model of labels is the family's class for sequence classification. Of BERT the trunk and the classifier are ours; what
other classes put on the trunk (BertForMaskedLM, BertForPreTraining) is not read. So a BERT without labels is written as
BertModel without its pooler, whatever it was read from; `huggingface.missing_leaves` says how to read a pooler.
"""

import re
from typing import Any, NamedTuple

from emo_jax.errors import UserError, require
from emo_jax.model import ModelConfig


class Names(NamedTuple):
    """What a family calls its modules, and which of our parameters they are.

    A module's `weight` is that parameter and its `bias` the one of that name with `_bias`, where the model has them.
    Where several parameters are one module, they lie side by side along the last axis of its tensors.

    Attributes:
      prefix: of all names but those of heads; a folder may be without.
      trunk: modules outside the layers.
      layers: the list of layers.
      layer: modules of a layer, and the parameters' paths in it.
      heads: modules behind the trunk.
      older: patterns in names of older folders, and what is written now.
      ignored: pattern of names, without prefix, of tensors that are no part of our model.
    """

    prefix: str
    trunk: dict[str, str]
    layers: str
    layer: dict[str, str]
    heads: dict[str, str]
    older: dict[str, str] = {}  # noqa: RUF012  (nothing writes to it)
    ignored: str = ""

    def canonical(self, name: str) -> str:
        """The same for all names that a tensor may have in a folder."""
        name = name.removeprefix(self.prefix)
        for old, new in self.older.items():
            name = re.sub(old, new, name)
        return name


class Family(NamedTuple):
    """What tells a published architecture from the others.

    Attributes:
      architecture: the class that config.json names.
      names: of its tensors.
      classifier: the class with labels; empty for none.
      fields: ours that config.json must have a number for, and what they are called there.
      required: further numbers that it must have.
      width: what it calls the width of feed-forward layers; 4·D where that may be missing, and is.
      activation: what it calls the activation.
      activations: what it may be, and our `feed_forward`; the first where config.json does not say.
      off: fields of config.json that we have nothing for, and the value that means they are not used.
      model: fields of our config that all its models have, where they are not the defaults.
      tied: whether the head is the embedding where config.json does not say; None: it never is.
      mixture: its layers have experts.
      varied: layers may also be dense or have other numbers of experts, and experts may be shared or always active.
      in_out: the matrices of its layers lie as ours do, [in, out].
    """

    architecture: str
    names: Names
    classifier: str = ""
    fields: dict[str, str] = {  # noqa: RUF012
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "norm_epsilon": "rms_norm_eps",
    }
    required: tuple[str, ...] = ("intermediate_size",)
    width: str = "intermediate_size"
    activation: str = "hidden_act"
    activations: dict[str, str] = {"silu": "swiglu"}  # noqa: RUF012
    off: dict[str, Any] = {}  # noqa: RUF012
    model: dict[str, Any] = {}  # noqa: RUF012
    tied: bool | None = None
    mixture: bool = False
    varied: bool = False
    in_out: bool = False

    @property
    def causal(self) -> bool:
        """Its tokens see only those before them."""
        return self.model.get("causal", True)

    @property
    def rotary(self) -> bool:
        """Its positions are rotary."""
        return "max_positions" not in self.fields

    def class_of(self, config: ModelConfig) -> str:
        """The class that config.json names for such a model."""
        return self.classifier if config.labels else self.architecture

    def prefix(self, config: ModelConfig) -> str:
        """Of the names that are written for such a model: none of a trunk alone."""
        return self.names.prefix if config.labels or config.causal else ""


def _llama(norms: dict[str, str]) -> Names:
    """The names of Llama and its relatives, which differ in what they call the norms of a layer."""
    attention = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
    attention |= {"q_norm": "query_norm", "k_norm": "key_norm"}
    layer = norms | {f"self_attn.{public}": f"attention/{own}" for public, own in attention.items()}
    layer |= {f"mlp.{own}_proj": f"ffn/{own}" for own in ("gate", "up", "down")}
    trunk = {"embed_tokens": "embedding", "norm": "final_norm"}
    return Names("model.", trunk, "layers", layer, {"lm_head": "head", "score": "classifier"})


_NAMED_PRE = _llama({"pre_attention_layernorm": "attention_norm", "pre_feedforward_layernorm": "ffn_norm"})
_NAMED_POST = _llama({"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "ffn_norm"})
_NAMED_BY_PLACE = _llama({"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"})

_GPT2 = Names(
    prefix="transformer.",
    trunk={"wte": "embedding", "wpe": "position_embedding", "ln_f": "final_norm"},
    layers="h",
    layer={
        "ln_1": "attention_norm",
        "attn.c_attn": "attention/query attention/key attention/value",
        "attn.c_proj": "attention/out",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn/up",
        "mlp.c_proj": "ffn/down",
    },
    heads={"lm_head": "head", "score": "classifier"},
    ignored=r"h\.\d+\.attn\.(masked_)?bias",  # the causal mask
)

_BERT = Names(
    prefix="bert.",
    trunk={
        "embeddings.word_embeddings": "embedding",
        "embeddings.position_embeddings": "position_embedding",
        "embeddings.token_type_embeddings": "token_type_embedding",
        "embeddings.LayerNorm": "embedding_norm",
        "pooler.dense": "pooler",
    },
    layers="encoder.layer",
    layer={
        "attention.self.query": "attention/query",
        "attention.self.key": "attention/key",
        "attention.self.value": "attention/value",
        "attention.output.dense": "attention/out",
        "attention.output.LayerNorm": "attention_norm",
        "intermediate.dense": "ffn/up",
        "output.dense": "ffn/down",
        "output.LayerNorm": "ffn_norm",
    },
    heads={"classifier": "classifier"},
    older={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    ignored=r"cls\..*|pooler\..*|embeddings\.position_ids",  # other heads, the pooler without labels, 0, 1, 2, …
)

_MIXTURE = ("intermediate_size", "num_experts", "num_experts_per_tok")
_GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_UNBIASED = {"attention_bias": False}

FAMILIES = {
    "emo": Family(
        "EmoForCausalLM",
        _NAMED_PRE,
        required=(*_MIXTURE, "num_shared_experts"),
        off=_UNBIASED | {"dense_mlp_bias": False, "ghost_extend_eval": False},
        mixture=True,
        varied=True,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        _NAMED_BY_PLACE,
        required=_MIXTURE,
        off=_UNBIASED | {"clip_qkv": None},
        model={"qk_norm": True},
        mixture=True,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        _NAMED_BY_PLACE,
        classifier="LlamaForSequenceClassification",
        off=_UNBIASED | {"mlp_bias": False},
        tied=False,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        _NAMED_POST,
        classifier="Olmo2ForSequenceClassification",
        off=_UNBIASED,
        model={"norm_placement": "post", "qk_norm": True},
    ),
    "olmo2_noqknorm_prenorm": Family("Olmo2NoQKNormPrenormForCausalLM", _NAMED_PRE, off=_UNBIASED),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _GPT2,
        classifier="GPT2ForSequenceClassification",
        fields={
            "vocab_size": "vocab_size",
            "d_model": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "norm_epsilon": "layer_norm_epsilon",
            "max_positions": "n_positions",
        },
        required=(),
        width="n_inner",
        activation="activation_function",
        activations={"gelu_new": "gelu_tanh"} | _GELU,
        off={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
        },
        model={"norm": "layer", "positions": "learned", "biases": True},
        tied=True,
        in_out=True,
    ),
    "bert": Family(
        "BertModel",
        _BERT,
        classifier="BertForSequenceClassification",
        fields={
            "vocab_size": "vocab_size",
            "d_model": "hidden_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "norm_epsilon": "layer_norm_eps",
            "max_positions": "max_position_embeddings",
            "token_types": "type_vocab_size",
        },
        activations=_GELU,
        off={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
        model={
            "norm": "layer",
            "norm_placement": "sum",
            "positions": "learned",
            "biases": True,
            "causal": False,
            "tied_embeddings": True,
        },
    ),
}
"""By `model_type`. Of two that could hold a model, the first is written."""


def family_of(values: dict[str, Any]) -> Family:
    """The family of a published config.

    Raises:
      UserError: its `model_type` is none of them.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type={kind!r} is not supported; these are: {', '.join(FAMILIES)}.")
    return FAMILIES[kind]


def family_for(config: ModelConfig, model_type: str | None = None) -> str:
    """The `model_type` that can hold such a model.

    Args:
      config: of the model.
      model_type: the one wanted; None: any.

    Raises:
      UserError: none can, or the one wanted cannot; names the fields of `config` that stand in the way.
    """
    require(
        not config.split_layers,
        f"No published format holds a split model (model.split_layers={config.split_layers!r}); merge it first: python "
        "-m emo_jax.emoe merge.",
    )
    mixture = any(config.layer_experts)
    names = [model_type] if model_type else [name for name in FAMILIES if FAMILIES[name].mixture == mixture]
    wrong = {name: _wrong(config, FAMILIES[name]) for name in names}
    fewest = min(map(len, wrong.values()))
    nearest = [name for name in names if len(wrong[name]) == fewest]
    if fewest:
        needs = "; ".join(f"{name} would need {' and '.join(wrong[name])}" for name in nearest)
        wanted = f"folder of model_type={model_type!r}" if model_type else "published format"
        raise UserError(f"No {wanted} holds this {'mixture' if mixture else 'dense model'}: {needs}.")
    return nearest[0]


_KINDS = ("norm", "norm_placement", "qk_norm", "positions", "biases", "causal")


def _wrong(config: ModelConfig, family: Family) -> list[str]:
    """What of a model a family cannot hold: the fields as they would have to be, and as they are."""
    mixture = any(config.layer_experts)
    needed: dict[str, tuple] = {field: (family.model.get(field, getattr(ModelConfig, field)),) for field in _KINDS}
    needed["feed_forward"] = tuple(dict.fromkeys(family.activations.values()))
    if "token_types" not in family.fields:
        needed["token_types"] = (0,)
    elif not config.token_types:
        needed["token_types"] = (1, 2)
    if not family.rotary:
        needed["num_kv_heads"] = (0, config.num_heads)
    if not family.classifier:
        needed["labels"] = ((),)
    if family.tied is None and (config.causal or not config.labels):
        needed["tied_embeddings"] = (family.model.get("tied_embeddings", False),)
    if mixture and not family.varied:
        needed |= {"experts_per_layer": ((),), "num_shared_experts": (0,), "always_active_experts": ((),)}
    elif mixture and (config.num_shared_experts or config.always_active_experts):
        needed["normalize_top_k"] = (False,)
    wrong = [
        f"model.{field}={' or '.join(map(repr, values))} (it is {getattr(config, field)!r})"
        for field, values in needed.items()
        if getattr(config, field) not in values
    ]
    fits = family.mixture == mixture or family.varied
    return wrong if fits else [f"a {'mixture' if family.mixture else 'dense model'}", *wrong]

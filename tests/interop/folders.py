"""Small published folders with random weights, one for each thing that they can differ in."""

import json

import numpy as np
from safetensors.numpy import save_file

from emo_jax.interop import read_config, read_parameters

SMALL = {
    "model_type": "emo",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "num_shared_experts": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "norm_topk_prob": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_experts_per_layer": None,
    "num_shared_experts_per_layer": None,
    "dense_intermediate_size": None,
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 7,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "n_inner": None,
    "tie_word_embeddings": True,
}
BERT = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 7,
    "type_vocab_size": 2,
    "tie_word_embeddings": True,
}
"""Beside fields of SMALL, or instead of them."""
LABELS = {"id2label": {"0": "no", "2": "yes", "1": "maybe"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
A_DENSE_LAYER = {"num_experts_per_layer": [0, 5], "dense_intermediate_size": 9}

VARIANTS = {
    "one shared expert": {},
    "none shared": {"num_shared_experts": 0, "norm_topk_prob": True},
    "two shared": {"num_shared_experts": 2},
    "per layer": {"num_experts_per_layer": [4, 6], "num_shared_experts_per_layer": [1, 1]},
    "a dense layer": A_DENSE_LAYER | {"num_shared_experts_per_layer": [0, 1]},
    "rope as transformers 5 writes it": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
    "always active": {"num_shared_experts": 0, "always_active_experts": [4, 1]},
    "always active in some layers": {"num_shared_experts": 0, "always_active_experts_per_layer": [None, [2]]},
    "always active instead of shared": A_DENSE_LAYER | {"always_active_experts_per_layer": [[], [0, 3]]},
    "olmoe": {"model_type": "olmoe"},
    "olmoe normalized": {"model_type": "olmoe", "norm_topk_prob": True, "num_key_value_heads": 2},
    "llama": {"model_type": "llama"},
    "tied llama": {"model_type": "llama", "tie_word_embeddings": True},
    "olmo2": {"model_type": "olmo2"},
    "dense and pre-norm": {"model_type": "olmo2_noqknorm_prenorm"},
    "llama classifier": LABELS | {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
    "olmo2 classifier": LABELS | {"model_type": "olmo2", "architectures": ["Olmo2ForSequenceClassification"]},
    "gpt2": GPT2,
    "untied gpt2": GPT2 | {"tie_word_embeddings": False, "n_inner": 6, "activation_function": "relu"},
    "gpt2 classifier": GPT2 | LABELS | {"architectures": ["GPT2ForSequenceClassification"]},
    "bert": BERT | {"hidden_act": "gelu_new"},
    "bert classifier": BERT | LABELS | {"architectures": ["BertForSequenceClassification"]},
}

NORMS = {
    "emo": ("pre_attention_layernorm", "pre_feedforward_layernorm"),
    "olmoe": ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"),
    "olmo2_noqknorm_prenorm": ("pre_attention_layernorm", "pre_feedforward_layernorm"),
}


def expert_counts(values):
    """E of each layer, 0 where it is dense."""
    mixture = values["model_type"] in ("emo", "olmoe")
    return values["num_experts_per_layer"] or [values["num_experts"] if mixture else 0] * values["num_hidden_layers"]


def tensors_of(values, seed=0, dtype=np.float32):
    """Random tensors of such a model, by published name."""
    rng = np.random.default_rng(seed)
    shapes = {"gpt2": gpt2_shapes, "bert": bert_shapes}.get(values["model_type"], llama_shapes)(values)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def labels_of(values):
    """How many labels; 0 of a model that is no classifier."""
    classifier = "ForSequenceClassification" in "".join(values.get("architectures", ()))
    return len(values["id2label"]) if classifier else 0


def gpt2_shapes(values):
    """Shapes of a GPT-2's tensors, by published name."""
    D, V = values["n_embd"], values["vocab_size"]
    F = values["n_inner"] or 4 * D
    shapes = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (values["n_positions"], D)}
    for i in range(values["n_layer"]):
        here = f"transformer.h.{i}"
        parts = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
        for name, shape in parts.items():
            shapes |= {f"{here}.{name}.weight": shape, f"{here}.{name}.bias": shape[1:]}
        shapes |= {f"{here}.{norm}.{kind}": (D,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    shapes |= {f"transformer.ln_f.{kind}": (D,) for kind in ("weight", "bias")}
    if labels_of(values):
        shapes["score.weight"] = (labels_of(values), D)
    elif not values["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def bert_shapes(values):
    """Shapes of a BERT's tensors, by published name: of its classifier, or of its trunk without the pooler."""
    D, F, V = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    tables = {"word": V, "position": values["max_position_embeddings"], "token_type": values["type_vocab_size"]}
    shapes = {f"embeddings.{name}_embeddings.weight": (rows, D) for name, rows in tables.items()}
    norms = ["embeddings.LayerNorm"]
    linear = {}
    for i in range(values["num_hidden_layers"]):
        here = f"encoder.layer.{i}"
        linear |= {f"{here}.attention.self.{name}": (D, D) for name in ("query", "key", "value")}
        linear |= {f"{here}.attention.output.dense": (D, D)}
        linear |= {f"{here}.intermediate.dense": (F, D), f"{here}.output.dense": (D, F)}
        norms += [f"{here}.attention.output.LayerNorm", f"{here}.output.LayerNorm"]
    if labels_of(values):
        linear["pooler.dense"] = (D, D)
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {f"{norm}.{kind}": (D,) for norm in norms for kind in ("weight", "bias")}
    if not labels_of(values):
        return shapes
    heads = {"classifier.weight": (labels_of(values), D), "classifier.bias": (labels_of(values),)}
    return {f"bert.{name}": shape for name, shape in shapes.items()} | heads


def llama_shapes(values):
    """Shapes of the tensors of a Llama or a relative, by published name."""
    D, F, V = values["hidden_size"], values["intermediate_size"], values["vocab_size"]
    N = D // values["num_attention_heads"]
    K = values["num_key_value_heads"]
    shapes = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    if labels_of(values):
        shapes["score"] = (labels_of(values), D)
    elif not values["tie_word_embeddings"]:
        shapes["lm_head"] = (V, D)
    for i, E in enumerate(expert_counts(values)):
        here = f"model.layers.{i}"
        shapes |= {f"{here}.{name}": (K * N if "k_norm" in name else D,) for name in NORMS[values["model_type"]]}
        shapes |= {f"{here}.self_attn.{name}_proj": (D, D) for name in "qo"}
        shapes |= {f"{here}.self_attn.{name}_proj": (K * N, D) for name in "kv"}
        if E:
            shapes[f"{here}.mlp.gate"] = (E, D)
        for part in [f".experts.{e}" for e in range(E)] or [""]:
            hidden = F if E or values["model_type"] != "emo" else values["dense_intermediate_size"]
            shapes |= {f"{here}.mlp{part}.{name}_proj": (hidden, D) for name in ("gate", "up")}
            shapes[f"{here}.mlp{part}.down_proj"] = (D, hidden)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def zero_shared_rows(tensors, config):
    """The tensors with routers as we write them."""
    for name, value in tensors.items():
        if name.endswith("mlp.gate.weight") and config.num_shared_experts:
            value[-config.num_shared_experts :] = 0
    return tensors


def write(folder, values, tensors):
    """A folder as others publish it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


def read(folder):
    """Its config and parameters."""
    config = read_config(folder)
    return config, read_parameters(folder, config)

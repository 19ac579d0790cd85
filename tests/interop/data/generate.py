"""Makes the golden values here with PyTorch and transformers; see README.md. No test runs it.

python generate.py olmoe olmoe_normalized olmo2 llama llama_tied llama_classifier \
    gpt2 gpt2_classifier bert bert_classifier                            (transformers 5.24.0)
python generate.py emo_always_active olmo2_noqknorm_prenorm --code DIR   (transformers 4.57.1)
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
EXPERTS = COMMON | {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 12}
DENSE = COMMON | {"intermediate_size": 48}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
}
BERT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LABELS = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
LAST = 95
"""The padding of classifiers, which no text has."""

MODELS = {  # the order seeds them
    "emo_always_active": (
        "EmoForCausalLM",
        EXPERTS
        | {
            "num_hidden_layers": 3,
            "num_experts_per_tok": 4,
            "num_experts_per_layer": [0, 6, 8],
            "num_shared_experts_per_layer": [0, 1, 1],  # without effect in layers with always active experts
            "num_shared_experts": 1,
            "always_active_experts_per_layer": [[], [5, 2], [0]],
            "dense_intermediate_size": 48,
        },
    ),
    "llama": ("LlamaForCausalLM", DENSE | {"num_key_value_heads": 2}),
    "olmo2": ("Olmo2ForCausalLM", DENSE),
    "olmo2_noqknorm_prenorm": ("Olmo2NoQKNormPrenormForCausalLM", DENSE | {"num_key_value_heads": 2}),
    "olmoe": ("OlmoeForCausalLM", EXPERTS | {"num_key_value_heads": 2, "norm_topk_prob": False}),
    "olmoe_normalized": ("OlmoeForCausalLM", EXPERTS | {"norm_topk_prob": True}),
    "llama_tied": ("LlamaForCausalLM", DENSE | {"tie_word_embeddings": True}),
    "llama_classifier": ("LlamaForSequenceClassification", DENSE | LABELS | {"pad_token_id": LAST}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2_classifier": (
        "GPT2ForSequenceClassification",
        GPT2 | LABELS | {"pad_token_id": LAST, "activation_function": "gelu", "n_inner": 48},
    ),
    "bert": ("BertModel", BERT | {"hidden_act": "gelu_new"}),
    "bert_classifier": ("BertForSequenceClassification", BERT | LABELS),
}
MODULES = {"Emo": "emo", "Olmo2NoQKNormPrenorm": "olmo2_noqknorm_prenorm"}
"""Packages in --code, with the public code of the EMO release."""


def classes(name: str) -> tuple[type, type]:
    """Config and model."""
    family = name.split("For")[0].removesuffix("LMHeadModel").removesuffix("Model")
    if family in MODULES:
        module = MODULES[family]
        config = importlib.import_module(f"{module}.configuration_{module}")
        model = importlib.import_module(f"{module}.modeling_{module}")
        return getattr(config, f"{family}Config"), getattr(model, name)
    return getattr(transformers, f"{family}Config"), getattr(transformers, name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+", choices=MODELS)
    parser.add_argument("--code", default="")
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.code)
    for name in arguments.names:
        make(name, Path(__file__).parent / name)


@torch.no_grad()
def make(name: str, folder: Path) -> None:
    """One model, its weights and what it computes."""
    torch.manual_seed(list(MODELS).index(name))
    class_name, values = MODELS[name]
    config_class, model_class = classes(class_name)
    model = model_class(config_class(**values)).eval()
    for parameter, value in model.named_parameters():
        scale = "norm" in parameter.lower() or ".ln_" in parameter
        if scale and parameter.endswith("weight"):
            value.uniform_(0.5, 1.5)
        else:
            value.normal_(std=0.3)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model.config._experts_implementation = "eager"  # the default one has no float64

    tensors = {"input_ids": torch.randint(LAST if "classifier" in name else COMMON["vocab_size"], (2, 16))}
    if class_name.startswith("Bert"):
        tensors["token_type_ids"] = (torch.arange(16) >= torch.tensor([[7], [12]])).long()
    tensors |= outputs(model, tensors)
    if hasattr(model, "lm_head"):
        tensors["generated"] = generated(model, tensors["input_ids"][:, :8])
    save_file(tensors, folder / "expected.safetensors")


def outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits, or what a trunk gives instead; prints how far they are from float64."""
    names = ("logits", "last_hidden_state", "pooler_output")
    single = {key: value for key, value in model(**inputs).items() if key in names}
    double = model.double()(**inputs)
    model.float()
    for key, value in single.items():
        print(
            model.__class__.__name__, key, value.abs().max().item(), "off by", (value - double[key]).abs().max().item()
        )
    return single


def generated(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The tokens and 12 more, the likeliest each in float32 and in float64."""
    prompt = tokens.shape[1]
    for _ in range(12):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    double = model.double()(tokens).logits
    model.float()
    assert (double[:, prompt - 1 : -1].argmax(-1) == tokens[:, prompt:]).all()
    return tokens.contiguous()


if __name__ == "__main__":
    main()

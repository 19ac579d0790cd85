"""Makes the golden values here with PyTorch and transformers; see README.md. No test runs it.

python generate.py olmoe olmoe_normalized olmo2 llama                    (transformers 5.24.0)
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
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 12}
DENSE = {"intermediate_size": 48}

MODELS = {
    "olmoe": ("Olmoe", EXPERTS | {"num_key_value_heads": 2, "norm_topk_prob": False}),
    "olmoe_normalized": ("Olmoe", EXPERTS | {"norm_topk_prob": True}),
    "olmo2": ("Olmo2", DENSE),
    "llama": ("Llama", DENSE | {"num_key_value_heads": 2}),
    "emo_always_active": (
        "Emo",
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
    "olmo2_noqknorm_prenorm": ("Olmo2NoQKNormPrenorm", DENSE | {"num_key_value_heads": 2}),
}
MODULES = {"Emo": "emo", "Olmo2NoQKNormPrenorm": "olmo2_noqknorm_prenorm"}
"""Packages in --code, with the public code of the EMO release."""


def classes(name: str) -> tuple[type, type]:
    """Config and causal language model."""
    if name in MODULES:
        module = MODULES[name]
        config = importlib.import_module(f"{module}.configuration_{module}")
        model = importlib.import_module(f"{module}.modeling_{module}")
        return getattr(config, f"{name}Config"), getattr(model, f"{name}ForCausalLM")
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


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
    torch.manual_seed(sorted(MODELS).index(name))
    config_class, model_class = classes(MODELS[name][0])
    model = model_class(config_class(**(COMMON | MODELS[name][1]))).eval()
    for parameter, value in model.named_parameters():
        if "norm" in parameter:
            value.uniform_(0.5, 1.5)
        else:
            value.normal_(std=0.3)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model.config._experts_implementation = "eager"  # the default one has no float64

    input_ids = torch.randint(COMMON["vocab_size"], (2, 16))
    generated = input_ids[:, :8]
    for _ in range(12):
        generated = torch.cat([generated, model(generated).logits[:, -1:].argmax(-1)], dim=1)
    logits = model(input_ids).logits
    print(name, "largest logit", logits.abs().max().item(), "rounding", rounding(model, generated))
    tensors = {"input_ids": input_ids, "logits": logits, "generated": generated.contiguous()}
    save_file(tensors, folder / "expected.safetensors")


def rounding(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """How far float32 is from float64, which chooses the same experts and tokens then."""
    single = model(tokens).logits
    double = model.double()(tokens).logits
    model.float()
    assert (single[:, 7:-1].argmax(-1) == tokens[:, 8:]).all() and (double[:, 7:-1].argmax(-1) == tokens[:, 8:]).all()
    return (single - double).abs().max().item()


if __name__ == "__main__":
    main()

"""Tokens a second of greedy text: `python benchmarks/generation.py [--peer_python=PYTHON]`.

Prompts of 64 tokens, 64 new ones, random float32 weights, the cache's shapes compiled before. Beside it every token
computed anew from the whole row (no cache, at the small geometry alone), decoding with the implementation that training
uses (`blocked`), and transformers' OlmoeForCausalLM with its cache, where PYTHON has torch and transformers. Peers take
turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
GEOMETRIES = {
    "emo_tiny": {"vocab_size": 4096, "d_model": 64, "num_layers": 3, "num_heads": 2, "d_expert": 32, "top_k": 4},
    "width 1024": {"vocab_size": 8192, "d_model": 1024, "num_layers": 2, "num_heads": 8, "d_expert": 512, "top_k": 8},
}
PROMPT, NEW, ROUNDS = 64, 64, 3


def ours(geometry: str, experts: int, rows: int, variant: str):
    """() → seconds for `NEW` tokens of every row."""
    import jax

    from emo_jax.inference import Generator
    from emo_jax.model import ModelConfig, bind, init_parameters, moe

    config = ModelConfig(num_experts=experts, dtype="float32", **GEOMETRIES[geometry])
    params, generator = init_parameters(config, 0), Generator(config)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (rows, PROMPT))
    if variant == "blocked":
        moe.best_implementation = lambda tokens: "blocked"

    def write() -> None:
        for token_B in generator(params, prompts.tolist(), NEW):
            last = token_B
        jax.block_until_ready(last)

    if variant == "no cache":
        tokens_BS = np.concatenate([prompts, np.zeros((rows, NEW), prompts.dtype)], axis=1).astype(np.int32)

        @jax.jit
        def forward(params, tokens_BS):
            model, ones_BS = bind(config, params), jax.numpy.ones_like(tokens_BS)
            hidden_BSD, _ = model(tokens_BS, ones_BS, jax.numpy.cumsum(ones_BS, 1) - 1)
            return model.logits(hidden_BSD[:, -1:]).argmax(-1)

        def write() -> None:
            for _ in range(NEW):
                jax.block_until_ready(forward(params, tokens_BS))

    return timed(write)


def theirs(geometry: str, experts: int, rows: int):
    """The same of OlmoeForCausalLM, with as many experts a token."""
    sys.path.pop(0)  # this folder, whose files have names of packages that transformers looks for
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    shape = GEOMETRIES[geometry]
    config = OlmoeConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=shape["d_expert"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_heads"],
        num_experts=experts,
        num_experts_per_tok=shape["top_k"],
        pad_token_id=None,
        eos_token_id=None,
    )
    model = OlmoeForCausalLM(config).eval()
    tokens = torch.randint(0, shape["vocab_size"], (rows, PROMPT))
    mask = torch.ones_like(tokens)

    def write() -> None:
        with torch.no_grad():
            model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

    return timed(write)


def timed(write):
    """Warmed up."""
    write()

    def seconds() -> float:
        start = time.perf_counter()
        write()
        return time.perf_counter() - start

    return seconds


def worker(geometry: str, experts: str, rows: str, variant: str) -> None:
    """Answers each line on standard input with a time."""
    make = theirs if variant == "OlmoeForCausalLM" else ours
    arguments = (geometry, int(experts), int(rows), *([variant] if make is ours else []))
    seconds = make(*arguments)
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(seconds()), flush=True)


def main() -> None:
    """Prints a line a case, every peer's tokens a second in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer_python", help="a Python with torch and transformers")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="only this one")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(*args.worker)
    from _timing import versions

    print(versions())
    variants = {"ours": sys.executable, "blocked": sys.executable, "no cache": sys.executable}
    if args.peer_python:
        variants["OlmoeForCausalLM"] = args.peer_python
    for geometry in [args.geometry] if args.geometry else GEOMETRIES:
        for experts in (16, 128):
            for rows in (1, 8):
                print(f"{geometry}, {experts:>3} experts, {rows} rows: ", end="", flush=True)
                case = (geometry, str(experts), str(rows))
                processes = {
                    name: subprocess.Popen(
                        [python, __file__, "--worker", *case, name],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        text=True,
                        env=os.environ | HUGE_PAGES,  # as the programs start
                    )
                    for name, python in variants.items()
                    if name != "no cache" or geometry == "emo_tiny"
                }
                for process in processes.values():
                    process.stdout.readline()
                times: dict[str, list[float]] = {name: [] for name in processes}
                for _ in range(ROUNDS):
                    for name, process in processes.items():
                        process.stdin.write("\n")
                        process.stdin.flush()
                        times[name].append(json.loads(process.stdout.readline()))
                for process in processes.values():
                    process.stdin.close()
                    process.wait()
                rates = {name: rows * NEW / statistics.median(values) for name, values in times.items()}
                print(", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()), "tokens/s", flush=True)
    return None


if __name__ == "__main__":
    main()

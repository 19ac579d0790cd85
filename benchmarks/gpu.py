"""What one GPU reaches: `python benchmarks/gpu.py --out=DIR [--smoke] [--minutes=8.7] [--torch_python=PYTHON]`.

Each group of parts is a process of its own, so that a compiler that hangs cannot take the others' time, and that memory
comes back: kernels (1 copy, 2 rows to slots and back, 3 routed experts), train (5 whole steps), torch (6 the same sizes
in PyTorch, with PYTHON's torch and transformers), layer (4 pool routing, and what else a step is made of), blocked (a
formulation of 3 that may take minutes to compile).
Every number is printed, and a line of DIR/GROUP.jsonl, as soon as it is there; what fails is a line too.
--smoke runs everything at tiny sizes, on CPU too, where kernels are interpreted.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GROUPS = {"kernels": 0.28, "train": 0.3, "torch": 0.24, "layer": 0.14, "blocked": 0.04}
"""Shares of the time; what one does not need is the next one's."""
FULL = {"D": 2048, "F": 1024, "E": 128, "K": 8, "H": 16, "V": 100_352, "S": 4096, "rows": (8, 1), "copied": 2**30}
SMOKE = {"D": 128, "F": 64, "E": 8, "K": 3, "H": 2, "V": 512, "S": 128, "rows": (2, 1), "copied": 2**16}


class Report:
    """Lines of one group."""

    def __init__(self, path: Path):
        self.file = path.open("w", buffering=1)

    def __call__(self, part: str, label: str, **facts: Any) -> None:
        self.file.write(json.dumps({"part": part, "label": label} | facts) + "\n")
        shown = "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in facts.items())
        print(f"{part:8} {label:44} {shown}", flush=True)

    def attempt(self, part: str, label: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Reports what `run` returns, or why it failed."""
        try:
            facts = run()
        except Exception as error:  # whatever it is, the other parts go on
            facts = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self(part, label, **facts)
        return facts


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def prepare() -> None:
    """For JAX, before it is imported: all memory that there is, and no input pipeline where it is not installed."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    root = Path(__file__).resolve().parents[1]
    sys.path.insert(0, str(root))
    if importlib.util.find_spec("grain") is None:
        for name in ("emo_jax.data", "emo_jax.training"):  # whose modules are found, but none imported with them
            package = types.ModuleType(name)
            package.__path__ = [str(root / name.replace(".", "/"))]
            sys.modules[name] = package


def torch(size: dict[str, Any], report: Report, args: argparse.Namespace) -> None:
    """Part 6: transformers' OlmoeForCausalLM of the same sizes, all of it in bfloat16, moments too."""
    sys.path.pop(0)  # this folder, whose files have names of packages that transformers looks for
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM, __version__

    geometry = json.loads(args.geometry)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    report("6 torch", f"torch {torch.__version__}, transformers {__version__}, {name}")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=size["V"],
        hidden_size=size["D"],
        intermediate_size=size["F"],
        num_hidden_layers=geometry["layers"],
        num_attention_heads=size["H"],
        num_key_value_heads=size["H"],
        num_experts=size["E"],
        num_experts_per_tok=size["K"],
        max_position_embeddings=size["S"],
        output_router_logits=True,
        router_aux_loss_coef=0.1,
        use_cache=False,
        pad_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
    )
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = OlmoeForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    if hasattr(model, "get_experts_implementation"):
        report("6 torch", "experts", implementation=str(model.get_experts_implementation()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    settings = [(4, False), (4, True), (8, True), (2, True), (8, False)] if not args.smoke else [(2, False), (2, True)]
    for rows, compiled in settings:

        def steps(rows=rows, compiled=compiled) -> dict[str, Any]:
            torch._dynamo.reset()
            run = torch.compile(model, dynamic=False) if compiled else model
            tokens, times = torch.randint(0, size["V"], (rows, size["S"]), device=device), []
            for _ in range(4 if args.smoke else 8):
                start = time.perf_counter()
                run(input_ids=tokens, labels=tokens).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times[2:])
            facts = {"step_ms": 1e3 * seconds, "tokens_s": rows * size["S"] / seconds, "first_s": times[0]}
            if geometry.get("peak"):
                facts["mfu"] = facts["tokens_s"] * geometry["flops_per_token"] / geometry["peak"]
            if device == "cuda":
                facts["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            return facts

        report.attempt("6 torch", f"{rows} rows, {'torch.compile' if compiled else 'eager'}", steps)
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def work(group: str, size: dict[str, Any], args: argparse.Namespace) -> None:
    """One group, in a process of its own; what stops all of it is a line too."""
    report = Report(args.out / f"{group}.jsonl")
    try:
        if group == "torch":
            return torch(size, report, args)
        prepare()
        import _gpu_parts

        return getattr(_gpu_parts, group)(size, report, args)
    except Exception as error:
        report(group, "all that follows", failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise


def best(found: list[dict[str, Any]]) -> dict[str, Any]:
    return max(found, key=lambda line: line.get("tokens_s", 0.0), default={})


def failures(out: Path) -> Iterator[str]:
    for group in GROUPS:
        for line in lines(out / f"{group}.jsonl"):
            if "failed" in line:
                yield f"  {line['part']} {line['label']}: {line['failed']}"


def main() -> None:
    """Runs the groups one after another, and prints what they say of each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="where results go")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--minutes", type=float, default=8.7, help="for all of it")
    parser.add_argument("--layers", type=int, default=0, help="of the train step; 0: as fit the memory")
    parser.add_argument("--groups", default=",".join(GROUPS), help="only these")
    parser.add_argument("--torch_python", default=sys.executable, help="a Python with torch and transformers")
    parser.add_argument("--worker", choices=GROUPS, help=argparse.SUPPRESS)
    parser.add_argument("--geometry", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SMOKE if args.smoke else FULL
    if args.worker:
        return work(args.worker, size, args)

    args.out.mkdir(parents=True, exist_ok=True)
    wanted, start, share = args.groups.split(","), time.monotonic(), 0.0
    total = sum(GROUPS[group] for group in wanted)
    for group in (group for group in GROUPS if group in wanted):
        share += GROUPS[group] / total
        geometry = next((x for x in lines(args.out / "train.jsonl") if x["label"] == "geometry"), {"layers": 2})
        flags = ["--smoke"] * args.smoke + [f"--layers={args.layers}", f"--geometry={json.dumps(geometry)}"]
        python = args.torch_python if group == "torch" else sys.executable
        left = start + 60 * args.minutes * share - time.monotonic()
        print(f"== {group}, at most {left:.0f} s", flush=True)
        command = [python, __file__, f"--worker={group}", f"--out={args.out}", *flags]
        try:
            code = subprocess.run(command, timeout=max(left, 5), check=False).returncode
            print(f"== {group} ended with {code}", flush=True)
        except subprocess.TimeoutExpired:
            print(f"== {group} ran out of time; what it measured is in {args.out}", flush=True)
    ours, theirs = (best(lines(args.out / f"{group}.jsonl")) for group in ("train", "torch"))
    for name, line in (("ours", ours), ("PyTorch", theirs)):
        if "tokens_s" in line:
            print(f"{name}: {line['tokens_s']:.0f} tokens/s, MFU {line.get('mfu', float('nan')):.1%} ({line['label']})")
    if "tokens_s" in ours and "tokens_s" in theirs:
        print(f"ours / PyTorch: {ours['tokens_s'] / theirs['tokens_s']:.2f}")
    for failure in failures(args.out):
        print(failure)
    return None


if __name__ == "__main__":
    main()

"""Choosing and cutting experts at the released width: `python benchmarks/selection.py [--experts=128 --keep=32]`.

One mixture layer of configs/emo_1b14b.py with random float32 weights and a small vocabulary: statistics of some tokens,
a subset, and reading the model with all its experts and with the subset's alone. Each model is read in a process of its
own, so that its peak memory and the bytes it reads are its own.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import emo_jax
from emo_jax.model import ModelConfig, abstract_parameters
from emo_jax.modularity import calibrate, select


def model(experts: int) -> emo_jax.Model:
    """One layer, experts as wide as the released ones."""
    import jax

    config = ModelConfig(vocab_size=2048, num_layers=1, num_experts=experts, dtype="float32")
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        return rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02)

    return emo_jax.Model(config, jax.tree.map(draw, abstract_parameters(config)))


def batches(count: int, length: int) -> list[dict[str, np.ndarray]]:
    """Rows of random tokens, each one document."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 2048, (count, 1, length)).astype(np.int32)
    ones, places = np.ones((1, length), np.int32), np.arange(length, dtype=np.int32)[None]
    return [{"tokens": row, "document_ids": ones, "positions": places} for row in tokens]


def peak_memory() -> int:
    """Of this process alone, in bytes; getrusage's would include what the parent held when it started this."""
    words = Path("/proc/self/status").read_text().split()
    return 1024 * int(words[words.index("VmHWM:") + 1])


def read(folder: Path, subset: Any, answers: Any) -> None:
    """Reads a model and tells (seconds, bytes read, peak resident bytes above what importing took)."""
    before, start = peak_memory(), time.perf_counter()
    emo_jax.load(folder, subset)
    seconds = time.perf_counter() - start
    words = Path("/proc/self/io").read_text().split()
    answers.put((seconds, int(words[words.index("rchar:") + 1]), peak_memory() - before))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--keep", type=int, default=32)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    whole, rows = model(args.experts), batches(args.rows, args.length)
    calibrate(whole.config, whole.params, rows[:1])  # compiles
    start = time.perf_counter()
    calibrate(whole.config, whole.params, rows)
    seconds = time.perf_counter() - start
    tokens = args.rows * args.length
    print(f"statistics of one layer: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s")
    start = time.perf_counter()
    subset = select(whole.config, whole.params, [rows], keep=args.keep)
    print(f"{args.keep} of {args.experts} experts chosen (fingerprint included) in {time.perf_counter() - start:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        whole.save(Path(folder) / "model")
        print(f"saved in {time.perf_counter() - start:.1f} s")
        del whole
        context = multiprocessing.get_context("spawn")
        for name, chosen in (("all experts", None), (f"{args.keep} experts", subset)):
            answers = context.Queue()
            process = context.Process(target=read, args=(Path(folder) / "model", chosen, answers))
            process.start()
            taken, size, peak = answers.get()
            process.join()
            print(f"{name}: read in {taken:.1f} s, {size / 1e9:.2f} GB from disk, peak {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

"""The programs as their user runs them, and the small run that they are tried on."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from emo_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, PoolConfig, TrainConfig


def run_main(module: str, *flags: object) -> subprocess.CompletedProcess:
    """`python -m emo_jax.MODULE FLAGS`."""
    command = [sys.executable, "-m", f"emo_jax.{module}", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def small_run(texts: Path, steps: int) -> Config:
    """A few steps of a small EMO on JSON lines."""
    return Config(
        model=ModelConfig(
            vocab_size=300, d_model=16, num_layers=2, num_heads=2, num_experts=8, top_k=3, d_expert=8, dtype="float32"
        ),
        pool=PoolConfig(min=2, max=8),
        data=DataConfig(source="jsonl", path=str(texts), sequence_length=32, batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=2),
        train=TrainConfig(steps=steps, eval_every=0, checkpoint_every=steps),
    )


def write_texts(file: Path, words: dict[str, str], number: int) -> None:
    """JSON lines of texts, twelve words each, of domains that have words of their own."""
    rng, lines = np.random.default_rng(0), []
    for _ in range(number):
        domain = str(rng.choice(sorted(words)))
        lines.append({"text": " ".join(rng.choice(words[domain].split(), 12)), "domain": domain})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

"""One training step of the tiny configs, with and without huge pages: `python benchmarks/train_step.py`.

Each line is a process of its own, because the C library reads its allocator's settings once.
"""

import os
import subprocess
import sys
from pathlib import Path

CONFIGS = ("emo_tiny", "stdmoe_tiny", "dense_tiny")
ROOT = Path(__file__).resolve().parents[1]


def measure(name: str) -> None:
    """Prints the time of a step of configs/NAME.py on random documents."""
    import importlib.util

    import jax
    import numpy as np
    from _timing import median_ms

    from emo_jax.parallel import make_mesh, put_rows
    from emo_jax.training.step import init_state, make_train_step

    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = module.get_config()
    shape = (run.data.batch_size, run.data.sequence_length)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, run.model.vocab_size, shape).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "document_ids": np.sort(rng.integers(1, 4, shape), axis=1).astype(np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "loss_mask": np.ones(shape, bool),
    }
    mesh = make_mesh(run.mesh, shape[0], jax.devices()[:1])
    state, step = init_state(run, mesh), make_train_step(run, mesh)
    rows = put_rows(batch, mesh)

    def advance() -> None:
        nonlocal state
        state, metrics = step(state, rows)
        jax.block_until_ready(metrics)

    ms = median_ms(advance)
    print(f"{ms:>7.0f} ms a step  {tokens.size / ms:>6.1f}k tokens/s", flush=True)


def main() -> None:
    """Runs `measure` for each config, with and without huge pages."""
    from emo_jax.cli import HUGE_PAGES

    for name in CONFIGS:
        for label, variables in (("huge pages", HUGE_PAGES), ("default", {})):
            print(f"{name:<12} {label:<11}", end=" ", flush=True)
            kept = {key: value for key, value in os.environ.items() if key not in HUGE_PAGES}
            subprocess.run([sys.executable, __file__, name], env=kept | variables, check=True)


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()

"""A training step on CPU against its peers, all in one run: `python benchmarks/train_cpu.py [--peer_python=PYTHON]`.

Every variant is a process of its own, compiled once; they are then measured in turn, round after round, so that
a busy machine is busy for all. PYTHON has torch and transformers; without it that peer is left out.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
GEOMETRIES = {
    "emo_tiny": {"d_model": 64, "num_layers": 3, "num_heads": 2, "d_expert": 32, "vocab_size": 1024},
    "d128": {"d_model": 128, "num_layers": 4, "num_heads": 4, "d_expert": 64, "vocab_size": 2048},
}
S = 256
ROUNDS, STEPS = 7, 5
# label: (rows, experts, documents a row, most documents a row, pool, implementation, huge pages)
STEP = {
    "ours: EMO": (16, 32, 3, 16, "document", "blocked", True),
    "ours: standard mixture": (16, 32, 3, 16, "none", "blocked", True),
    "ours: EMO, default pages": (16, 32, 3, 16, "document", "blocked", False),
    "(a) every expert, einsum": (16, 32, 3, 16, "document", "reference", True),
    "(b) lax.ragged_dot": (16, 32, 3, 16, "document", "ragged", True),
}
SCALING = {
    "16 experts, 32 rows": (32, 16, 3, 16, "document", "blocked", True),
    "128 experts, 32 rows": (32, 128, 3, 16, "document", "blocked", True),
    "1 document a row": (16, 32, 1, 1, "document", "blocked", True),
    "64 documents a row": (16, 32, 64, 64, "document", "blocked", True),
}
"""These measure forward and backward only."""


class Worker:
    """A process that has compiled its step and measures it when asked."""

    def __init__(self, command: list[str], huge_pages: bool):
        """Starts it and waits until it is ready."""
        from emo_jax.cli import HUGE_PAGES

        kept = {key: value for key, value in os.environ.items() if key not in HUGE_PAGES}
        self._process = subprocess.Popen(
            command,
            env=kept | (HUGE_PAGES if huge_pages else {}) | {"JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._ask()

    def measure(self) -> float:
        """Median milliseconds of a few steps."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._ask()

    def _ask(self) -> float:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")
        return float(line)

    def stop(self) -> None:
        """Ends it."""
        self._process.stdin.close()
        self._process.wait()


def answer(advance) -> None:
    """A worker's side: warms up, then measures at each line it reads."""
    for _ in range(3):
        advance()
    print(0.0, flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            advance()
            times.append(1e3 * (time.perf_counter() - start))
        print(statistics.median(times), flush=True)


def ours(geometry: str, label: str) -> None:
    """The worker of a variant of ours: forward, backward and AdamW on random tokens."""
    import jax
    import numpy as np

    from emo_jax.config import Config, DataConfig, ModelConfig, PoolConfig
    from emo_jax.parallel import make_mesh, put_rows
    from emo_jax.training.step import init_state, make_gradients, make_train_step

    rows, experts, documents, most, pool, implementation, _ = (STEP | SCALING)[label]
    model = ModelConfig(**GEOMETRIES[geometry], num_experts=experts, top_k=4, dtype="float32")
    data = DataConfig(sequence_length=S, batch_size=rows, max_documents=most)
    run = Config(model=model, pool=PoolConfig(kind=pool, min=3, max=experts), data=data)
    run.validate()
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (rows, S)).astype(np.int32)
    ids = np.repeat(np.arange(1, documents + 1), -(-S // documents))[:S].astype(np.int32)
    positions = np.arange(S, dtype=np.int32) % -(-S // documents)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "document_ids": np.broadcast_to(ids, (rows, S)),
        "positions": np.broadcast_to(positions, (rows, S)),
        "loss_mask": np.ones((rows, S), bool),
    }
    mesh = make_mesh(run.mesh, rows, jax.devices()[:1])
    on_device = put_rows(batch, mesh)
    state = init_state(run, mesh)
    if label in SCALING:
        gradients = jax.jit(make_gradients(run, mesh, implementation))
        return answer(lambda: jax.block_until_ready(gradients(state.params, on_device, state.step)))
    step = make_train_step(run, mesh, implementation)

    def advance() -> None:
        nonlocal state
        state, metrics = step(state, on_device)
        jax.block_until_ready(metrics)

    return answer(advance)


def olmoe(geometry: str) -> None:
    """The worker of (c), transformers' OlmoeForCausalLM with fused AdamW and clipping; it knows no documents."""
    sys.path.pop(0)  # this folder, whose files have names of packages that transformers looks for
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    shape = GEOMETRIES[geometry]
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=shape["vocab_size"],
            hidden_size=shape["d_model"],
            intermediate_size=shape["d_expert"],
            num_hidden_layers=shape["num_layers"],
            num_attention_heads=shape["num_heads"],
            num_key_value_heads=shape["num_heads"],
            num_experts=32,
            num_experts_per_tok=4,
            output_router_logits=True,
            router_aux_loss_coef=0.1,
            use_cache=False,
            max_position_embeddings=S,
            pad_token_id=None,
            eos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, shape["vocab_size"], (16, S))

    def advance() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    answer(advance)


def main() -> None:
    """Measures every variant at both geometries and prints the ratios that BUILD_NOTES.md reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer_python", help="a Python with torch and transformers")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="only this one")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        geometry, label = args.worker
        return olmoe(geometry) if label == "olmoe" else ours(geometry, label)

    from _timing import versions

    print(versions())
    for geometry in [args.geometry] if args.geometry else GEOMETRIES:
        commands = {
            label: ([sys.executable, __file__, "--worker", geometry, label], variant[-1])
            for label, variant in (STEP | SCALING).items()
        }
        if args.peer_python:
            commands["(c) OlmoeForCausalLM"] = ([args.peer_python, __file__, "--worker", geometry, "olmoe"], True)
        workers = {label: Worker(*command) for label, command in commands.items()}
        rounds = [{label: worker.measure() for label, worker in workers.items()} for _ in range(ROUNDS)]
        for worker in workers.values():
            worker.stop()

        def ratio(slow: str, fast: str, rounds=rounds) -> float:
            return statistics.median(times[slow] / times[fast] for times in rounds)

        print(f"\n{geometry}: a step of 16 rows of {S} tokens, median of {ROUNDS} rounds of {STEPS}")
        for label in workers:
            if label in SCALING:
                continue
            ms = statistics.median(times[label] for times in rounds)
            print(f"  {label:<26} {ms:>7.1f} ms  {16 * S / ms:>5.1f}k tokens/s  {ratio(label, 'ours: EMO'):>5.2f}x")
        print(f"  EMO / standard mixture        {ratio('ours: EMO', 'ours: standard mixture'):.3f}")
        print(f"  128 / 16 experts, gradients   {ratio('128 experts, 32 rows', '16 experts, 32 rows'):.3f}")
        print(f"  64 / 1 documents, gradients   {ratio('64 documents a row', '1 document a row'):.3f}", flush=True)
    return None


if __name__ == "__main__":
    main()

"""A run small enough for the NumPy oracle: pools, padding, a filtered row, one-token documents, a dense layer."""

import dataclasses

import jax
import numpy as np

from emo_jax.config import (
    BalanceConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PoolConfig,
    TrainConfig,
)
from emo_jax.model import draw_pools, init_parameters
from emo_jax.parallel import put_rows

VOCABULARY, S, G = 17, 12, 4
ROWS = (
    [5, 4],  # padding at the end
    [3, 1, 8],  # a one-token document
    [12],
    [],  # a filtered row
    [1, 1, 1, 9],  # as many documents as fit
    [2, 10],
    [6, 6],
    [4, 3, 4],
)


def config(**sections) -> Config:
    """The run; `sections` replace fields, as in config(balance={"scope": "local"})."""
    made = Config(
        model=ModelConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            experts_per_layer=(8, 0, 6),
            num_shared_experts=1,
            top_k=3,
            d_expert=6,
            d_dense=10,
            init_std=0.5,
            dtype="float64",
        ),
        pool=PoolConfig(kind="document", min=2, max=8),
        balance=BalanceConfig(weight=0.1, router_z_weight=1e-3),
        data=DataConfig(source="installed_text", sequence_length=S, batch_size=len(ROWS), max_documents=G),
        optimizer=OptimizerConfig(warmup_steps=0, schedule="constant", learning_rate=1e-2),
        train=TrainConfig(steps=50, seed=3, logits_z_weight=1e-2),
        mesh=MeshConfig(data=1, fsdp=1),
    )
    for section, fields in sections.items():
        setattr(made, section, dataclasses.replace(getattr(made, section), **fields))
    made.validate()
    return made


def batch(seed: int = 0, rows=ROWS, length: int = S) -> dict[str, np.ndarray]:
    """Random tokens in documents of the given lengths, by the batch contract."""
    rng = np.random.default_rng(seed)
    made = {
        name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "targets", "document_ids", "positions")
    }
    made["loss_mask"] = np.zeros((len(rows), length), bool)
    for b, lengths in enumerate(rows):
        start = 0
        for g, length in enumerate(lengths, 1):
            tokens, part = rng.integers(0, VOCABULARY, length), slice(start, start + length)
            made["tokens"][b, part], made["document_ids"][b, part] = tokens, g
            made["positions"][b, part] = np.arange(length)
            made["targets"][b, start : start + length - 1] = tokens[1:]
            made["loss_mask"][b, start : start + length - 1] = True
            start += length
    return made


def devices_mesh(run: Config, devices: int):
    """A mesh over the first `devices` simulated devices."""
    from emo_jax.training.step import run_mesh

    return run_mesh(run, jax.devices()[:devices])


def parameters(run: Config):
    """Initial parameters, as NumPy arrays."""
    return jax.device_get(init_parameters(run.model, run.train.seed))


def draws(run: Config, step: int = 0):
    """The step's pool draws, layers first as the oracle takes them."""
    drawn = draw_pools(
        run.pool,
        run.train.seed,
        np.int32(step),
        rows=run.data.batch_size,
        layers=len(run.model.routed_experts),
        documents=run.data.max_documents,
        experts=max(run.model.routed_experts),
    )
    return drawn


def gradients(run: Config, rows: dict[str, np.ndarray], devices: int = 1, step: int = 0):
    """Gradients and metrics of one step, as NumPy arrays."""
    from emo_jax.training.step import make_gradients

    mesh = devices_mesh(run, devices)
    compute = jax.jit(make_gradients(run, mesh))
    return jax.device_get(compute(init_parameters(run.model, run.train.seed), put_rows(rows, mesh), np.int32(step)))

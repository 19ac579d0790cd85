"""A model whose layers differ, its random weights and some documents: what every test here looks at."""

import jax
import numpy as np

from emo_jax.model import ModelConfig, abstract_parameters
from tests.training import tiny


def config(**fields) -> ModelConfig:
    fields = {"experts_per_layer": (8, 0, 10), "top_k": 3, "dtype": "float64"} | fields
    return ModelConfig(
        vocab_size=tiny.VOCABULARY,
        d_model=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        num_shared_experts=1,
        d_expert=6,
        d_dense=10,
        rope_theta=100.0,
        **fields,
    )


def parameters(model: ModelConfig, seed: int = 0):
    """Random arrays, drawn without compiling anything; routers strong enough to have opinions."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        scale = 3.0 if path[-1].key == "router" else 0.5
        return rng.normal(size=leaf.shape, scale=scale)

    return jax.tree.map_with_path(draw, abstract_parameters(model))


def batches(count: int = 2):
    """Documents of several lengths, padding and an empty row included."""
    return [tiny.batch(seed) for seed in range(count)]


def logits(model: ModelConfig, params, batch, kept=None) -> np.ndarray:
    """[B, S, V] of the model, under a subset."""
    from emo_jax.model import bind

    @jax.jit
    def run(params, batch, kept):
        bound = bind(model, params)
        hidden_BSD, _ = bound(batch["tokens"], batch["document_ids"], batch["positions"], kept=kept)
        return bound.logits(hidden_BSD)

    return np.asarray(run(params, batch, kept))

"""What the parts of gpu.py that run JAX share: timing, compiling, and arrays such as a trained router sees them."""

import functools
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _timing import median_ms

from emo_jax.config import Config, MeshConfig, PoolConfig
from emo_jax.model import draw_pools
from emo_jax.model.routing import route

ROOT = Path(__file__).resolve().parents[1]
INTERPRET = jax.default_backend() == "cpu"
"""Whether our kernels are interpreted: where there is no GPU."""
DOCUMENTS = 64
"""Most documents of a row."""

Facts = dict[str, Any]
Size = dict[str, Any]


def ms(fn: Callable[..., Any], *args: Any, calls: int = 1) -> float:
    """Median milliseconds of a call, of `calls` that follow one another without waiting."""

    def several() -> Any:
        for _ in range(calls):
            result = fn(*args)
        return result

    return median_ms(several, repeats=7) / calls


def compiled(fn: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Facts]:
    """The program, how long it took to compile, and its temporaries in GB.

    Raises:
      MemoryError: where the device cannot hold them.
    """
    start = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile(compiler_options=options)
    stats = program.memory_analysis()
    facts = {"compile_s": time.perf_counter() - start, "temporary_gb": stats.temp_size_in_bytes / 1e9}
    limit = memory()
    if limit and stats.temp_size_in_bytes + stats.argument_size_in_bytes > limit:
        raise MemoryError(f"needs {facts['temporary_gb']:.0f} GB of temporaries")
    return program, facts


def memory() -> float:
    """Bytes that JAX may take of the device; 0 where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)


def both_ways(run: Callable[..., Any]) -> Callable[..., Any]:
    """(arguments to differentiate, others, cotangents) → results and gradients."""

    def fn(given: tuple, others: tuple, cotangents: Any) -> tuple:
        result, pullback = jax.vjp(lambda given: run(*given, *others), given)
        return result, pullback(cotangents)

    return fn


def documents(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of packed documents of about 700 tokens, and positions: int32 [B, S]."""
    rng, mean = np.random.default_rng(0), min(700, length / 3)
    ids_BS, positions_BS = (np.zeros((rows, length), np.int32) for _ in range(2))
    for b in range(rows):
        sizes = np.maximum(rng.exponential(mean, DOCUMENTS - 1).astype(int), 1)
        sizes[-1] += length  # the last one is cut off
        ids_BS[b] = np.repeat(np.arange(1, DOCUMENTS), sizes)[:length]
        positions_BS[b] = np.concatenate([np.arange(n) for n in sizes])[:length]
    return ids_BS, positions_BS


def random_batch(size: Size, rows: int) -> dict[str, np.ndarray]:
    """A batch of random tokens in documents."""
    ids_BS, positions_BS = documents(rows, size["S"])
    tokens_BS = np.random.default_rng(1).integers(0, size["V"], ids_BS.shape).astype(np.int32)
    batch = {"tokens": tokens_BS, "targets": np.roll(tokens_BS, -1, 1), "document_ids": ids_BS}
    return batch | {"positions": positions_BS, "loss_mask": ids_BS > 0}


def learned(size: Size, rows: int) -> tuple[jax.Array, jax.Array, PoolConfig, dict[str, jax.Array]]:
    """Router logits of documents that prefer some experts, as a trained router's do; ids, pools and their draws."""
    rng, experts = np.random.default_rng(0), size["E"] - 1
    ids_BS, _ = documents(rows, size["S"])
    likes_BGR = rng.normal(size=(rows, DOCUMENTS, experts)) * 1.5 + rng.normal(size=experts) * 0.5
    logits_BSR = np.take_along_axis(likes_BGR, ids_BS[..., None], 1) + rng.normal(size=(rows, size["S"], experts))
    pool = PoolConfig(kind="document", min=min(8, experts), max=size["E"])
    draws = draw_pools(pool, 0, jnp.int32(0), rows=rows, layers=1, documents=DOCUMENTS, experts=experts)
    draw = {"size_BG": draws.size_BLG[:, 0], "seed_BG2": draws.seed_BLG[:, 0]}
    return jnp.asarray(logits_BSR, jnp.float32), jnp.asarray(ids_BS), pool, draw


@functools.cache
def choices(size: tuple, rows: int) -> tuple[jax.Array, jax.Array]:
    """Experts and weights that such a router chooses, [T, C]; `size` as a tuple of its items."""
    of = dict(size)
    logits_BSR, ids_BS, pool, draw = learned(of, rows)
    run = functools.partial(route, choices=of["K"] - 1, pool=pool, documents=DOCUMENTS)
    routing = jax.jit(run)(logits_BSR, ids_BS, **draw)
    indices_TC, weights_TC = (a.reshape(-1, of["K"] - 1) for a in (routing.indices_BSC, routing.weights_BSC))
    return indices_TC, weights_TC


def normal(seed: int, *shape: int, dtype: Any = "bfloat16") -> jax.Array:
    """Random values."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def expert_weights(experts: int, d: int, f: int, dtype: Any = "bfloat16") -> tuple[jax.Array, ...]:
    """Gate, up and down, of values that keep a row's size."""
    shapes = enumerate([(experts, d, f), (experts, d, f), (experts, f, d)])
    return tuple(normal(i, *shape, dtype=dtype) * shape[1] ** -0.5 for i, shape in shapes)


def run_config(size: Size, layers: int, rows: int, remat: str) -> Config:
    """configs/emo_1b14b.py on one device, with these sizes, layers and rows."""
    spec = importlib.util.spec_from_file_location("emo_1b14b", ROOT / "configs" / "emo_1b14b.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = module.get_config()
    letters = {"vocab_size": "V", "d_model": "D", "num_heads": "H", "num_experts": "E", "top_k": "K", "d_expert": "F"}
    for field, letter in letters.items():
        setattr(run.model, field, size[letter])
    run.model.num_layers, run.model.remat = layers, remat
    run.pool.min, run.pool.max = min(8, size["E"] - 1), size["E"]
    run.data.sequence_length, run.data.batch_size, run.data.max_documents = size["S"], rows, DOCUMENTS
    run.train.microbatches, run.mesh = 1, MeshConfig()
    run.model.validate()
    return run

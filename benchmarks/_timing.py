"""How every benchmark here times a function."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def median_ms(fn: Callable[..., Any], *args: Any, repeats: int = 15) -> float:
    """Median wall time of `fn(*args)` in milliseconds, after two calls that compile and warm up."""
    for _ in range(2):
        jax.block_until_ready(fn(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def versions() -> str:
    """The line every result starts with."""
    device = jax.devices()[0]
    return f"jax {jax.__version__}, {jax.device_count()} × {device.device_kind}"

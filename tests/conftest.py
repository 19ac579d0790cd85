"""Every test runs on CPU, split into four simulated devices where it asks for more than one."""

import os
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts: compile-only TPU plugins must not be asked for devices
# Tests compile much and compute little: LLVM's optimiser would take most of their time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Many tests, and the programs that they start, compile the same.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(10**9))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A job in a shell's background ignores Ctrl-C, and so would the programs that it starts and that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    "tests/training/test_invariance.py",
    "tests/test_finetune.py",
    "tests/test_select_and_evaluate.py",
    "tests/test_train.py",
    "tests/training/test_against_oracle.py",
    "tests/launch/test_training.py",
    "tests/test_notebooks.py",
)
"""Files that take longest: first, so that no worker ends with one of them alone."""


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(places)))

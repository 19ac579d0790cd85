"""Every test runs on CPU, split into four simulated devices where it asks for more than one."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax starts: compile-only TPU plugins must not be asked for devices

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

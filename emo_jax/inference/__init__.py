"""How does it speak? Key/value cache, decoding, sampling, and pools that a prompt chooses."""

from emo_jax.inference.decoding import Generator, Sampling, fixed_pools, pool_size
from emo_jax.inference.text import Completion, Speed, complete

__all__ = ["Completion", "Generator", "Sampling", "Speed", "complete", "fixed_pools", "pool_size"]

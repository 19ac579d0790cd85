"""Causal attention within documents, for whole rows: no array of all S × S scores on any platform.

`document_attention` is the operation; `reference` the oracle it is tested against.
"""

from emo_jax.kernels.attention.op import IMPLEMENTATIONS, default_implementation, document_attention
from emo_jax.kernels.attention.reference import reference

__all__ = ["IMPLEMENTATIONS", "default_implementation", "document_attention", "reference"]

"""How big is the model, and what does a token cost? One documented formula each."""

import math

import jax

from emo_jax.model.config import ModelConfig
from emo_jax.model.functional import abstract_parameters


def total_parameters(config: ModelConfig) -> int:
    """Every parameter, counted from the abstract model."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_parameters(config)))


def active_parameters(config: ModelConfig) -> int:
    """Parameters one token uses: all but the routed experts it does not choose."""
    idle = sum(experts - config.num_choices for experts in config.routed_experts)
    return total_parameters(config) - idle * 3 * config.d_model * config.d_expert


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations to train on one token, forward and backward, without recomputation.

    6 for each active parameter but the embedding's, whose rows are only looked up, plus 6 · S · D a layer
    for causal attention over a full row: scores and sums over S/2 keys on average, 2 products of 2 · D
    each, three times for forward and backward. Document boundaries, which save some of it, are not
    subtracted, so that the figure depends on the config alone.
    """
    embedding = config.vocab_size * config.d_model
    attention = 6 * sequence_length * config.num_heads * config.head_dim * config.num_layers
    return 6 * (active_parameters(config) - embedding) + attention

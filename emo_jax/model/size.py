"""How big is the model, and what does a token cost? One documented formula each."""

import math

import jax
import jax.numpy as jnp

from emo_jax.model.config import ModelConfig
from emo_jax.model.functional import abstract_parameters


def total_parameters(config: ModelConfig) -> int:
    """Every parameter, counted from the abstract model; the order of split layers' neurons is none."""
    leaves = jax.tree.leaves(abstract_parameters(config))
    return sum(math.prod(leaf.shape) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))


def active_parameters(config: ModelConfig) -> int:
    """Parameters one token uses: all but the routed experts it does not choose."""
    idle = sum(experts - config.num_choices for experts in config.routed_experts)
    width, matrices = config.d_expert, 3
    if config.split_layers:
        width = config.feed_forward_width(config.split_layers[0]) // config.split_experts
        matrices = 3 if config.feed_forward == "swiglu" else 2
    biases = matrices - 1 if config.split_layers and config.biases else 0  # the last is added once
    return total_parameters(config) - idle * (matrices * config.d_model + biases) * width


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations to train on one token, forward and backward, without recomputation.

    6 for each active parameter but those of embeddings, whose rows are only looked up, plus 6 · S · D a layer
    for causal attention over a full row: scores and sums over S/2 keys on average, 2 products of 2 · D
    each, three times for forward and backward; twice that where it is not causal. Document boundaries, which save some
    of it, are not subtracted, so that the figure depends on the config alone.
    """
    looked_up = config.max_positions + config.token_types
    if config.labels or not (config.causal and config.tied_embeddings):  # no head, or one of its own
        looked_up += config.vocab_size
    attention = 6 * sequence_length * config.num_heads * config.head_dim * config.num_layers
    attention *= 1 if config.causal else 2
    return 6 * (active_parameters(config) - looked_up * config.d_model) + attention

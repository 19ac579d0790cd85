"""The public implementation's values, and the loss they were computed with."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emo_jax.model import balance_loss, bind

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden values not found at {GOLDEN}")
MODELS = ("emo_tiny", "stdmoe_tiny", "emo_pruned", "emo_gqa")
BALANCE_WEIGHT = 0.1
FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""Compiling is nearly all the time these tests take."""


def loss(params, config, tokens_BS):
    """(total, (cross-entropy, balance, logits, router logits a layer)); each row one document, no pool, no z-terms."""
    model = bind(config, params)
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]).reshape(1, -1), tokens_BS.shape)
    hidden_BSD, routings = model(tokens_BS, jnp.ones_like(tokens_BS), positions_BS)
    logits_BSV = model.logits(hidden_BSD)
    log_p_BSV = jax.nn.log_softmax(logits_BSV[:, :-1])
    cross_entropy = -jnp.take_along_axis(log_p_BSV, tokens_BS[:, 1:, None], axis=-1).mean()
    balance = [
        balance_loss(t.counts_BR.sum(0), t.weights_BR.sum(0), t.tokens_B.sum(), config.num_choices)
        for t in (routing.totals for routing in routings)
    ]
    balance = sum(balance) / len(balance)
    total = cross_entropy + BALANCE_WEIGHT * balance
    return total, (cross_entropy, balance, logits_BSV, [routing.logits_BSR for routing in routings])


def relative(found, expected):
    """‖found − expected‖ / ‖expected‖, in float64."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)

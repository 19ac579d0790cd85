"""What is computed? The transformer, its attention, its mixture layers and their routing, as NNX modules.

Everything else sees parameters as a plain nested dict; `bind` makes them a callable module again.
"""

from emo_jax.model.config import BalanceConfig, ModelConfig, PoolConfig
from emo_jax.model.cross_entropy import LanguageLoss, language_loss, token_losses
from emo_jax.model.functional import abstract_parameters, bind, init_parameters, logical_axes, mixture_layers
from emo_jax.model.routing import (
    Kept,
    PoolDraws,
    Routing,
    RoutingTotals,
    balance_loss,
    draw_noise,
    draw_pools,
    importance_loss,
)
from emo_jax.model.size import active_parameters, flops_per_token, total_parameters
from emo_jax.model.transformer import Transformer

__all__ = [
    "BalanceConfig",
    "Kept",
    "LanguageLoss",
    "ModelConfig",
    "PoolConfig",
    "PoolDraws",
    "Routing",
    "RoutingTotals",
    "Transformer",
    "abstract_parameters",
    "active_parameters",
    "balance_loss",
    "bind",
    "draw_noise",
    "draw_pools",
    "flops_per_token",
    "importance_loss",
    "init_parameters",
    "language_loss",
    "logical_axes",
    "mixture_layers",
    "token_losses",
    "total_parameters",
]

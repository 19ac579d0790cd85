"""AdamW as the recipe has it: clipping, decay groups, warm-up and schedule."""

from typing import Any

import jax
import optax

from emo_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step of a run of `steps`, a function of the step's number from 0."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = config.warmup_steps
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "wsd":
        main = optax.linear_schedule(peak, final, config.decay_steps, transition_begin=rest - config.decay_steps)
    else:
        main = optax.constant_schedule(peak)
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), main], [warmup])


def decayed(params: Any) -> Any:
    """True for each parameter that weight decay applies to: all but the embedding (public recipe)."""
    return jax.tree.map_with_path(lambda path, _: path[0].key != "embedding", params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping to a global norm, then AdamW with decoupled decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )

"""AdamW as the recipe has it: clipping, decay groups, warm-up and schedule."""

import itertools
from typing import Any

import jax
import optax

from emo_jax.config import OptimizerConfig
from emo_jax.training.lora import low_rank


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step of a run of `steps`, a function of the step's number from 0."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup, end = config.warmup_steps, steps - config.anneal_steps
    rest = max(end - warmup, 1)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "linear":
        main = optax.linear_schedule(peak, final, rest)
    else:
        main, final = optax.constant_schedule(peak), peak
    anneal = optax.linear_schedule(final if end > warmup else peak, 0.0, max(config.anneal_steps, 1))
    parts = [(optax.linear_schedule(0.0, peak, max(warmup, 1)), warmup), (main, end - warmup), (anneal, steps - end)]
    parts = [(schedule, length) for schedule, length in parts if length]
    starts = itertools.accumulate(length for _, length in parts[:-1])
    return optax.join_schedules([schedule for schedule, _ in parts], list(starts))


def decayed(params: Any) -> Any:
    """True for each parameter that weight decay applies to: all but the embedding (public recipe)."""
    return jax.tree.map_with_path(lambda path, _: path[0].key != "embedding", params)


def make_optimizer(config: OptimizerConfig, steps: int, seed: int = 0) -> optax.GradientTransformation:
    """Clipping to a global norm, then AdamW with decoupled decay, of what `trained` returns.

    With LoRA, of the factors of its targets instead of these themselves, and of what else is trained; see `low_rank`.

    Args:
      config: of the optimizer.
      steps: of the run.
      seed: of LoRA's first factors.
    """
    adamw = optax.chain(
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
    return low_rank(config, adamw, seed) if config.lora_rank else adamw

"""AdamW as the recipe has it: clipping, decay groups, warm-up and schedule."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from emo_jax.config import OptimizerConfig, expert_lists


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


def trained(config: OptimizerConfig, params: Any) -> Any:
    """What `trainable_experts` leaves to train: for each parameter True, False, or a mask, bool [R, 1, 1] or [1, R]."""
    if not config.trainable_experts:
        return jax.tree.map(lambda _: True, params)
    lists = expert_lists("optimizer.trainable_experts", config.trainable_experts)
    mixtures = [name for name in sorted(params["layers"]) if "moe" in params["layers"][name]]
    experts_of = dict(zip(mixtures, lists, strict=True))

    def mask(path: Any, leaf: Any) -> Any:
        names = [key.key for key in path]
        if "routed" not in names and "router" not in names:
            return False
        axis = leaf.ndim - 1 if "router" in names else 0
        chosen_R = np.isin(np.arange(leaf.shape[axis]), experts_of[names[1]])
        return np.expand_dims(chosen_R, tuple(i for i in range(leaf.ndim) if i != axis))

    return jax.tree.map_with_path(mask, params)


def without_frozen(config: OptimizerConfig, params: Any) -> Any:
    """The same values; no gradient reaches what is not trained, and where that is a whole array, none is computed."""

    def stop(leaf: Any, mask: Any) -> Any:
        if isinstance(mask, bool):
            return leaf if mask else jax.lax.stop_gradient(leaf)
        return jnp.where(mask, leaf, jax.lax.stop_gradient(leaf))

    return jax.tree.map(stop, params, trained(config, params))


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping to a global norm, then AdamW with decoupled decay; arrays that are frozen whole have no moments."""
    if not config.trainable_experts:
        return _adamw(config, steps)

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda mask: "frozen" if mask is False else "trained", trained(config, params))

    def keep_frozen(updates: Any, params: Any) -> Any:  # from weight decay
        return jax.tree.map(lambda update, mask: jnp.where(mask, update, 0), updates, trained(config, params))

    transforms = {"trained": _adamw(config, steps), "frozen": optax.set_to_zero()}
    return optax.chain(optax.partition(transforms, labels), optax.stateless(keep_frozen))


def _adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
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

"""Steps that would hurt are skipped: loss or gradient norm not finite, or far above those of the last steps.

The rule of the public dense recipe: above mean + 6σ of the last 128 accepted steps, once 64 of them are known.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emo_jax.config import TrainConfig


class Guard(NamedTuple):
    """What the guard remembers; part of the training state, so a resumed run decides as an undisturbed one.

    Attributes:
      losses_W, norms_W: of the last accepted steps, float32, a ring of `train.guard_window` (at least 1).
      accepted: int32, steps that were not skipped.
      skipped: int32, steps that were.
      skipped_in_row: int32, how many just now.
    """

    losses_W: jax.Array
    norms_W: jax.Array
    accepted: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array


def init_guard(config: TrainConfig) -> Guard:
    """The guard before the first step."""
    window = jnp.zeros(max(config.guard_window, 1), jnp.float32)
    return Guard(window, window.copy(), jnp.int32(0), jnp.int32(0), jnp.int32(0))


def judge(config: TrainConfig, guard: Guard, loss: jax.Array, norm: jax.Array) -> tuple[jax.Array, Guard]:
    """Whether to take a step (a bool scalar), and the guard after it."""
    loss, norm = loss.astype(jnp.float32), norm.astype(jnp.float32)
    take = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.guard_window:
        known = jnp.minimum(guard.accepted, config.guard_window)
        filled_W = jnp.arange(config.guard_window) < known
        for value, window_W in ((loss, guard.losses_W), (norm, guard.norms_W)):
            mean = window_W.mean(where=filled_W)
            limit = mean + config.guard_sigmas * window_W.std(where=filled_W)
            take &= (known < config.guard_window // 2) | (value <= limit)
    place = guard.accepted % guard.losses_W.shape[0]
    skipped = (~take).astype(jnp.int32)
    return take, Guard(
        jnp.where(take, guard.losses_W.at[place].set(loss), guard.losses_W),
        jnp.where(take, guard.norms_W.at[place].set(norm), guard.norms_W),
        guard.accepted + 1 - skipped,
        guard.skipped + skipped,
        (guard.skipped_in_row + 1) * skipped,
    )


def choose(take: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the step is taken, else `old`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(take, a, b), new, old)

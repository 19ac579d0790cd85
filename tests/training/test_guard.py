"""The guard skips what would hurt, remembers only what it took, and does nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emo_jax.config import TrainConfig
from emo_jax.parallel import put_rows
from emo_jax.training.guard import init_guard, judge
from emo_jax.training.step import init_state, make_train_step
from tests.training import tiny


def follow(config, values):
    """Which steps are taken, and the guard at the end; the same value as loss and as norm."""
    step = jax.jit(lambda guard, value: judge(config, guard, value, value))
    guard, taken = init_guard(config), []
    for value in values:
        take, guard = step(guard, jnp.float32(value))
        taken.append(bool(take))
    return taken, guard


def oracle(window, sigmas, values):
    """The rule in plain Python."""
    history, taken = [], []
    for value in np.float32(values):
        last = history[-window:]
        usual = len(last) < window // 2 or value <= np.mean(last) + sigmas * np.std(last)
        taken.append(bool(np.isfinite(value) and usual))
        if taken[-1]:
            history.append(value)
    return taken


@pytest.mark.parametrize("seed", range(3))
def test_decides_as_the_rule_says(seed):
    rng = np.random.default_rng(seed)
    values = 3 + rng.normal(size=200)
    values[rng.integers(0, 200, 12)] += rng.uniform(2, 30, 12)
    values[[5, 90]] = np.nan, np.inf
    config = TrainConfig(guard_window=16, guard_sigmas=3.0)
    taken, guard = follow(config, values)
    wanted = oracle(16, 3.0, values)
    assert taken == wanted
    assert not all(taken[8:])
    assert (int(guard.accepted), int(guard.skipped)) == (sum(wanted), 200 - sum(wanted))


def test_without_a_window_only_what_is_not_finite_is_skipped():
    taken, guard = follow(TrainConfig(guard_window=0), [1, 1, 1e30, np.nan, -np.inf, 1])
    assert taken == [True, True, True, False, False, True]
    assert int(guard.skipped_in_row) == 0


def test_skipped_steps_in_a_row_are_counted():
    _, guard = follow(TrainConfig(guard_window=8), [1] * 8 + [np.nan] * 3)
    assert int(guard.skipped_in_row) == 3


def test_a_skipped_step_changes_nothing_but_the_count():
    run = tiny.config(model={"dtype": "float32"}, train={"guard_window": 8, "guard_sigmas": 1e-6})
    mesh = tiny.devices_mesh(run, 1)
    state, step = init_state(run, mesh), make_train_step(run, mesh)
    for _ in range(4):  # half a window is taken whatever it holds
        state, metrics = step(state, put_rows(tiny.batch(), mesh))
    assert int(metrics["skipped"]) == 0
    # A window that no loss can stay under.
    quiet = jnp.zeros_like(state.guard.losses_W)
    state = state._replace(guard=state.guard._replace(losses_W=quiet))
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = step(state, put_rows(tiny.batch(1), mesh))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"]), int(state.step)) == (1, 1, 5)
    for ours, theirs in zip(jax.tree.leaves((state.params, state.opt_state)), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(ours, theirs)

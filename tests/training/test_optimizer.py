"""The schedule against its formulas, AdamW against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.config import OptimizerConfig
from emo_jax.training.optimizer import decayed, learning_rate, make_optimizer

PEAK, FINAL = 3e-3, 0.1


def formula(schedule, step, steps, warmup, decay):
    if step < warmup:
        return PEAK * step / warmup
    rest = steps - warmup
    done = (step - warmup) / rest
    if schedule == "cosine":
        return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)
    if schedule == "linear":
        return PEAK * (1 - (1 - FINAL) * done)
    if schedule == "wsd":
        return PEAK * (1 - (1 - FINAL) * max(0, step - (steps - decay)) / decay)
    return PEAK


def config(schedule, warmup=0, decay=0, **fields):
    return OptimizerConfig(
        learning_rate=PEAK,
        schedule=schedule,
        warmup_steps=warmup,
        decay_steps=decay,
        final_fraction=FINAL,
        **fields,
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_the_learning_rate_of_every_step_is_its_formula(schedule):
    @settings(deadline=None, max_examples=20)
    @given(st.integers(2, 400), st.data())
    def check(steps, data):
        warmup = data.draw(st.integers(0, steps - 1))
        decay = data.draw(st.integers(1, steps - warmup))
        ours = learning_rate(config(schedule, warmup, decay), steps)
        wanted = [formula(schedule, step, steps, warmup, decay) for step in range(steps + 1)]
        found = np.broadcast_to(ours(np.arange(401)), 401)[: steps + 1]  # one shape, so that it compiles once
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)

    check()


@pytest.mark.parametrize("schedule, end", [("cosine", 0.1), ("linear", 0.1), ("wsd", 0.1), ("constant", 1.0)])
def test_a_run_warms_up_from_0_to_the_peak_and_ends_at_its_fraction(schedule, end):
    rate = learning_rate(config(schedule, 10, 30), 100)
    assert float(rate(0)) == 0
    np.testing.assert_allclose(float(rate(5)), PEAK / 2, rtol=1e-6)
    np.testing.assert_allclose(float(rate(10)), PEAK, rtol=1e-6)
    np.testing.assert_allclose(float(rate(100)), end * PEAK, rtol=1e-5)
    if schedule == "wsd":
        np.testing.assert_allclose(float(rate(70)), PEAK, rtol=1e-6)
        np.testing.assert_allclose(float(rate(85)), 0.55 * PEAK, rtol=1e-5)


def test_without_warm_up_the_first_step_has_the_peak():
    np.testing.assert_allclose(float(learning_rate(config("cosine"), 100)(0)), PEAK, rtol=1e-6)


def tree(rng, scale=1.0):
    shapes = {"embedding": (5, 3), "head": (3, 5), "layers": {"00": {"norm": (3,), "moe": {"router": (3, 4)}}}}
    return jax.tree.map(lambda shape: scale * rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple))


def test_everything_but_the_embedding_decays():
    assert decayed(tree(np.random.default_rng(0))) == {
        "embedding": False,
        "head": True,
        "layers": {"00": {"norm": True, "moe": {"router": True}}},
    }


@pytest.mark.parametrize("scale", [1e-3, 10.0])  # under and over the norm that gradients are clipped to
def test_steps_are_adamw_with_decoupled_decay_and_clipping(scale):
    settings = config("cosine", 2, beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.3, clip_norm=0.7)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        optimizer = make_optimizer(settings, 10)
        params = jax.tree.map(jnp.asarray, tree(rng))
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        wanted, names = jax.tree.leaves(jax.device_get(params)), [str(p) for p, _ in jax.tree.leaves_with_path(params)]
        first, second = [np.zeros_like(p) for p in wanted], [np.zeros_like(p) for p in wanted]
        for step in range(4):
            gradients = tree(rng, scale)
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            leaves = jax.tree.leaves(gradients)
            norm = math.sqrt(sum((g**2).sum() for g in leaves))
            assert (norm > 0.7) == (scale > 1)
            rate = formula("cosine", step, 10, 2, 0)
            for i, g in enumerate(leaves):
                g = g * min(1, 0.7 / norm)
                first[i] = 0.8 * first[i] + 0.2 * g
                second[i] = 0.9 * second[i] + 0.1 * g**2
                mean, square = first[i] / (1 - 0.8 ** (step + 1)), second[i] / (1 - 0.9 ** (step + 1))
                decay = 0 if "embedding" in names[i] else 0.3 * wanted[i]
                wanted[i] = wanted[i] - rate * (mean / (np.sqrt(square) + 1e-6) + decay)
        for ours, want, name in zip(jax.tree.leaves(params), wanted, names, strict=True):
            np.testing.assert_allclose(ours, want, rtol=1e-6, err_msg=name)  # optax keeps the rate in float32

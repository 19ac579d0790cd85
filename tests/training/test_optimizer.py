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


def formula(schedule, step, steps, warmup, anneal):
    if step < warmup:
        return PEAK * step / warmup
    end = steps - anneal
    if step > end:
        start = formula(schedule, end, steps, warmup, anneal)
        return start * (1 - (step - end) / anneal)
    done = (step - warmup) / max(end - warmup, 1)
    if schedule == "cosine":
        return PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)
    if schedule == "linear":
        return PEAK * (1 - (1 - FINAL) * done)
    return PEAK


def config(schedule, warmup=0, anneal=0, **fields):
    return OptimizerConfig(
        learning_rate=PEAK,
        schedule=schedule,
        warmup_steps=warmup,
        anneal_steps=anneal,
        final_fraction=FINAL,
        **fields,
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_of_every_step_is_its_formula(schedule):
    @settings(deadline=None, max_examples=20)
    @given(st.integers(2, 400), st.data())
    def check(steps, data):
        warmup = data.draw(st.integers(0, steps - 1))
        anneal = data.draw(st.just(0) | st.integers(0, steps - warmup))
        ours = learning_rate(config(schedule, warmup, anneal), steps)
        wanted = [formula(schedule, step, steps, warmup, anneal) for step in range(steps + 1)]
        found = np.broadcast_to(ours(np.arange(401)), 401)[: steps + 1]  # one shape, so that it compiles once
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-9)

    check()


@pytest.mark.parametrize("schedule, end", [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_a_run_warms_up_from_0_to_the_peak_and_ends_at_its_fraction(schedule, end):
    rate = learning_rate(config(schedule, 10), 100)
    assert float(rate(0)) == 0
    np.testing.assert_allclose(float(rate(5)), PEAK / 2, rtol=1e-6)
    np.testing.assert_allclose(float(rate(10)), PEAK, rtol=1e-6)
    np.testing.assert_allclose(float(rate(100)), end * PEAK, rtol=1e-5)


def test_the_released_anneal_falls_from_a_tenth_of_the_peak_to_0_over_50_billion_tokens():
    rate = learning_rate(OptimizerConfig(anneal_steps=11_920), 238_419 + 11_920)
    whole = learning_rate(OptimizerConfig(), 238_419)
    for step in (0, 2000, 100_000, 238_418):
        np.testing.assert_allclose(float(rate(step)), float(whole(step)), rtol=1e-6)
    for step, wanted in ((238_419, 4e-4), (238_419 + 5960, 2e-4), (250_338, 4e-4 / 11_920), (250_339, 0)):
        np.testing.assert_allclose(float(rate(step)), wanted, rtol=2e-3, atol=1e-12)


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

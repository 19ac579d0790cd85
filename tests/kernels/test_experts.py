"""Routed experts: every implementation against the reference, the reference against a loop, and the plan between.

Letters: T tokens, C choices a token, R routed experts, D width, F expert hidden, M slots.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.errors import UserError
from emo_jax.kernels.experts import (
    IMPLEMENTATIONS,
    best_implementation,
    default_implementation,
    reference,
    routed_experts,
)
from emo_jax.kernels.experts import dispatch as ops
from tests import oracle

D, F = 5, 3
SHAPES = [(1, 2, 3), (70, 3, 4)]
"""T, C, R: a single token; a few blocks of 64, not a multiple of it."""
PATTERNS = ("uniform", "skewed", "one takes all", "some without", "none")
SEEDS = st.integers(0, 2**32 - 1)


def choose(rng, T, C, R, pattern):
    """C different experts a token, or R for all of its choices where it has none."""
    likes_R = {"skewed": 3.0 ** -np.arange(R), "one takes all": np.eye(R)[R - 1] * 1e6 + 1}.get(pattern, np.ones(R))
    gumbel_TR = rng.gumbel(size=(T, R)) + np.log(likes_R)
    indices_TC = np.argsort(-gumbel_TR, axis=1)[:, :C].astype(np.int32)
    without = {"some without": 0.5, "none": 1.0}.get(pattern, 0.0)
    indices_TC[rng.random(T) < without] = R
    return indices_TC


def random_arguments(T, C, R, pattern, seed, dtype="float64", weights="float64"):
    rng = np.random.default_rng(seed)
    indices_TC = choose(rng, T, C, R, pattern)
    x_TD, gate, up, down = (rng.normal(size=shape) for shape in [(T, D), (R, D, F), (R, D, F), (R, F, D)])
    weights_TC, cotangent_TD = rng.random((T, C)), rng.normal(size=(T, D))
    x_TD, gate, up, down, cotangent_TD = (jnp.asarray(a, dtype) for a in (x_TD, gate, up, down, cotangent_TD))
    return (x_TD, jnp.asarray(indices_TC), jnp.asarray(weights_TC, weights), gate, up, down), cotangent_TD


@functools.cache
def value_and_gradients(implementation):
    """Jitted: the result, and the cotangents of x, weights, gate, up and down."""

    def run(x_TD, indices_TC, weights_TC, gate, up, down, cotangent_TD):
        def of(x, weights, gate, up, down):
            return routed_experts(x, indices_TC, weights, gate, up, down, implementation=implementation)

        y_TD, pullback = jax.vjp(of, x_TD, weights_TC, gate, up, down)
        return y_TD, *pullback(cotangent_TD)

    return jax.jit(run)


def loop(x_TD, indices_TC, weights_TC, gate, up, down):
    """One token and one expert at a time."""
    R = len(gate)
    y_TD = np.zeros_like(x_TD)
    for t, c in np.ndindex(indices_TC.shape):
        if (e := indices_TC[t, c]) < R:
            y_TD[t] += weights_TC[t, c] * oracle.feed_forward(x_TD[t], gate[e], up[e], down[e])
    return y_TD


def assert_close(ours, wanted, tolerance):
    names = ("y", "x", "weights", "gate", "up", "down")
    for name, our, want in zip(names, ours, wanted, strict=True):
        assert our.dtype == want.dtype, name
        our, want = (np.asarray(a, np.float64) for a in (our, want))
        scale = max(np.abs(want).max(), 1e-30)
        np.testing.assert_allclose(our, want, rtol=tolerance, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("T, C, R", [(1, 1, 1), (70, 3, 4)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_reference_is_a_loop_over_tokens_and_their_experts(T, C, R, pattern):
    with jax.enable_x64(True):
        arguments, _ = random_arguments(T, C, R, pattern, 0)
        wanted_TD = loop(*(np.asarray(a) for a in arguments))
        np.testing.assert_allclose(reference(*arguments), wanted_TD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T, C, R", SHAPES)
@pytest.mark.parametrize("implementation", ["blocked", "ragged", "streamed"])
def test_an_implementation_and_its_gradients_are_the_references(implementation, T, C, R):
    @settings(deadline=None, max_examples=15)
    @given(SEEDS, st.sampled_from(PATTERNS))
    def check(seed, pattern):
        with jax.enable_x64(True):
            arguments, cotangent_TD = random_arguments(T, C, R, pattern, seed)
            ours = value_and_gradients(implementation)(*arguments, cotangent_TD)
            wanted = value_and_gradients("reference")(*arguments, cotangent_TD)
            assert_close(ours, wanted, 1e-11)

    check()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 4e-2)])
@pytest.mark.parametrize("implementation", ["blocked", "ragged", "streamed"])
def test_lower_precision_stays_within_its_tolerance_of_the_reference(implementation, dtype, tolerance):
    for pattern in ("skewed", "some without"):
        arguments, cotangent_TD = random_arguments(70, 3, 4, pattern, 0, dtype, "float32")
        ours = value_and_gradients(implementation)(*arguments, cotangent_TD)
        exact = [a.astype(np.float32) if a.dtype == dtype else a for a in arguments]
        wanted = value_and_gradients("reference")(*exact, cotangent_TD.astype(np.float32))
        kinds = (dtype, dtype, "float32", dtype, dtype, dtype)
        assert_close(ours, [want.astype(kind) for want, kind in zip(wanted, kinds, strict=True)], tolerance)


def test_a_token_without_experts_gets_0_and_passes_no_gradient():
    for implementation in ("blocked", "ragged", "streamed"):
        with jax.enable_x64(True):
            arguments, cotangent_TD = random_arguments(70, 3, 4, "some without", 1)
            y_TD, dx_TD, dweights_TC, *_ = value_and_gradients(implementation)(*arguments, cotangent_TD)
        without_T = np.asarray(arguments[1])[:, 0] == 4
        assert 0 < without_T.sum() < 70
        for array in (y_TD, dx_TD, dweights_TC):
            np.testing.assert_array_equal(array[without_T], 0)
            assert (np.asarray(array)[~without_T] != 0).all()


def test_an_unknown_implementation_is_refused_with_the_nearest_name():
    arguments, _ = random_arguments(1, 1, 1, "uniform", 0, "float32", "float32")
    with pytest.raises(UserError, match=r"implementation='raged'.*Did you mean 'ragged'\?"):
        routed_experts(*arguments, implementation="raged")


def test_every_platform_has_a_default():
    assert {default_implementation(platform) for platform in ("cpu", "gpu", "tpu")} <= set(IMPLEMENTATIONS)
    assert [best_implementation(tokens) for tokens in (1, 64, 65)] == ["streamed", "streamed", "blocked"]


# The plan


@functools.cache
def planner(experts, block):
    return jax.jit(lambda indices_TC: ops.plan(indices_TC, experts, block))


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("T, C, R", [(1, 2, 3), (13, 3, 5)])
def test_a_plan_gives_each_choice_one_slot_in_its_experts_aligned_run(T, C, R, block):
    @settings(deadline=None, max_examples=30)
    @given(SEEDS, st.sampled_from(PATTERNS))
    def check(seed, pattern):
        indices_TC = choose(np.random.default_rng(seed), T, C, R, pattern)
        plan = jax.device_get(planner(R, block)(indices_TC))
        expert_N, slot_N = indices_TC.ravel(), plan.slot_TC.ravel()  # N choices
        M, nowhere = len(plan.choice_M), indices_TC.size
        np.testing.assert_array_equal(plan.counts_R, np.bincount(expert_N, minlength=R + 1)[:R])
        padded_R = -(-plan.counts_R // block) * block
        np.testing.assert_array_equal(plan.starts_R, np.cumsum(padded_R) - padded_R)
        assert padded_R.sum() <= M and M % block == 0
        for choice, slot in enumerate(slot_N):
            if expert_N[choice] == R:
                assert slot == M
            else:
                start = plan.starts_R[expert_N[choice]]
                assert start <= slot < start + plan.counts_R[expert_N[choice]]
                assert plan.choice_M[slot] == choice
                assert plan.token_M[slot] == choice // C
        assert (plan.choice_M < nowhere).sum() == (expert_N < R).sum()
        np.testing.assert_array_equal(plan.token_M[plan.choice_M == nowhere], T)

    check()


def test_slots_suffice_for_the_worst_routing_and_no_block_is_spare():
    """Every expert just past a multiple of the block; tight once there is a choice for each expert."""
    for block in (1, 4, 64):
        for experts in (1, 3, 7):
            for choices in range(experts, experts + 3 * block):
                # One choice to each expert opens its block; each further `block` choices fill one more.
                worst = experts + (choices - experts) // block
                assert ops.num_slots(choices, experts, block) == worst * block


# Dispatch and combine


def test_dispatch_and_combine_differentiate_as_plain_gathers_do():
    T, C, R = 13, 3, 5
    with jax.enable_x64(True):
        for pattern in PATTERNS:
            rng = np.random.default_rng(0)
            plan = planner(R, 4)(choose(rng, T, C, R, pattern))
            M = plan.choice_M.size
            shapes = [(T, D), (M, D), (T, C), (M, D), (T, D), (M,)]
            x_TD, y_MD, weights_TC, gx_MD, gy_TD, gw_M = (jnp.asarray(rng.normal(size=shape)) for shape in shapes)
            gx_MD = jnp.where((plan.choice_M < T * C)[:, None], gx_MD, 0)

            def gather(x_TD, plan=plan):
                return jnp.concatenate([x_TD, jnp.zeros((1, D))])[plan.token_M]

            def gather_weights(weights_TC, plan=plan):
                return jnp.append(weights_TC.reshape(-1), 0)[plan.choice_M]

            def add(y_MD, plan=plan):
                return jnp.concatenate([y_MD, jnp.zeros((1, D))])[plan.slot_TC].sum(1)

            for ours, wanted, argument, cotangent in [
                (ops.dispatch, gather, x_TD, gx_MD),
                (ops.dispatch_weights, gather_weights, weights_TC, gw_M),
                (ops.combine, add, y_MD, gy_TD),
            ]:
                arguments = (argument,)
                our_value, our_pullback = jax.vjp(lambda *a, f=ours, plan=plan: f(*a, plan), *arguments)
                value, pullback = jax.vjp(wanted, *arguments)
                pairs = [(our_value, value), *zip(our_pullback(cotangent), pullback(cotangent), strict=True)]
                for our, want in pairs:
                    if our.shape == (M, D):  # what empty slots hold is nobody's
                        our, want = (a[plan.choice_M < T * C] for a in (our, want))
                    np.testing.assert_allclose(our, want, rtol=1e-12, atol=1e-14)


def test_the_backward_pass_scatters_nothing_and_sorts_only_the_plan():
    arguments, cotangent_TD = random_arguments(70, 3, 4, "uniform", 0, "float32", "float32")
    program = value_and_gradients("ragged").lower(*arguments, cotangent_TD).as_text()
    assert "scatter" not in program
    assert program.count("stablehlo.sort") == 2
    forward = jax.jit(lambda indices_TC: ops.plan(indices_TC, 4, 1)).lower(arguments[1]).as_text()
    assert forward.count("stablehlo.sort") == 2

"""Routed experts by our own GPU kernels: interpreted against the reference, and lowered for a GPU at the released size.

Letters: T tokens, C choices a token, R routed experts, D width, F expert hidden.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from emo_jax.kernels.experts import reference
from emo_jax.kernels.experts.gpu_products import Sizes, best_sizes
from emo_jax.kernels.experts.pallas_gpu import routed_experts_gpu
from emo_jax.kernels.experts.slots import assign
from tests.kernels.test_experts import assert_close, choose

PATTERNS = ("uniform", "one takes all", "some without", "none")
SMALL = Sizes(rows=32, hidden=32, width=32, depth=16)
"""So that there are several tiles an expert, and several parts and steps of every product."""


def random_arguments(T, C, R, D, F, pattern, dtype, filled=1.0):
    """Arguments, and a cotangent of the result; the last tokens have no expert where `filled` is below 1."""
    rng = np.random.default_rng(0)
    indices_TC = choose(rng, T, C, R, pattern)
    indices_TC[int(T * filled) :] = R
    shapes = [(T, D), (R, D, F), (R, D, F), (R, F, D), (T, D)]
    x_TD, gate, up, down, cotangent_TD = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    weights_TC = jnp.asarray(rng.random((T, C)), "float32")
    return (x_TD, jnp.asarray(indices_TC), weights_TC, gate, up, down), cotangent_TD


@functools.cache
def value_and_gradients(of):
    """Jitted: the result, and the cotangents of x, weights, gate, up and down."""

    def run(x_TD, indices_TC, weights_TC, gate, up, down, cotangent_TD):
        y_TD, pullback = jax.vjp(lambda x, w, *e: of(x, indices_TC, w, *e), x_TD, weights_TC, gate, up, down)
        return y_TD, *pullback(cotangent_TD)

    return jax.jit(run)


small = functools.partial(routed_experts_gpu, sizes=SMALL, interpret=True)
exact = value_and_gradients(reference)


def exactly(arguments, cotangent_TD):
    """What the reference gives in float32, rounded."""
    wide = [a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in arguments]
    kinds = (arguments[0].dtype, *(a.dtype for i, a in enumerate(arguments) if i != 1))
    return [a.astype(kind) for a, kind in zip(exact(*wide, cotangent_TD.astype("float32")), kinds, strict=True)]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 4e-2)])
def test_the_kernels_and_their_gradients_are_the_references(dtype, tolerance):
    """Slots of no choice are NaN in interpret mode: nothing may depend on them."""
    for pattern in PATTERNS:
        arguments, cotangent_TD = random_arguments(70, 3, 4, 64, 64, pattern, dtype)
        ours = value_and_gradients(small)(*arguments, cotangent_TD)
        assert_close(ours, exactly(arguments, cotangent_TD), tolerance)


@pytest.mark.parametrize("T, C, R, D, F", [(1, 1, 1, 64, 64), (150, 2, 3, 192, 64)])
def test_other_shapes_are_the_references(T, C, R, D, F):
    """One token; more than the 128 that are counted together, and a width of several parts that is no power of two."""
    arguments, cotangent_TD = random_arguments(T, C, R, D, F, "some without" if T > 1 else "uniform", "float32")
    kernels = functools.partial(routed_experts_gpu, interpret=True)
    assert_close(value_and_gradients(kernels)(*arguments, cotangent_TD), exactly(arguments, cotangent_TD), 1e-5)


def test_fewer_filled_choices_take_fewer_slots():
    arguments, cotangent_TD = random_arguments(70, 3, 4, 64, 64, "uniform", "float32", filled=0.4)
    kernels = functools.partial(small, filled=28 * 3)
    assert_close(value_and_gradients(kernels)(*arguments, cotangent_TD), exactly(arguments, cotangent_TD), 1e-5)
    tiles = [len(assign(arguments[1], 4, SMALL.rows, filled).tiles.expert_N) for filled in (28 * 3, None)]
    assert tiles == [6, 10]


def test_a_token_without_experts_gets_0_and_passes_no_gradient():
    arguments, cotangent_TD = random_arguments(70, 3, 4, 64, 64, "some without", "float32")
    y_TD, dx_TD, dweights_TC, *_ = value_and_gradients(small)(*arguments, cotangent_TD)
    without_T = np.asarray(arguments[1])[:, 0] == 4
    assert 0 < without_T.sum() < 70
    for array in (y_TD, dx_TD, dweights_TC):
        np.testing.assert_array_equal(array[without_T], 0)
        assert (np.asarray(array)[~without_T] != 0).all()


def test_sizes_fit_the_shapes_or_there_are_none():
    assert best_sizes(2048, 1024, "bfloat16") == Sizes()
    assert best_sizes(192, 320, "float32") == Sizes(hidden=64, width=64, depth=32)
    for width, hidden, dtype in [(96, 1024, "bfloat16"), (2048, 1000, "bfloat16"), (2048, 1024, "float64")]:
        assert best_sizes(width, hidden, dtype) is None
    arguments, _ = random_arguments(8, 3, 4, 96, 64, "uniform", "float32")
    with pytest.raises(ValueError, match="no sizes for D 96, F 64 and float32"):
        routed_experts_gpu(*arguments)


def of_released_size(T):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype="bfloat16")
    gate, down = shape((127, 2048, 1024)), shape((127, 1024, 2048))
    choices = [jax.ShapeDtypeStruct((T, 7), kind) for kind in ("int32", "float32")]
    return shape((T, 2048)), *choices, gate, gate, down


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("T", [4096, 32768])
def test_the_kernels_lower_at_the_released_size(T):
    """To Triton's language alone: what its compiler says, and what it computes, takes a GPU."""
    gpu = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    arguments = of_released_size(T)
    with use_abstract_mesh(AbstractMesh((1,), ("data",), (AxisType.Explicit,), abstract_device=gpu)):
        forward = jax.jit(routed_experts_gpu).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        traced = value_and_gradients(routed_experts_gpu).trace(*arguments, arguments[0])
        both = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Push, gated products, product, pull; and push, gated products' backward, two of weights, product, pull.
    for program, kernels in ((forward, 4), (both, 10)):
        assert program.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == kernels
        assert "sort" not in program and "scatter" not in program

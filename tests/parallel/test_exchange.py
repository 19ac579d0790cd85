"""Expert parallelism against one device: any routing, any number of experts, values and gradients; nothing dropped.

Letters: B rows, S sequence, D width, C choices, R routed experts, F expert hidden.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from emo_jax.kernels.experts import routed_experts
from emo_jax.parallel import MeshConfig, make_mesh, map_experts, ring_load
from emo_jax.parallel.config import AXES
from emo_jax.parallel.sharding import ROW_AXES

B, S, D, F, C = 8, 5, 6, 4, 2
ROUTINGS = ("even", "one rank takes all", "one expert takes all", "some without")


@pytest.fixture(scope="module", autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def arguments(routing, experts, seed=0):
    rng = np.random.default_rng(seed)
    indices_BSC = np.argsort(rng.random((B, S, experts)), axis=-1)[..., :C].astype(np.int32)
    if routing == "one rank takes all":
        indices_BSC = np.argsort(rng.random((B, S, C)), axis=-1).astype(np.int32)  # of the first experts alone
    if routing == "one expert takes all":
        indices_BSC[:] = [experts - 1, 0]
    if routing == "some without":
        indices_BSC[rng.random((B, S)) < 0.5] = experts
    shapes = ((B, S, D), (experts, D, F), (experts, D, F), (experts, F, D), (B, S, D))
    x_BSD, gate, up, down, cotangent_BSD = (rng.normal(size=shape) for shape in shapes)
    return (x_BSD, indices_BSC, rng.random((B, S, C)), gate, up, down), cotangent_BSD


@functools.cache
def value_and_gradients(mesh, implementation="blocked", buffer=1.0):
    """Jitted: the result, and the cotangents of x, weights, gate, up and down."""
    compute = functools.partial(routed_experts, implementation=implementation)

    def run(x_BSD, indices_BSC, weights_BSC, gate, up, down, cotangent_BSD):
        experts = map_experts(compute, mesh, buffer)
        y_BSD, pullback = jax.vjp(
            lambda x, weights, *own: experts(x, indices_BSC, weights, *own), x_BSD, weights_BSC, gate, up, down
        )
        return y_BSD, *pullback(cotangent_BSD)

    return jax.jit(run)


def mesh_of(data, fsdp, expert):
    return make_mesh(MeshConfig(data, fsdp, expert), B, jax.devices()[: data * fsdp * expert])


@pytest.mark.parametrize(
    ("shape", "experts", "implementation"),
    [((1, 1, 4), 8, "blocked"), ((1, 1, 4), 7, "blocked"), ((2, 1, 2), 5, "blocked"), ((1, 2, 2), 3, "ragged")],
)
def test_each_rank_computes_its_own_experts_and_none_drops_a_token(shape, experts, implementation):
    mesh = mesh_of(*shape)
    rows = NamedSharding(mesh, PartitionSpec(ROW_AXES))
    for routing in ROUTINGS:
        given, cotangent_BSD = arguments(routing, experts)
        wanted = value_and_gradients(None)(*given, cotangent_BSD)
        placed = [jax.device_put(a, rows) if len(a) == B and a.ndim == 3 and i < 3 else a for i, a in enumerate(given)]
        ours = value_and_gradients(mesh, implementation)(*placed, jax.device_put(cotangent_BSD, rows))
        for our, want in zip(ours, wanted, strict=True):
            np.testing.assert_allclose(our, want, rtol=1e-9, atol=1e-12, err_msg=routing)


def test_a_large_buffer_needs_one_round_and_a_small_one_several():
    given, cotangent_BSD = arguments("one rank takes all", 8)
    mesh = mesh_of(1, 1, 4)
    loops = []
    for buffer in (4.0, 1.0):
        lowered = value_and_gradients(mesh, "blocked", buffer).lower(*given, cotangent_BSD)
        loops.append(lowered.as_text().count("stablehlo.while"))
        np.testing.assert_allclose(
            lowered.compile()(*given, cotangent_BSD)[0], value_and_gradients(None)(*given, cotangent_BSD)[0], rtol=1e-9
        )
    assert loops[0] < loops[1]


def test_only_the_designed_collectives_cross_the_expert_axis():
    given, cotangent_BSD = arguments("even", 8)
    mesh = mesh_of(1, 1, 4)
    rows, stacks = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (ROW_AXES, "expert"))
    placed = [jax.device_put(a, rows if i < 3 else stacks) for i, a in enumerate(given)]
    hlo = value_and_gradients(mesh).lower(*placed, jax.device_put(cotangent_BSD, rows)).compile().as_text()
    found = {name for name in ("all-to-all", "collective-permute", "all-reduce") if f" {name}(" in hlo}
    assert " all-gather(" in hlo and found <= {"all-reduce"}  # a CPU's reduce-scatter may be an all-reduce


def test_load_is_that_of_each_ring_and_rounds_those_of_its_fullest_rank():
    counts_BR = np.zeros((8, 7))
    counts_BR[:2, 0], counts_BR[:2, 6], counts_BR[2:, 3] = (
        6,
        4,
        10,
    )  # two rows a ring; ranks of 4 experts, the last spare
    mesh = AbstractMesh((2, 2, 2), AXES)
    for parts in (1, 2):
        found = ring_load(jnp.asarray(counts_BR), mesh, choices=10, parts=parts)
        rows = 8 // (4 * parts)
        np.testing.assert_allclose(found, [2.0, np.ceil(10 * rows / np.ceil(1.5 * rows * 10 / 2))])

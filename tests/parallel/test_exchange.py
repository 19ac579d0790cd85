"""Expert parallelism against one device: any routing, any number of experts, values and gradients; nothing dropped.

Letters: B rows, S sequence, D width, C choices, R routed experts, F expert hidden, X ranks.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from emo_jax.kernels.experts import routed_experts
from emo_jax.parallel import TOKENS, MeshConfig, make_mesh, map_experts, rank_load, replicated
from emo_jax.parallel.config import AXES
from emo_jax.parallel.exchange import best_exchange, buffer_size

B, S, D, F, C = 8, 6, 6, 4, 2
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
def value_and_gradients(mesh, implementation="blocked", exchange="ring", buffer=1.0, chunks=1):
    """Jitted: the result, the loads, and the cotangents of x, weights, gate, up and down."""
    compute = functools.partial(routed_experts, implementation=implementation)
    config = MeshConfig(exchange=exchange, buffer=buffer, chunks=chunks)

    def run(x_BSD, indices_BSC, weights_BSC, gate, up, down, cotangent_BSD):
        experts = map_experts(compute, mesh, config)
        y_BSD, pullback, load_NC = jax.vjp(
            lambda x, weights, *own: experts(x, indices_BSC, weights, *own),
            x_BSD, weights_BSC, gate, up, down,
            has_aux=True,
        )  # fmt: skip
        return y_BSD, load_NC, *pullback(cotangent_BSD)

    return jax.jit(run)


def mesh_of(*shape):
    return make_mesh(MeshConfig(*shape), B, jax.devices()[: int(np.prod(shape))])


def place(mesh, given, cotangent_BSD):
    """What has a token split over the mesh, weights whole on each device."""
    tokens, whole = NamedSharding(mesh, TOKENS), replicated(mesh)
    placed = [jax.device_put(a, tokens if i < 3 else whole) for i, a in enumerate(given)]
    return placed[:3], placed[3:], jax.device_put(cotangent_BSD, tokens)


@pytest.mark.parametrize("exchange", ["ring", "all_to_all"])
@pytest.mark.parametrize(
    ("shape", "experts", "implementation", "chunks"),
    [
        ((1, 1, 4, 1), 8, "blocked", 1),
        ((1, 1, 4, 1), 7, "blocked", 3),
        ((1, 1, 2, 2), 5, "blocked", 1),
        ((1, 2, 2, 1), 3, "ragged", 2),
    ],
)
def test_each_rank_computes_its_own_experts_and_none_drops_a_token(exchange, shape, experts, implementation, chunks):
    mesh = mesh_of(*shape)
    for routing in ROUTINGS:
        given, cotangent_BSD = arguments(routing, experts)
        wanted_y, _, *wanted = value_and_gradients(None)(*given, cotangent_BSD)
        tokens, weights, cotangent = place(mesh, given, cotangent_BSD)
        run = value_and_gradients(mesh, implementation, exchange, chunks=chunks)
        y_BSD, load_NC, *ours = run(*tokens, *weights, cotangent)
        for our, want in zip((y_BSD, *ours), (wanted_y, *wanted), strict=True):
            np.testing.assert_allclose(our, want, rtol=1e-9, atol=1e-12, err_msg=routing)
        # A group of ranks, the fsdp and context axes apart, in mesh order; each chunk of its devices.
        indices = jax.device_get(tokens[1])
        assert load_NC.shape == (mesh.size, chunks) and load_NC.sum() == (indices < experts).sum()
        ranks, held = shape[2], -(-experts // shape[2])
        by_rank = load_NC.reshape(-1, ranks, shape[3], chunks).sum((0, 2, 3))
        np.testing.assert_array_equal(by_rank, [(indices[indices < experts] // held == x).sum() for x in range(ranks)])


@pytest.mark.parametrize("exchange", ["ring", "all_to_all"])
def test_a_buffer_for_all_choices_needs_no_further_round(exchange):
    given, cotangent_BSD = arguments("one rank takes all", 8)
    mesh = mesh_of(1, 1, 4, 1)
    loops = []
    for buffer in (4.0, 1.0):
        lowered = value_and_gradients(mesh, "blocked", exchange, buffer).lower(*given, cotangent_BSD)
        loops.append(lowered.as_text().count("stablehlo.while"))
    assert loops[0] < loops[1]


def test_the_ring_sends_less_up_to_as_many_ranks_as_choices():
    for ranks in range(2, 20):
        ring, rows = ranks - 1, 7 * (ranks - 1) / ranks  # of a device's tokens, in each direction
        assert best_exchange(ranks, 7) == ("ring" if ring <= rows else "all_to_all")


def test_load_is_that_of_each_group_of_ranks_and_rounds_those_of_the_fullest():
    mesh = AbstractMesh((1, 2, 2, 2), AXES)
    loads_NC = np.full((8, 2), 10)
    loads_NC[2] = [25, 5]  # fsdp 0, expert 1, context 0; its group's other rank is device 0
    found = rank_load(jnp.asarray(loads_NC), mesh, choices=10, buffer=1.5)
    np.testing.assert_allclose(found, [25 / 17.5, np.ceil(25 / 15)])
    assert buffer_size(10, 2, 1.5) == 15 and buffer_size(10, 2, 4.0) == 20

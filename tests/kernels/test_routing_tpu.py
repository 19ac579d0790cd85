"""The routing kernel at the released geometry, compiled ahead of time for real TPU topologies; no chip is needed."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from emo_jax.model import PoolConfig
from emo_jax.model.moe import _by_rows
from emo_jax.model.routing import route
from emo_jax.parallel import MeshConfig, batch_sharding, make_mesh, product

pytest.importorskip("libtpu", reason="ahead-of-time TPU compiles need libtpu: pip install 'jax[tpu]'")
GENERATIONS = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def compiled(topology="v5p:2x2x1", rows=1, length=4096, experts=127, choices=7, documents=64, kind="document"):
    """A router and its gradients, so many rows on each of the topology's chips: its HLO."""
    megacore = {"chip_config_name": "megacore"} if topology.startswith("v4") else {}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **megacore).devices
    mesh = make_mesh(MeshConfig(), rows * len(devices), devices)
    pool = PoolConfig(kind=kind, min=choices + 1, max=experts + 1)
    decide = _by_rows(functools.partial(route, choices=choices, pool=pool), mesh)

    def run(x_BSD, router_DR, ids_BS, size_BG, seed_BG2, cotangent_BSC):
        def layer(x_BSD, router_DR):
            logits_BSR = product("bsd,dr->bsr", x_BSD, router_DR, ("embed", "expert"), mesh, precision="highest")
            decided = decide(logits_BSR, ids_BS, size_BG=size_BG, seed_BG2=seed_BG2)
            return (decided.weights_BSC, decided.totals.weights_BR, decided.totals.z_B), decided

        outputs, pull_back, decided = jax.vjp(layer, x_BSD, router_DR, has_aux=True)
        cotangents = cotangent_BSC, *(jnp.ones_like(output) for output in outputs[1:])
        return decided.indices_BSC, decided.totals, pull_back(cotangents)

    def of_rows(*shape, dtype):
        return jax.ShapeDtypeStruct((rows * len(devices), *shape), dtype, sharding=batch_sharding(mesh))

    arguments = (
        of_rows(length, 256, dtype=jnp.float32),
        jax.ShapeDtypeStruct((256, experts), jnp.float32),
        of_rows(length, dtype=jnp.int32),
        of_rows(documents, dtype=jnp.int32),
        of_rows(documents, 2, dtype=jnp.uint32),
        of_rows(length, choices, dtype=jnp.float32),
    )
    return jax.jit(run).lower(*arguments).compile().as_text()


def assert_two_kernels(hlo):
    assert hlo.count('custom_call_target="tpu_custom_call"') == 2  # Mosaic: one forward, one backward
    assert " sort(" not in hlo


def test_a_router_is_its_products_and_two_kernels_that_read_the_logits_as_the_product_writes_them():
    hlo = compiled()
    assert_two_kernels(hlo)
    entry = hlo[hlo.index("\nENTRY") :]
    logits = ("f32[1,127,4096]", "f32[1,4096,127]", "f32[4096,127]")
    moved = [line for line in entry.splitlines() if any(f" = {shape}" in line for shape in logits) and " copy(" in line]
    assert not moved, "the logits are laid out anew"


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("topology", GENERATIONS)
def test_every_generation_compiles_it(topology, rows):
    assert_two_kernels(compiled(topology, rows))


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"length": 32768},
        {"experts": 511, "documents": 256},
        {"experts": 1024, "documents": 128},
        {"experts": 128, "documents": 1024},
        {"experts": 31, "choices": 3, "length": 1000},
        {"kind": "random", "length": 1100},
        {"kind": "none", "experts": 7, "choices": 1, "documents": 1, "length": 130},
    ],
    ids=str,
)
def test_whatever_fits_compiles(topology, sizes):
    assert_two_kernels(compiled(topology, **sizes))

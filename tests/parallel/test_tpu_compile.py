"""The exchange of experts, compiled ahead of time for real TPU topologies; no chip is needed.

Letters: T tokens of a device, C choices, X ranks, D width, R routed experts.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from emo_jax.errors import UserError
from emo_jax.kernels.experts import routed_experts
from emo_jax.parallel import TOKENS, MeshConfig, make_mesh, map_experts, param_sharding
from emo_jax.parallel.compiled import collectives, products
from emo_jax.training.step import abstract_batch, abstract_state, make_train_step, run_mesh
from tests.training.test_tpu_compile import released

pytest.importorskip("libtpu", reason="ahead-of-time TPU compiles need libtpu: pip install 'jax[tpu]'")
T, C, D, F, X = 1024, 7, 2048, 1024, 4
ROW = 2 * D  # bytes, in bfloat16


def topology(name, **options):
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices


@functools.cache
def compiled(exchange, experts, chunks=1, name="v5p:2x2x1"):
    """Forward and backward of a layer's routed experts over X ranks, one row of T tokens each: HLO and mesh."""
    mesh = make_mesh(MeshConfig(1, 1, X), X, topology(name))
    compute = functools.partial(routed_experts, implementation="ragged")
    run = map_experts(compute, mesh, MeshConfig(exchange=exchange, chunks=chunks), keep_dispatched=False)

    def step(x_BSD, indices_BSC, weights_BSC, gate, up, down, g_BSD):
        arrays = (x_BSD, weights_BSC, gate, up, down)
        y_BSD, pull, _ = jax.vjp(lambda x, w, *own: run(x, indices_BSC, w, *own), *arrays, has_aux=True)
        return y_BSD, pull(g_BSD)

    def array(*shape, dtype=jnp.bfloat16, axes=None):
        sharding = NamedSharding(mesh, TOKENS) if axes is None else param_sharding(mesh, jax.P(*axes), shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    into, out = ("routed", "embed", "mlp"), ("routed", "mlp", "embed")
    given = (
        array(X, T, D), array(X, T, C, dtype=jnp.int32), array(X, T, C, dtype=jnp.float32),
        array(experts, D, F, axes=into), array(experts, D, F, axes=into), array(experts, F, D, axes=out),
        array(X, T, D),
    )  # fmt: skip
    return jax.jit(step).lower(*given).compile().as_text(), mesh


def sent_tokens(hlo, mesh):
    """Bytes of tokens that a device sends in the first rounds, by kind; what moves weights is left out."""
    kinds = {"ring": ("all-gather", "reduce-scatter"), "all_to_all": ("ragged-all-to-all",)}
    found = [c for c in collectives(hlo, mesh) if c.times]
    assert all(c.axes == ("expert",) for c in found)
    return {name: sum(c.sent * c.times for c in found if c.kind in some) for name, some in kinds.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exchange", "formula"), [("ring", 4 * T * (X - 1) * ROW), ("all_to_all", 4 * T * C * (X - 1) / X * ROW)]
)
def test_each_transport_sends_what_its_formula_says(exchange, formula):
    """There and back, forward and backward. Routing and weights of choices go along: 4 bytes each, to all ranks."""
    hlo, mesh = compiled(exchange, 127)
    sent = sent_tokens(hlo, mesh)
    small = 8 * T * C * (X - 1) * 4
    assert formula <= sent[exchange] <= formula + small
    assert sent["all_to_all" if exchange == "ring" else "ring"] <= small
    assert " scatter(" not in hlo  # neither forward nor backward


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["ring", "all_to_all"])
def test_neither_work_nor_traffic_grows_with_the_number_of_experts(exchange):
    few, many = (compiled(exchange, experts) for experts in (31, 127))
    assert sent_tokens(*few)[exchange] == pytest.approx(sent_tokens(*many)[exchange], rel=1e-3)
    assert products(few[0]) == products(many[0])


@pytest.mark.slow
def test_chunks_overlap_their_exchange_with_products():
    """Between the start and the end of an exchange, the schedule has another chunk's products."""
    hlo, _ = compiled("all_to_all", 127, chunks=2)
    entry = hlo[hlo.index("ENTRY") :].splitlines()
    open_exchanges, overlapped = set(), 0
    for line in entry:
        name = line.split("=")[0].strip()
        if " ragged-all-to-all-start(" in line:
            open_exchanges.add(name)
        elif " ragged-all-to-all-done(" in line:
            open_exchanges -= {start for start in open_exchanges if start in line.split("done(")[1]}
        elif open_exchanges and "ragged-dot" in name and "metadata" not in name:
            overlapped += 1
    assert overlapped >= 2


def test_slices_are_told_apart_along_data():
    devices = topology("v5p:2x2x1", num_slices=2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2), 8, devices)
    for replica, part in enumerate(mesh.devices):
        assert {device.slice_index for device in part.flat} == {replica}
    with pytest.raises(UserError, match=r"mesh\.data=1 must be a multiple of the 2 slices.*mesh\.data=2"):
        make_mesh(MeshConfig(data=1, fsdp=8), 8, devices)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [{"data": 2, "fsdp": 2, "expert": 2}, {"context": 2, "fsdp": 2, "expert": 2}], ids=str
)
def test_a_step_has_the_designed_collectives_on_each_axis_and_no_others(shape):
    run = released(layers=1, rows=8, vocab_size=2048)
    run.mesh, run.data.sequence_length = MeshConfig(**{"data": 1, "exchange": "all_to_all"} | shape), 1024
    mesh = run_mesh(run, topology("v5p:2x2x2"))
    hlo = make_train_step(run, mesh).lower(abstract_state(run, mesh), abstract_batch(run, mesh)).compile().as_text()
    weights = {"all-gather", "reduce-scatter", "all-reduce", "all-to-all"}
    designed = {
        "data": {"all-reduce"},  # gradients, once a step
        "fsdp": weights,
        "expert": weights | {"ragged-all-to-all"},
        "context": weights,  # and keys, values, their gradients, sums of documents
    }
    for one in collectives(hlo, mesh):
        if one.sent > 1e5 and one.kind != "collective-permute":  # with which a scatter's odd rows are passed on
            assert all(one.kind in designed.get(axis, ()) for axis in one.axes), one
    assert any(one.kind == "ragged-all-to-all" for one in collectives(hlo, mesh))

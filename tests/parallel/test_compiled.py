"""What is read from compiled programs, against programs whose exchanges and products are known."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from emo_jax.parallel import MeshConfig, make_mesh
from emo_jax.parallel.compiled import collectives, products, work
from emo_jax.parallel.config import AXES

N = 4096  # numbers of a device, enough to be listed


def compiled(fn, shape, *args):
    mesh = make_mesh(MeshConfig(*shape), 4, jax.devices()[: int(np.prod(shape))])
    spec = PartitionSpec(AXES)
    sharding = NamedSharding(mesh, spec)
    mapped = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec)
    given = [jax.ShapeDtypeStruct(arg, jnp.float32, sharding=sharding) for arg in args]
    return jax.jit(mapped).lower(*given).compile().as_text(), mesh


def test_collectives_are_found_with_their_axes_bytes_and_runs():
    def exchange(x_N):
        x_N = jax.lax.all_gather(x_N, "fsdp", tiled=True).reshape(2, -1).sum(0)
        x_N = jax.lax.all_to_all(x_N.reshape(2, -1), "expert", 0, 0).reshape(-1)

        def body(x_N, _):
            return jnp.sin(jax.lax.ppermute(x_N, "expert", [(0, 1), (1, 0)])), None

        return jax.lax.scan(body, x_N, None, length=3)[0]

    hlo, mesh = compiled(exchange, (1, 2, 2, 1), (4 * N,))
    found = {(c.kind, c.axes): (c.sent, c.times) for c in collectives(hlo, mesh)}
    assert found == {
        ("all-gather", ("fsdp",)): (4 * N, 1),
        ("all-to-all", ("expert",)): (4 * N / 2, 1),
        ("collective-permute", ("expert",)): (4 * N, 3),
    }


def test_a_sum_over_several_axes_and_a_loop_of_unknown_length():
    def exchange(x_N):
        def body(x_N):
            return jax.lax.pcast(jax.lax.psum(x_N, ("data", "context")), ("data", "context"), to="varying") * 0.1

        return jax.lax.while_loop(lambda x_N: jax.lax.pmax(x_N.max(), AXES) > 1, body, x_N)

    hlo, mesh = compiled(exchange, (2, 1, 1, 2), (4 * N,))
    (one,) = collectives(hlo, mesh)
    assert (one.kind, one.axes, one.sent, one.times) == ("all-reduce", ("data", "context"), 2 * 4 * N * 3 / 4, 0)


def test_groups_are_read_in_every_way_that_hlo_writes_them():
    mesh = AbstractMesh((1, 2, 4, 1), AXES)
    groups = {
        "{{0,1,2,3},{4,5,6,7}}": ("expert",),
        "{{0,4},{1,5},{2,6},{3,7}}": ("fsdp",),
        "[2,4]<=[8]": ("expert",),
        "[4,2]<=[2,4]T(1,0)": ("fsdp",),
        "[1,8]<=[8]": ("fsdp", "expert"),
        "mesh['data'=1,'fsdp'=2,'expert'=4,'context'=1] {'fsdp'}": ("fsdp",),
        "mesh['axis_0'=2,'axis_1'=4] {'axis_1','axis_0'}": ("fsdp", "expert"),
        "{{0,1},{2,3},{4,5},{6,7}}": ("?",),
    }
    for text, axes in groups.items():
        hlo = "ENTRY %main (p: f32[4096]) -> f32[4096] {\n"
        hlo += f"  %sum = f32[4096]{{0}} all-reduce(%p), channel_id=1, replica_groups={text}, to_apply=%add\n}}\n"
        (one,) = collectives(hlo, mesh)
        assert one.axes == axes, text


def test_products_are_counted_in_loops_and_with_batch_axes():
    def fn(a, b):
        def body(a, _):
            return jnp.einsum("bij,jk->bik", a, jnp.eye(8)), None

        return jnp.einsum("bij,bjk->bik", jax.lax.scan(body, a, None, length=5)[0], b)

    given = jax.ShapeDtypeStruct((3, 16, 8), jnp.float32), jax.ShapeDtypeStruct((3, 8, 4), jnp.float32)
    found = products(jax.jit(fn).lower(*given).compile().as_text())
    assert found.grouped == 0
    np.testing.assert_allclose(found.dense, 2 * 3 * 16 * 8 * 4 + 5 * 2 * 3 * 16 * 8 * 8)


def test_work_is_counted_once_a_fusion_and_by_slices_in_loops():
    stack = np.ones((6, 64, 256), np.float32)

    def fn(x, stack):
        def body(x, i):
            w = jax.lax.dynamic_index_in_dim(stack, i, keepdims=False)
            return jnp.sin(x + w) * 2 + w, None

        return jax.lax.scan(body, x, jnp.arange(6))[0] @ jnp.ones((256, 32))

    given = jax.ShapeDtypeStruct((64, 256), jnp.float32), jax.ShapeDtypeStruct(stack.shape, jnp.float32)
    found = work(jax.jit(fn).lower(*given).compile().as_text())
    assert sum(op.flops for op in found) == 2 * 64 * 256 * 32
    array = 64 * 256 * 4
    least = 6 * 3 * array  # a slice and x in, x out
    total = sum(op.traffic for op in found)
    assert least <= total < 3 * least, "the whole stack, six times over, would be 36 arrays more"


def test_a_collective_in_pieces_counts_where_it_starts():
    hlo = """
%start (p: f32[2048]) -> (f32[2048], f32[4096]) {
  %p = f32[2048]{0} parameter(0)
  ROOT %g1 = f32[4096]{0} all-gather(%p), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
}

%async_collective_fusion.1 (q: f32[2048]) -> f32[4096] {
  %q = f32[2048]{0} parameter(0)
  ROOT %g2 = f32[4096]{0} all-gather(%q), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
}

%done (r: f32[2048]) -> f32[4096] {
  %r = f32[2048]{0} parameter(0)
  ROOT %g3 = f32[4096]{0} all-gather(%r), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
}

ENTRY %main (x: f32[2048]) -> f32[4096] {
  %x = f32[2048]{0} parameter(0)
  %async-collective-start.1 = (f32[2048]{0}, f32[4096]{0}) fusion(%x), kind=kCustom, calls=%start
  %fusion.7 = f32[4096]{0} fusion(%async-collective-start.1#0), kind=kCustom, calls=%async_collective_fusion.1
  ROOT %async-collective-done.1 = f32[4096]{0} fusion(%async-collective-start.1#0), kind=kCustom, calls=%done
}
"""
    (one,) = collectives(hlo, AbstractMesh((1, 2, 1, 1), AXES))
    assert (one.kind, one.axes, one.sent) == ("all-gather", ("fsdp",), 4096 * 4 / 2)


def test_an_element_of_a_tuple_is_one_array():
    hlo = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %pair = (f32[1024]{0:T(8,128)}, (f32[2]{0}, f32[4]{0}), f32[8]{0:T(8,128)S(1)}) custom-call(%x)
  %y = f32[16]{0} negate(%pair#0)
  ROOT %z = f32[8]{0} negate(%pair#2)
}
"""
    moved = {op.name: op.traffic for op in work(hlo)}
    assert moved["y"] == 4 * (1024 + 16)
    assert moved["z"] == 4 * 8, "what lies in another memory space is not read from HBM"


def test_a_gather_of_a_sparse_core_reads_what_it_takes():
    hlo = """
ENTRY %main (x: f32[1024,8], i: s32[16]) -> f32[16,8] {
  %x = f32[1024,8]{1,0:T(8,128)} parameter(0)
  %i = s32[16]{0} parameter(1)
  %start = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), async_execution_thread="sparsecore", to_apply=%called
  %gather_start.update = ((f32[1024,8]{1,0:T(8,128)}, s32[16]{0}), f32[16,8]{1,0:T(8,128)}) call-update(%start, %x, %i)
  ROOT %gather_done = f32[16,8]{1,0:T(8,128)} call-done(%gather_start.update)
}
"""
    moved = {op.name: op.traffic for op in work(hlo)}
    assert moved["gather_start.update"] == 2 * 16 * 8 * 4

"""Where arrays live: meshes that fit, a table that covers every axis, shards of equal size, rows mapped exactly.

Letters: B rows, D width, F hidden.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from emo_jax.errors import UserError
from emo_jax.model import ModelConfig, abstract_parameters, logical_axes
from emo_jax.parallel import (
    MeshConfig,
    batch_sharding,
    make_mesh,
    map_tokens,
    own_rows,
    param_sharding,
    put_rows,
    replicated,
)
from emo_jax.parallel.config import AXES
from emo_jax.parallel.sharding import RULES

MODEL = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, experts_per_layer=(5, 0), top_k=3,
    d_expert=6, d_dense=10,
)  # fmt: skip


def mesh_of(data, fsdp, rows=4, devices=4):
    return make_mesh(MeshConfig(data=data, fsdp=fsdp), rows, jax.devices()[:devices])


@pytest.mark.parametrize(
    "data, fsdp, shape", [(-1, 1, (4, 1)), (1, -1, (1, 4)), (-1, 2, (2, 2)), (4, -1, (4, 1)), (2, 2, (2, 2))]
)
def test_an_axis_of_minus_1_takes_what_the_other_leaves(data, fsdp, shape):
    mesh = mesh_of(data, fsdp)
    assert tuple(mesh.shape.values()) == (*shape, 1, 1)
    assert list(mesh.devices.flat) == jax.devices()[:4]


@pytest.mark.parametrize(
    "data, fsdp, rows, words",
    [
        (3, 1, 4, r"mesh\.data=3 does not divide the 4 devices; try one of \[1, 2, 4\]"),
        (-1, 5, 4, r"mesh\.fsdp=5 does not divide the 4 devices; try one of \[1, 2, 4\]"),
        (1, 2, 4, r"mesh\.data=1 × mesh\.fsdp=2 must equal the 4 devices; set mesh\.data=-1 for 2"),
        (4, 4, 4, r"mesh\.data=4 × mesh\.fsdp=4 must equal the 4 devices; set mesh\.data=-1 for 1"),
        (1, 1, 4, r"mesh\.data=1 × mesh\.fsdp=1 must equal the 4 devices; set mesh\.data=-1 for 4"),
        (-1, 1, 6, r"= 6 rows must be a multiple of the 4 devices; the nearest is 8"),
        (-1, 1, 1, r"= 1 rows must be a multiple of the 4 devices; the nearest is 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_sizes_that_do(data, fsdp, rows, words):
    with pytest.raises(UserError, match=words):
        mesh_of(data, fsdp, rows)


@pytest.mark.parametrize(
    "fields, rows, words",
    [
        ({"expert": 3}, 4, r"mesh\.expert=3 does not divide the 4 devices; try one of \[1, 2, 4\]"),
        ({"expert": 4}, 4, r"mesh\.expert=4 ranks are more than the 3 routed experts of a layer; try one of \[1, 2\]"),
        ({"context": 4}, 1, r"mesh\.context=4 does not divide data\.sequence_length=30; try one of \[1, 2\]"),
        ({"context": 2, "chunks": 4}, 2, r"mesh\.chunks=4 does not divide the 15 tokens of a device; try 3 or 5"),
        ({"context": 2, "chunks": 16}, 2, r"mesh\.chunks=16 does not divide the 15 tokens of a device; try 15"),
        (
            {"context": 2},
            3,
            r"= 3 rows must be a multiple of the 2 groups of devices that share rows; the nearest is 4",
        ),
        ({"data": 4, "context": 2}, 4, r"must equal the 4 devices; set mesh\.data=-1 for 2"),
    ],
)
def test_experts_tokens_and_rows_that_do_not_divide_are_refused_with_what_does(fields, rows, words):
    with pytest.raises(UserError, match=words):
        make_mesh(MeshConfig(**fields), rows, jax.devices()[:4], length=30, experts=(5, 3))


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"exchange": "rings"}, r"mesh\.exchange='rings'.*ring"),
        ({"buffer": 0.9}, r"mesh\.buffer=0\.9 must be at least 1"),
        ({"chunks": 0}, r"mesh\.chunks=0 must be at least 1"),
        ({"context": 0}, r"mesh\.context=0 must be at least 1"),
        ({"context": -1}, r"mesh\.data and mesh\.context are both -1"),
    ],
)
def test_fields_that_cannot_work_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        MeshConfig(**fields).validate()


def leaf_axes():
    return zip(jax.tree.leaves_with_path(abstract_parameters(MODEL)), jax.tree.leaves(logical_axes(MODEL)), strict=True)


def test_the_rules_cover_every_axis_of_every_parameter():
    used = set()
    for (path, leaf), axes in leaf_axes():
        assert len(axes) == leaf.ndim, path
        used |= set(axes)
    assert used <= set(RULES)
    assert {axis for name in used for axis in RULES[name] or ()} <= set(AXES)


def test_a_parameter_that_would_use_a_mesh_axis_twice_is_refused():
    with pytest.raises(ValueError, match="used twice"):
        param_sharding(mesh_of(1, 4), PartitionSpec("embed", "embed"), (16, 16))


def test_an_axis_that_the_mesh_does_not_divide_stays_whole():
    assert param_sharding(mesh_of(1, 4), PartitionSpec("embed", "mlp"), (6, 8)).spec == PartitionSpec(None, None)
    assert param_sharding(mesh_of(1, 4), PartitionSpec("embed", "mlp"), (8, 6)).spec[1] is None
    mesh = make_mesh(MeshConfig(1, 2, 1, 2), 2, jax.devices()[:4])
    for width, spec in ((8, ("fsdp", "context")), (6, ("fsdp",)), (3, None)):
        assert param_sharding(mesh, PartitionSpec("embed"), (width,)).spec == PartitionSpec(spec)


@pytest.mark.parametrize("data, fsdp, expert", [(1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2)])
def test_each_device_holds_its_share_of_every_matrix(data, fsdp, expert):
    mesh = make_mesh(MeshConfig(data, fsdp, expert), 4, jax.devices()[:4])
    for (path, leaf), axes in leaf_axes():
        shard = np.prod(param_sharding(mesh, axes, leaf.shape).shard_shape(leaf.shape))
        pieces = 1 if leaf.ndim == 1 else fsdp if "expert" in axes else fsdp * expert
        assert shard == leaf.size / pieces, path  # norms stay whole, the columns of a router together


def test_rows_of_a_batch_are_split_over_both_axes_in_order():
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3), "loss_mask": np.ones((8, 3), bool)}
    mesh = mesh_of(2, 2, rows=8)
    placed = put_rows(batch, mesh)
    for name, array in placed.items():
        assert array.sharding.is_equivalent_to(batch_sharding(mesh), array.ndim)
        np.testing.assert_array_equal(array, batch[name])
    for i, device in enumerate(mesh.devices.flat):
        (shard,) = (s for s in placed["tokens"].addressable_shards if s.device == device)
        np.testing.assert_array_equal(shard.data, batch["tokens"][2 * i : 2 * i + 2])


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 1, 2), (1, 1, 1, 4)])
def test_a_process_puts_the_rows_that_its_devices_hold(shape):
    """All of them where it has all devices; which they are on several processes, tests/processes tells."""
    mesh = make_mesh(MeshConfig(*shape), 8, jax.devices()[:4])
    np.testing.assert_array_equal(own_rows(mesh, 8), range(8))
    batch = {"tokens": np.arange(32, dtype=np.int32).reshape(8, 4), "document_domains": np.ones((8, 3), np.int32)}
    placed = put_rows(batch, mesh, 8)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
    with pytest.raises(ValueError, match="holds 16 of the 16 rows, but was given 8"):
        put_rows(batch, mesh, 16)


# A custom gradient inside, as the experts have: it sees weights whole and knows of no other device.
@jax.custom_vjp
def product(x_BD, w_DF):
    return x_BD @ w_DF


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


@pytest.mark.parametrize("data, fsdp, devices", [(1, 1, 1), (4, 1, 4), (2, 2, 4)])
def test_mapped_rows_have_the_values_and_summed_gradients_of_all_rows_together(data, fsdp, devices):
    mesh = mesh_of(data, fsdp, rows=8, devices=devices)
    rng = np.random.default_rng(0)
    x_BD, scale_BD, w_DF, c_BF = (
        rng.normal(size=shape).astype(np.float32) for shape in [(8, 3)] * 2 + [(3, 5), (8, 5)]
    )
    mapped = map_tokens(lambda x, scale, w: jnp.square(product(x * scale, w)), mesh, token_args=2)

    def objective(x_BD, w_DF):
        y_BF = mapped(x_BD, scale_BD, w_DF)
        return (y_BF * c_BF).sum(), y_BF

    rows = jax.device_put(x_BD, batch_sharding(mesh))
    weights = jax.device_put(w_DF, replicated(mesh))
    (_, y_BF), (dx_BD, dw_DF) = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(rows, weights)
    h_BF = (x_BD * scale_BD) @ w_DF
    np.testing.assert_allclose(y_BF, h_BF**2, rtol=1e-5)
    np.testing.assert_allclose(dw_DF, (x_BD * scale_BD).T @ (2 * h_BF * c_BF), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx_BD, (2 * h_BF * c_BF) @ w_DF.T * scale_BD, rtol=1e-4, atol=1e-5)


def test_mapped_rows_see_only_their_own_device():
    mesh = mesh_of(2, 2, rows=8)
    sums = jax.jit(map_tokens(lambda x_BD: jnp.broadcast_to(x_BD.sum(), x_BD.shape), mesh, token_args=1))
    x_BD = np.arange(8, dtype=np.float32).reshape(8, 1)
    np.testing.assert_array_equal(sums(x_BD)[:, 0], np.repeat(x_BD.reshape(4, 2).sum(1), 2))

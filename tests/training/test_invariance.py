"""A step is the same step on any mesh, in any microbatches, with any remat policy and with rows of padding."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from emo_jax.model import init_parameters
from emo_jax.parallel import put_rows
from emo_jax.training.step import make_gradients
from tests.training import tiny


def assert_equal_steps(ours, wanted, rtol=1e-9):
    grads, metrics = ours
    metrics.pop("exchange", None)  # of meshes with an expert axis alone
    wanted_grads, wanted_metrics = wanted
    for (path, leaf), other in zip(jax.tree.leaves_with_path(metrics), jax.tree.leaves(wanted_metrics), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=rtol, atol=1e-12, err_msg=jax.tree_util.keystr(path))
    for (path, leaf), other in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(wanted_grads), strict=True):
        scale = np.abs(other).max()
        atol = max(rtol * scale, 1e-14)  # biases of keys have no effect, so rounding alone
        np.testing.assert_allclose(leaf, other, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def wanted():
    with jax.enable_x64(True):
        return tiny.gradients(tiny.config(), tiny.batch())


MESHES = [
    {"data": 4},
    {"fsdp": 4},
    {"expert": 4},
    {"fsdp": 2, "expert": 2, "exchange": "all_to_all", "chunks": 3},
    {"context": 4},
    {"context": 2, "expert": 2, "exchange": "all_to_all"},
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_mesh_does_not_change_a_step(wanted, mesh):
    with jax.enable_x64(True):
        assert_equal_steps(tiny.gradients(tiny.config(mesh=mesh), tiny.batch(), devices=4), wanted)


def test_experts_of_one_rank_may_take_every_token():
    fields = {"pool": {"min": 2, "max": 2, "forced": 2}}  # every document uses the last two experts and no other
    with jax.enable_x64(True):
        whole = tiny.gradients(tiny.config(**fields), tiny.batch())
        split = tiny.gradients(tiny.config(mesh={"expert": 4}, **fields), tiny.batch(), devices=4)
    # 7 and 5 routed experts over 4 ranks of 2: the last two are one rank's, or two ranks'.
    exchange = split[1]["exchange"]
    assert (exchange["rank_load_max_over_mean"] >= 2).all() and (exchange["rank_rounds"] > 1).all()
    assert_equal_steps(split, whole)
    load = whole[1]["routing"]["expert_load"]
    assert all((layer[:-2] == 0).all() and (layer[-2:] > 0).all() for layer in load)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_do_not_change_a_step_with_the_global_balance_loss(wanted, microbatches):
    with jax.enable_x64(True):
        run = tiny.config(train={"microbatches": microbatches})
        assert_equal_steps(tiny.gradients(run, tiny.batch()), wanted)


def test_microbatches_over_devices_do_not_change_a_step(wanted):
    with jax.enable_x64(True):
        run = tiny.config(train={"microbatches": 2}, mesh={"data": 4})
        assert_equal_steps(tiny.gradients(run, tiny.batch(), devices=4), wanted)


SPLIT = {
    "num_experts": 0,
    "experts_per_layer": (),
    "d_dense": 12,
    "split_layers": (0, 2),
    "split_experts": 4,
    "split_top_k": 2,
}
OLDER = {"norm": "layer", "positions": "learned", "max_positions": 12, "feed_forward": "gelu", "biases": True}
OLDER |= {"num_kv_heads": 0, "tied_embeddings": True}


@pytest.mark.parametrize("fields", [OLDER, {"split_gate": "cosine"}, {"split_top_k": 4}], ids=str)
def test_nothing_of_it_changes_a_step_of_a_split_model(fields):
    rest = {"balance": {"kind": "importance", "gate_noise": 0.5}, "pool": {"min": 2, "max": 4}}
    run = tiny.config(model=SPLIT | fields, **rest)
    with jax.enable_x64(True):
        wanted = tiny.gradients(run, tiny.batch())
        for mesh in ({"fsdp": 2, "expert": 2}, {"context": 2, "data": 2}):
            other = tiny.config(model=SPLIT | fields, mesh=mesh, **rest)
            assert_equal_steps(tiny.gradients(other, tiny.batch(), devices=4), wanted)
        other = tiny.config(model=SPLIT | fields | {"remat": "full"}, train={"microbatches": 2}, **rest)
        assert_equal_steps(tiny.gradients(other, tiny.batch()), wanted)
    assert "order" not in wanted[0]["layers"]["00"]["ffn"]


@pytest.mark.parametrize(
    ("remat", "mesh"),
    [("full", {}), ("dots", {}), ("exchange", {"expert": 4}), ("full", {"expert": 4, "exchange": "all_to_all"})],
)
def test_remat_does_not_change_a_step(wanted, remat, mesh):
    with jax.enable_x64(True):
        run = tiny.config(model={"remat": remat}, mesh=mesh)
        assert_equal_steps(tiny.gradients(run, tiny.batch(), devices=4 if mesh else 1), wanted)


@pytest.mark.parametrize("exchange, send, chunks", [("ring", "all_gather", 1), ("all_to_all", "all_to_all", 3)])
def test_tokens_that_crossed_the_expert_axis_are_sent_again_by_full_remat_alone(exchange, send, chunks):
    sends = {}
    for remat in ("full", "exchange"):
        mesh = {"expert": 4, "exchange": exchange, "chunks": chunks, "buffer": 4.0}  # no further rounds
        run = tiny.config(model={"remat": remat, "dtype": "float32"}, mesh=mesh)
        placed = put_rows(tiny.batch(), tiny.devices_mesh(run, 4))
        step = jax.jit(make_gradients(run, tiny.devices_mesh(run, 4)))
        program = step.lower(init_parameters(run.model, 0), placed, np.int32(0)).as_text()
        sends[remat] = program.count(f"stablehlo.{send}")
    layers, arrays = 2, 2 if exchange == "ring" else 1  # weights of choices cross by all-gather
    seen = 1 if chunks == 1 else 3  # two in the body of the loop over chunks, and one left over
    assert sends["full"] - sends["exchange"] >= layers * arrays * seen


def test_rows_of_padding_do_not_change_a_step(wanted):
    with jax.enable_x64(True):
        rows = (*tiny.ROWS, [], [])
        run = tiny.config(data={"batch_size": len(rows)})
        grads, metrics = tiny.gradients(run, tiny.batch(rows=rows))
        metrics["data"] = wanted[1]["data"]  # shares of more positions
        assert_equal_steps((grads, metrics), wanted)


def test_what_padding_contains_does_not_matter(wanted):
    with jax.enable_x64(True):
        batch = tiny.batch()
        padding = batch["document_ids"] == 0
        batch["tokens"][padding], batch["targets"][padding], batch["positions"][padding] = 5, 7, 3
        assert_equal_steps(tiny.gradients(tiny.config(), batch), wanted)


def test_steps_draw_different_pools(wanted):
    with jax.enable_x64(True):
        _, metrics = tiny.gradients(tiny.config(), tiny.batch(), step=1)
    assert (metrics["routing"]["pool_size_mean"] != wanted[1]["routing"]["pool_size_mean"]).any()


@pytest.mark.parametrize("scope", ["global", "microbatch"])
def test_balance_loss_over_devices_is_of_all_devices_together(scope):
    """The trap: f · p̄ formed on each device, then averaged, is a local loss; value and gradient must tell."""
    with jax.enable_x64(True):
        weights = {"balance": {"weight": 10.0, "scope": scope, "router_z_weight": 0.0}}
        whole = tiny.gradients(tiny.config(**weights), tiny.batch())
        split = tiny.gradients(tiny.config(mesh={"data": 4}, **weights), tiny.batch(), devices=4)
        local = {"balance": weights["balance"] | {"scope": "local", "local_rows": 2}}
        trapped = tiny.gradients(tiny.config(mesh={"data": 4}, **local), tiny.batch(), devices=4)
    assert_equal_steps(split, whole)
    assert (np.abs(trapped[1]["routing"]["balance"] - whole[1]["routing"]["balance"]) > 1e-2).all()
    router, wanted_router = (g["layers"]["00"]["moe"]["router"] for g in (trapped[0], whole[0]))
    assert np.linalg.norm(router - wanted_router) > 0.1 * np.linalg.norm(wanted_router)


def test_float32_is_close_to_float64(wanted):
    run = tiny.config(model={"dtype": "float32"})
    _, metrics = tiny.gradients(run, tiny.batch())
    assert metrics["loss"].dtype == np.float32
    # Other initial values than in float64: only the size of the loss is the same.
    assert abs(metrics["cross_entropy"] - wanted[1]["cross_entropy"]) < 2.0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_mesh_of_eight_devices_takes_the_same_step(dtype):
    command, devices = [sys.executable, "-m", "tests.training.eight_devices", dtype], {"JAX_NUM_CPU_DEVICES": "8"}
    subprocess.run(command, env=os.environ | devices, check=True)

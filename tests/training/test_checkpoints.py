"""A checkpoint gives back exactly what was saved, or says that it is damaged and gives the one before."""

import json
import shutil

import grain
import jax
import numpy as np
import pytest

from emo_jax.errors import UserError
from emo_jax.parallel import put_rows
from emo_jax.training.checkpoints import Checkpoints, checksums, load_parameters, same_run
from emo_jax.training.step import init_state, make_train_step
from tests.training import tiny

RUN = {"model": {"dtype": "float32"}}


def iterator():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with checkpoints of steps 1 and 2, and their states as NumPy arrays."""
    run = tiny.config(**RUN)
    folder = tmp_path_factory.mktemp("saved")
    same_run(folder, run)
    mesh = tiny.devices_mesh(run, 1)
    state, step, batches = init_state(run, mesh), make_train_step(run, mesh), iterator()
    checkpoints, states = Checkpoints(folder, run, "hash"), {}
    for number in (1, 2):
        next(batches)
        state, _ = step(state, put_rows(tiny.batch(number), mesh))
        states[number] = jax.tree.map(np.array, jax.device_get(state))
        checkpoints.save(state, batches)
    checkpoints.close()
    return folder, states


def restore(folder, devices=1, tokenizer="hash", **sections):
    run = tiny.config(**(RUN | sections))
    batches, said = iterator(), []
    checkpoints = Checkpoints(folder, run, tokenizer)
    try:
        state = checkpoints.restore(tiny.devices_mesh(run, devices), batches, said.append)
    finally:
        checkpoints.close()
    return state, batches, said


def assert_equal_states(state, wanted):
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("devices", [1, 4])
def test_restores_bit_for_bit_on_any_mesh(saved, devices):
    folder, states = saved
    state, batches, said = restore(folder, devices, mesh={"data": 1, "fsdp": devices})
    assert_equal_states(state, states[2])
    assert next(batches) == 2
    assert not said


def test_parameters_alone_are_the_same(saved):
    folder, states = saved
    config, params, step = load_parameters(folder)
    assert step == 2
    assert config == tiny.config(**RUN)
    assert_equal_states(params, states[2].params)


def flip(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 0xFF for byte in content[middle : middle + 8])
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_costs_at_most_that_checkpoint(saved, tmp_path, damage):
    folder, states = saved
    newest = folder / "checkpoints" / "2"
    files = [path.relative_to(newest) for path in sorted(newest.rglob("*")) if path.is_file() and path.stat().st_size]
    noticed = 0
    for number, name in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        DAMAGE[damage](copy / "checkpoints" / "2" / name)
        state, batches, said = restore(copy)
        assert state is not None, name
        step = int(state.step)
        assert_equal_states(state, states[step])
        assert next(batches) == step
        if step == 1:  # else the file held nothing that counts
            noticed += 1
            assert "checkpoint of step 2 is damaged" in said[0]
            assert (copy / "damaged_checkpoints" / "2").is_dir()
        shutil.rmtree(copy)
    assert noticed >= 3


def test_all_damaged_is_an_error_and_not_a_new_start(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "copy")
    for step in ("1", "2"):
        shutil.rmtree(tmp_path / "copy" / "checkpoints" / step / "state")
    with pytest.raises(UserError, match="Every checkpoint"):
        restore(tmp_path / "copy")


def test_another_tokenizer_is_refused(saved):
    with pytest.raises(UserError, match="tokenizer_hash='hash', this run has 'other'"):
        restore(saved[0], tokenizer="other")


def test_checksums_see_every_bit_and_no_sharding():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(8, 6, 5)).astype(np.float32)
    whole = checksums({"a": jax.numpy.asarray(array)})
    mesh = tiny.devices_mesh(tiny.config(mesh={"data": 4}), 4)
    assert checksums(put_rows({"a": array}, mesh)) == whole
    for _ in range(20):
        changed = array.copy().view(np.uint32)
        changed[tuple(rng.integers(0, array.shape))] ^= np.uint32(1 << rng.integers(0, 32))
        assert checksums({"a": jax.numpy.asarray(changed.view(np.float32))}) != whole
    swapped = array.copy()
    swapped[0, 0, 0], swapped[0, 0, 1] = array[0, 0, 1], array[0, 0, 0]
    assert checksums({"a": jax.numpy.asarray(swapped)}) != whole


def test_a_changed_field_is_refused_with_both_values_and_a_free_one_kept(tmp_path):
    same_run(tmp_path, tiny.config(**RUN))
    same_run(tmp_path, tiny.config(**RUN, mesh={"data": -1}))
    assert json.loads((tmp_path / "config.json").read_text())["mesh"]["data"] == -1
    with pytest.raises(UserError, match=r"pool.max=8, now it is 7"):
        same_run(tmp_path, tiny.config(**RUN, pool={"max": 7}))


def test_a_run_from_before_a_field_existed_goes_on_with_its_default(tmp_path):
    run = tiny.config(**RUN)
    old = json.loads(run.to_json())
    del old["data"]["packing"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    same_run(tmp_path, run)
    with pytest.raises(UserError, match=r"data\.packing='concatenate', now it is 'best_fit'"):
        same_run(tmp_path, tiny.config(**RUN, data={"packing": "best_fit"}))

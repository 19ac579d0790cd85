"""A checkpoint gives back exactly what was saved, or says that it is damaged and gives the one before."""

import json
import shutil

import grain
import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from emo_jax.errors import UserError
from emo_jax.parallel import batch_sharding, put_rows
from emo_jax.training.checkpoints import Checkpoints, check_same_run, checksums, same_run
from emo_jax.training.step import init_state, make_train_step
from emo_jax.training.weights import load_parameters
from tests.training import tiny
from tests.training.test_optimizer import formula

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
    assert checksums({"a": jax.device_put(array, batch_sharding(mesh))}) == whole
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
    with pytest.raises(UserError, match=r"pool\.max=8, now it is 7"):
        same_run(tmp_path, tiny.config(**RUN, pool={"max": 7}))


def test_a_run_from_before_a_field_existed_goes_on_with_its_default(tmp_path):
    run = tiny.config(**RUN)
    old = json.loads(run.to_json())
    del old["data"]["packing"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    same_run(tmp_path, run)
    with pytest.raises(UserError, match=r"data\.packing='concatenate', now it is 'best_fit'"):
        same_run(tmp_path, tiny.config(**RUN, data={"packing": "best_fit"}))


def allowed(old, new, done):
    try:
        check_same_run(old, new, done, "the run")
    except UserError:
        return False
    return True


LENGTHS = st.tuples(st.integers(1, 12), st.integers(0, 6)).filter(lambda pair: pair[1] < pair[0])


@given(st.sampled_from(["cosine", "linear", "constant"]), LENGTHS, LENGTHS, st.integers(1, 12))
def test_a_run_may_change_its_length_exactly_where_no_learning_rate_of_the_past_changes(schedule, first, second, done):
    assume(done <= first[0] and first != second)
    runs = [
        tiny.config(train={"steps": steps}, optimizer={"schedule": schedule, "anneal_steps": anneal})
        for steps, anneal in (first, second)
    ]
    if done > second[0]:  # it would have to forget steps
        assert not allowed(*runs, done)
        return
    rates = [[formula(schedule, s, steps, 0, anneal) for s in range(done)] for steps, anneal in (first, second)]
    if allowed(*runs, done):
        assert rates[0] == rates[1]
    elif done > 2 and schedule != "constant":  # two steps are too few to tell all schedules apart
        assert not np.allclose(*rates, rtol=1e-9)


@given(st.integers(1, 12), *[st.tuples(st.sampled_from(["none", "document", "random"]), st.integers(0, 14))] * 2)
def test_a_run_may_change_its_pools_exactly_where_no_step_of_the_past_has_one(done, first, second):
    runs = [tiny.config(pool={"kind": kind, "start_step": start}) for kind, start in (first, second)]
    unpooled = [kind == "none" or start >= done for kind, start in (first, second)]
    assert allowed(*runs, done) == (first == second or all(unpooled))


@pytest.mark.parametrize(
    "old, new, done, words",
    [
        ((8, 0), (12, 0), 8, "train.steps=8, now it is 12.*set train.steps=12 and optimizer.anneal_steps=4"),
        ((8, 0), (8, 3), 8, "optimizer.anneal_steps=0, now it is 3.*set train.steps=11 and optimizer.anneal_steps=3"),
        ((12, 4), (14, 4), 10, "train.steps=12, now it is 14.*Its anneal began at step 8.*continue_step"),
    ],
)
def test_the_refusal_of_a_length_says_what_would_work(old, new, done, words):
    runs = [tiny.config(train={"steps": s}, optimizer={"schedule": "cosine", "anneal_steps": a}) for s, a in (old, new)]
    with pytest.raises(UserError, match=words):
        check_same_run(*runs, done, "the run")


def test_pools_that_have_begun_cannot_change_and_no_hint_says_otherwise():
    for change, words in (
        ({"max": 7}, "pool.max=8, now it is 7"),
        ({"start_step": 20}, "pool.start_step=0, now it is"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            check_same_run(tiny.config(), tiny.config(pool=change), 20, "the run")
        assert "Pools that come later" not in str(refused.value)
    with pytest.raises(UserError, match=r"pool.start_step=30, now it is 10.*set pool.start_step to 20 or more"):
        check_same_run(*(tiny.config(pool={"start_step": start}) for start in (30, 10)), 20, "the run")


def test_a_dropped_origin_is_named_before_the_tokenizer_that_came_with_it():
    old = tiny.config(train={"init_from": "weights"})
    with pytest.raises(UserError, match=r"train\.init_from='weights', now it is ''"):
        check_same_run(old, tiny.config(), 5, "the run")
    with pytest.raises(UserError, match=r"data\.tokenizer='weights/tokenizer\.json', now it is ''"):
        check_same_run(old, tiny.config(), 5, "the run", ignored=("train.init_from",))

import dataclasses
import itertools
import json

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from emo_jax.data import DataConfig, build_store, heldout_batches, pack_rows, padding_share, row, train_batches
from emo_jax.errors import UserError

NAMES = ("tokens", "targets", "document_ids", "positions", "loss_mask")


def take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def all_rows(split, config):
    rows = pack_rows(split.offsets, config.sequence_length, config.max_documents, config.packing)
    return [row(split, spans, config.sequence_length) for spans in rows]


def as_bytes(values, index=None):
    return b"".join((values[name] if index is None else values[name][index]).tobytes() for name in NAMES)


def test_batches_have_the_shapes_and_types_of_the_contract(store, config):
    (batch,) = take(train_batches(store, config), 1)
    assert tuple(batch) == NAMES
    for name, values in batch.items():
        assert values.shape == (8, 32)
        assert values.dtype == (bool if name == "loss_mask" else np.int32)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_every_row_comes_once_an_epoch_and_epochs_differ(store, config, packing):
    config = dataclasses.replace(config, packing=packing)
    expected = sorted(map(as_bytes, all_rows(store.train, config)))
    count = len(expected)
    batches = take(train_batches(store, config), -(-2 * count // config.batch_size))
    seen = [as_bytes(batch, index) for batch in batches for index in range(config.batch_size)]
    assert sorted(seen[:count]) == expected
    assert sorted(seen[count : 2 * count]) == expected
    assert seen[:count] != seen[count : 2 * count]


PLACES = [[range(4), range(4, 8)], [[0, 1], [2, 3], [4, 5], [6, 7]], [[0, 1, 6, 7], [2, 3, 4, 5]]]
"""Of the eight rows of a batch, those of each process."""


def joined(parts, places):
    """Whole batches from those of processes."""
    order = np.argsort(np.concatenate(places))
    return [
        {name: np.concatenate([p[name] for p in step])[order] for name in step[0]} for step in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("places", PLACES)
def test_global_batches_do_not_depend_on_the_number_of_processes(store, config, places):
    whole = take(train_batches(store, config), 12)
    parts = [take(train_batches(store, config, mine), 12) for mine in places]
    assert_equal(joined(parts, places), whole)


def test_seed_alone_decides_the_order(store, config):
    assert_equal(take(train_batches(store, config), 3), take(train_batches(store, config), 3))
    other = take(train_batches(store, dataclasses.replace(config, shuffle_seed=1)), 1)[0]
    assert not np.array_equal(other["tokens"], take(train_batches(store, config), 1)[0]["tokens"])


@pytest.mark.parametrize("step", [0, 1, 17])
def test_orbax_checkpoint_resumes_at_the_next_batch(store, config, tmp_path, step):
    expected = take(train_batches(store, config), step + 5)
    iterator = iter(train_batches(store, config))
    for _ in range(step):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        state = {"w": np.arange(3)}
        manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(iterator)),
        )
    resumed = iter(train_batches(store, config))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state), data=grain.checkpoint.CheckpointRestore(resumed)
            ),
        )
    assert_equal([next(resumed) for _ in range(5)], expected[step:])


def test_state_of_one_process_resumes_any_number_of_processes(store, config):
    iterator = iter(train_batches(store, config))
    for _ in range(6):
        next(iterator)
    state = iterator.get_state()
    expected = next(iterator)
    halves = []
    for places in PLACES[0]:
        half = iter(train_batches(store, config, places))
        half.set_state(state)
        halves.append([next(half)])
    assert_equal(joined(halves, PLACES[0]), [expected])


def test_store_with_fewer_rows_than_a_batch_repeats_them(config, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "a few words"}\n')
    one = dataclasses.replace(config, path=str(path), heldout_fraction=1e-9)
    store = build_store(one, 300, tmp_path / "store")
    (batch,) = take(train_batches(store, one), 1)
    assert len({as_bytes(batch, index) for index in range(8)}) == len(all_rows(store.train, one))
    with pytest.raises(UserError, match=r"no held-out documents; raise data\.heldout_fraction"):
        heldout_batches(store, one, 8)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("batch_size", [4, 7])
def test_heldout_batches_cover_the_documents_once_in_one_shape(store, config, batch_size, packing):
    config = dataclasses.replace(config, packing=packing)
    expected = all_rows(store.heldout, config)
    dataset = heldout_batches(store, config, batch_size)
    batches = list(dataset)
    assert len(dataset) == len(batches) == -(-len(expected) // batch_size)
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, config.sequence_length)}
    found = [as_bytes(batch, index) for batch in batches for index in range(batch_size)]
    assert found[: len(expected)] == [as_bytes(values) for values in expected]
    padding = b"\0" * len(found[0])
    assert all(values == padding for values in found[len(expected) :])
    assert_equal(list(dataset), batches)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_document_domains_name_the_domain_of_each_token(store, config, packing):
    config = dataclasses.replace(config, packing=packing)
    counts = np.zeros(len(store.domains), int)
    for batch in heldout_batches(store, config, 4):
        domains_BG, ids_BS = batch["document_domains"], batch["document_ids"]
        assert domains_BG.shape == (4, config.max_documents)
        assert domains_BG.dtype == np.int32
        assert ids_BS.max() <= config.max_documents
        domain_BS = np.take_along_axis(domains_BG, np.maximum(ids_BS - 1, 0), axis=1)
        counts += np.bincount(domain_BS[ids_BS > 0], minlength=len(counts))
    by_domain = store.manifest["heldout"]["by_domain"]
    assert counts.tolist() == [by_domain[name]["tokens"] for name in store.domains]


def test_repetitive_rows_are_filtered_in_training_and_not_in_evaluation(config, tmp_path):
    path = tmp_path / "some.jsonl"
    texts = [f"number {n} " + ("q" * 90 if n % 3 == 0 else "some words") for n in range(300)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = dataclasses.replace(config, path=str(path), packing="best_fit", max_repetitions=8)
    store = build_store(config, 257, tmp_path / "store")  # bytes are the tokens
    config = dataclasses.replace(config, sequence_length=128, max_documents=1)
    count = len(pack_rows(store.train.offsets, 128, 1, "best_fit"))
    (epoch,) = take(train_batches(store, dataclasses.replace(config, batch_size=count)), 1)
    routed = epoch["document_ids"].any(axis=1)
    np.testing.assert_array_equal(epoch["loss_mask"].any(axis=1), routed)
    bounds = itertools.pairwise(store.train.offsets)
    texts = [store.tokenizer().decode(store.train.tokens[start:stop].tolist()) for start, stop in bounds]
    assert (~routed).sum() == sum("qqq" in text for text in texts) > 20
    for batch in heldout_batches(store, config, 1):
        assert batch["document_ids"].any()


def test_rows_and_their_padding_are_logged(store, config):
    lines = []
    train_batches(store, config, log=lines.append)
    train_batches(store, dataclasses.replace(config, packing="best_fit"), log=lines.append)
    rows = pack_rows(store.train.offsets, 32, 4, "best_fit")
    assert "concatenate" in lines[0]
    assert lines[1] == f"Rows: {len(rows)} of 32 tokens, best_fit, {100 * padding_share(rows, 32):.1f}% padding."


@pytest.mark.parametrize("places", PLACES)
def test_heldout_batches_do_not_depend_on_the_number_of_processes(store, config, places):
    whole = list(heldout_batches(store, config, 8))
    parts = [list(heldout_batches(store, config, 8, mine)) for mine in places]
    assert_equal(joined(parts, places), whole)


def test_config_refuses_what_cannot_be_packed():
    with pytest.raises(UserError, match=r"data\.max_document_bytes=3 cannot hold every character"):
        DataConfig(max_document_bytes=3).validate()
    with pytest.raises(UserError, match=r"data\.source='jsonl' needs data\.path"):
        DataConfig(source="jsonl").validate()
    with pytest.raises(UserError, match=r"data\.packing='best-fit' .* Did you mean 'best_fit'"):
        DataConfig(packing="best-fit").validate()
    with pytest.raises(UserError, match=r"data\.max_repetitions=1 must be at least 2"):
        DataConfig(max_repetitions=1).validate()

import dataclasses
import itertools
import json
import multiprocessing
import shutil

import numpy as np
import pytest

from emo_jax.data import (
    DataConfig,
    domain_batches,
    first_documents,
    heldout_batches,
    open_store,
    prepare_store,
    row,
    train_batches,
)
from emo_jax.data.config import PrepareConfig
from emo_jax.data.packing import pack_rows
from emo_jax.data.preparation import prepare
from emo_jax.errors import UserError
from tests.data.conftest import VOCAB_SIZE, write_corpus
from tests.data.test_pipeline import PLACES, as_bytes, assert_equal, joined, take

PREPARE = PrepareConfig(vocab_size=VOCAB_SIZE, heldout_fraction=0.2, unit_megabytes=0.006)
ARRAYS = PrepareConfig(source="olmo", heldout_fraction=0.2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same corpus in either layout, in many shards."""
    root = tmp_path_factory.mktemp("prepared")
    path = write_corpus(root / "corpus.jsonl")
    for layout in ("array_record", "olmo"):
        prepare(dataclasses.replace(PREPARE, path=str(path), out=str(root / layout), format=layout))
    return root


@pytest.fixture(params=["array_record", "olmo"])
def layout(request):
    return request.param


@pytest.fixture
def config(folders, layout):
    return DataConfig(source="tokens", path=str(folders / layout), sequence_length=32, batch_size=8, max_documents=4)


@pytest.fixture
def store(config, tmp_path):
    return prepare_store(config, VOCAB_SIZE, tmp_path / "data")


def all_rows(store, config):
    found = []
    for shard in range(store.train.count()):
        split = store.train.open(shard)
        packed = pack_rows(np.array(split.offsets), config.sequence_length, config.max_documents, config.packing)
        found += [as_bytes(row(split, spans, config.sequence_length)) for spans in packed]
    return found


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_every_row_of_every_shard_comes_once_an_epoch(store, config, packing):
    config = dataclasses.replace(config, packing=packing)
    expected = sorted(all_rows(store, config))
    count = len(expected)
    assert store.train.count() > 10
    batches = take(train_batches(store, config), -(-2 * count // config.batch_size))
    seen = [as_bytes(batch, index) for batch in batches for index in range(config.batch_size)]
    assert sorted(seen[:count]) == expected
    assert sorted(seen[count : 2 * count]) == expected
    assert seen[:count] != seen[count : 2 * count]


@pytest.mark.parametrize("places", PLACES)
def test_batches_do_not_depend_on_the_number_of_processes(store, config, places):
    whole = take(train_batches(store, config), 12)
    assert_equal(joined([take(train_batches(store, config, mine), 12) for mine in places], places), whole)
    assert_equal(take(train_batches(store, config), 12), whole)


def test_a_resume_in_another_folder_takes_the_next_batch(store, config, tmp_path):
    expected = take(train_batches(store, config), 9)
    iterator = iter(train_batches(store, config))
    for _ in range(4):
        next(iterator)
    state = iterator.get_state()
    resumed = iter(train_batches(prepare_store(config, VOCAB_SIZE, tmp_path / "other"), config))
    resumed.set_state(state)
    assert_equal([next(resumed) for _ in range(5)], expected[4:])


def test_both_layouts_give_the_same_batches(folders, tmp_path):
    batches = []
    for layout in ("array_record", "olmo"):
        config = DataConfig(source="tokens", path=str(folders / layout), sequence_length=24, batch_size=5)
        store = prepare_store(config, VOCAB_SIZE, tmp_path / layout)
        batches.append(take(train_batches(store, config), 10) + list(heldout_batches(store, config, 4)))
    assert_equal(*batches)


def test_only_the_open_shards_take_memory_and_files(store, config, monkeypatch):
    from emo_jax.data import prepared

    whole = take(train_batches(store, config), 20)
    monkeypatch.setattr(prepared, "_OPEN_SHARDS", 2)
    few = open_store(store.directory)
    assert_equal(take(train_batches(few, config), 20), whole)
    assert few.train.open.cache_info().currsize == 2
    assert few.train.open.cache_info().misses > 20


def test_heldout_documents_are_read_whole_and_never_trained_on(store, config):
    batches = list(heldout_batches(store, config, 4))
    counts = np.zeros(len(store.domains), int)
    for batch in batches:
        domains = np.take_along_axis(batch["document_domains"], np.maximum(batch["document_ids"] - 1, 0), axis=1)
        counts += np.bincount(domains[batch["document_ids"] > 0], minlength=len(counts))
    by_domain = store.manifest["heldout"]["by_domain"]
    assert counts.tolist() == [by_domain[name]["tokens"] for name in store.domains]
    assert len(store.heldout) > 20
    train = first_documents(store.train, store.domains)
    spans = {train.tokens[a:b].tobytes() for a, b in itertools.pairwise(train.offsets)}
    heldout = {store.heldout.tokens[a:b].tobytes() for a, b in itertools.pairwise(store.heldout.offsets)}
    assert len(spans) == len(train) == len(store.train)
    assert not spans & heldout


def test_documents_of_each_domain_are_found_for_evaluation(store, config):
    few = first_documents(store.train, store.domains, 3)
    assert np.bincount(few.domains).tolist() == [3] * len(store.domains)
    everything = first_documents(store.train, store.domains)
    assert len(everything.tokens) == len(store.train.tokens)
    tokenizer = store.tokenizer()
    words = {"animals": "otter", "plants": "fern", "stones": "slate"}
    for index, name in enumerate(store.domains):
        text = "".join(
            tokenizer.decode(everything.tokens[a:b].tolist())
            for (a, b), domain in zip(itertools.pairwise(everything.offsets), everything.domains, strict=True)
            if domain == index
        )
        assert [word in text for word in words.values()] == [name == own for own in words]
    assert set(domain_batches(few, store.domains, config, 4)) == set(store.domains)


def _fill(config, directory):
    store = prepare_store(config, VOCAB_SIZE, directory)
    next(iter(train_batches(store, config)))


def test_several_processes_may_open_one_store_at_once(config, tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_fill, args=(config, tmp_path / "data")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    names = sorted(file.name for file in (tmp_path / "data").iterdir() if file.is_dir())
    assert names == ["rows-concatenate-32-4"]


def test_a_mixture_of_prepared_folders_takes_rows_by_weight(folders, tmp_path):
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps({"text": f"words {n} of the second corpus"}) + "\n" for n in range(300)))
    tokenizer = str(folders / "olmo" / "tokenizer.json")
    prepare(dataclasses.replace(PREPARE, path=str(path), out=str(tmp_path / "more"), tokenizer=tokenizer))
    mixture = (f"words=0.75:tokens:{folders / 'olmo'}", f"more=0.25:tokens:{tmp_path / 'more'}")
    config = DataConfig(source="mixture", mixture=mixture, sequence_length=32, batch_size=8)
    lines = []
    store = prepare_store(config, VOCAB_SIZE, tmp_path / "data", lines.append)
    assert store.domains == ("animals", "more", "plants", "stones")
    batches = take(train_batches(store, config, log=lines.append), 40)
    rows = np.concatenate([batch["tokens"] for batch in batches])
    decoder = store.tokenizer()
    texts = [decoder.decode(tokens.tolist()) for tokens in rows]
    second = sum(any(part in text for part in ("words", "second", "corpus")) for text in texts)
    assert second == pytest.approx(len(rows) / 4, abs=2)
    assert any(line.startswith("  more: ") and "25.0% of a batch" in line for line in lines)
    names = {store.domains[index] for index in np.unique(store.heldout.domains)}
    assert names == set(store.domains)
    refused = dataclasses.replace(config, mixture=(mixture[0], f"more=0.25:jsonl:{path}"))
    with pytest.raises(UserError, match="has parts of source 'tokens' beside others: prepare the others too"):
        refused.validate()
    other = tmp_path / "another"
    prepare(dataclasses.replace(PREPARE, path=str(path), out=str(other)))
    refused = dataclasses.replace(config, mixture=(mixture[0], f"more=0.25:tokens:{other}"))
    with pytest.raises(UserError, match=r"another has another tokenizer .*prepare one again with --tokenizer="):
        prepare_store(refused, VOCAB_SIZE, tmp_path / "refused")


def test_arrays_of_others_are_read_where_they_lie(folders, tmp_path):
    arrays = tmp_path / "arrays"
    shutil.copytree(folders / "olmo" / "train", arrays / "train")
    mix = "# a comment\n\n" + (folders / "olmo" / "mix.txt").read_text()
    (arrays / "mix.txt").write_text(mix)
    for file in arrays.rglob("*.offsets.npy"):
        file.unlink()
    tokenizer = str(folders / "olmo" / "tokenizer.json")
    config = dataclasses.replace(ARRAYS, path=str(arrays / "mix.txt"), out=str(tmp_path / "out"), tokenizer=tokenizer)
    manifest = prepare(config)
    assert not list((tmp_path / "out").rglob("part-*.npy")) or all(
        file.name.endswith(".offsets.npy") for file in (tmp_path / "out").rglob("part-*")
    )
    run = DataConfig(source="tokens", path=str(tmp_path / "out"), sequence_length=32, batch_size=8)
    store = prepare_store(run, VOCAB_SIZE, tmp_path / "data")
    whole = prepare_store(dataclasses.replace(run, path=str(folders / "olmo")), VOCAB_SIZE, tmp_path / "whole")
    train = first_documents(store.train, store.domains)
    before = first_documents(whole.train, whole.domains)
    spans = [train.tokens[a:b].tobytes() for a, b in itertools.pairwise(train.offsets)]
    known = [before.tokens[a:b].tobytes() for a, b in itertools.pairwise(before.offsets)]
    heldout = [store.heldout.tokens[a:b].tobytes() for a, b in itertools.pairwise(store.heldout.offsets)]
    assert set(spans) < set(known)
    assert set(heldout) < set(known)
    assert not set(spans) & set(heldout)
    assert len(spans) == manifest["train"]["documents"]
    assert 0.1 < len(heldout) / len(known) < 0.6
    take(train_batches(store, run), 3)
    with pytest.raises(UserError, match=r"is no number of uint32 tokens|has token \d+, but --tokenizer"):
        first = next(arrays.rglob("part-*.npy"))
        first.write_bytes(first.read_bytes()[:-1])
        prepare(dataclasses.replace(config, out=str(tmp_path / "again")))
    with pytest.raises(UserError, match=r"part-.*\.npy has \d+ bytes, .*manifest\.json says"):
        store = prepare_store(run, VOCAB_SIZE, tmp_path / "third")
        train_batches(store, run)


def test_16_bit_arrays_give_the_same_documents(folders, tmp_path):
    for file in (folders / "olmo" / "train").rglob("part-*.npy"):
        if not file.name.endswith(".offsets.npy"):
            target = tmp_path / "arrays" / file.relative_to(folders / "olmo")
            target.parent.mkdir(parents=True, exist_ok=True)
            np.fromfile(file, "<u4").astype("<u2").tofile(target)
    stores = []
    for root, kind in ((tmp_path / "arrays", "uint16"), (folders / "olmo", "uint32")):
        shutil.copy(folders / "olmo" / "mix.txt", tmp_path / "mix.txt")
        mix = tmp_path / f"{kind}.txt"
        lines = (tmp_path / "mix.txt").read_text().splitlines()
        mix.write_text("".join(f"{label},{root}/{name}\n" for label, name in (line.split(",") for line in lines)))
        out = tmp_path / kind
        tokenizer = str(folders / "olmo" / "tokenizer.json")
        prepare(dataclasses.replace(ARRAYS, path=str(mix), out=str(out), tokenizer=tokenizer, token_type=kind))
        run = DataConfig(source="tokens", path=str(out), sequence_length=32, batch_size=8)
        stores.append(take(train_batches(prepare_store(run, VOCAB_SIZE, tmp_path / f"data-{kind}"), run), 5))
    assert_equal(*stores)


def test_what_does_not_fit_is_refused_by_name(folders, config, tmp_path):
    def refuse(change, message, vocab_size=VOCAB_SIZE):
        with pytest.raises(UserError, match=message):
            prepare_store(dataclasses.replace(config, **change), vocab_size, tmp_path / "refused")

    refuse({}, r"model\.vocab_size=300 is too small .*whose largest id is \d+", 300)
    refuse({"path": str(tmp_path)}, "is not a prepared folder: it has no manifest.json")
    refuse({"end_of_text": "</s>"}, r"data\.end_of_text='</s>', but the documents .* end with '<\|endoftext\|>'")
    other = tmp_path / "other.json"
    text = (folders / "olmo" / "tokenizer.json").read_text()
    other.write_text(text.replace('"<|endoftext|>"', '"<|end|>"'))
    shutil.copy(folders / "olmo" / "tokenizer.json", tmp_path / "same.json")
    same = dataclasses.replace(config, tokenizer=str(tmp_path / "same.json"))
    assert prepare_store(same, VOCAB_SIZE, tmp_path / "same").tokenizer_hash
    refuse({"tokenizer": str(other)}, "end_of_text")
    with pytest.raises(UserError, match=r"is a prepared folder, not a token store: give it as data\.path"):
        prepare_store(config, VOCAB_SIZE, config.path)


def test_tokens_that_changed_since_the_run_began_are_refused(config, store, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(config.path, copy)
    config = dataclasses.replace(config, path=str(copy))
    prepare_store(config, VOCAB_SIZE, tmp_path / "moved")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "0" * 64}))
    again = prepare_store(config, VOCAB_SIZE, tmp_path / "moved")
    with pytest.raises(UserError, match=r"holds other tokens \(fingerprint 000000000000\) than this run began with"):
        len(again.train)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    shard = copy / manifest["shards"][0]["file"]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"copy or prepare"):
        train_batches(prepare_store(config, VOCAB_SIZE, tmp_path / "cut"), config)
    shard.unlink()
    with pytest.raises(UserError, match=r"part-00000-00000\S* (is missing|has 0 bytes).*copy or prepare"):
        train_batches(prepare_store(config, VOCAB_SIZE, tmp_path / "gone"), config)


def test_settings_that_a_prepared_folder_decided_do_not_matter(config, store, tmp_path):
    changed = dataclasses.replace(config, max_document_bytes=77, heldout_documents=3, shuffle_seed=9)
    again = prepare_store(changed, VOCAB_SIZE, store.directory)
    assert again.fingerprint == store.fingerprint
    with pytest.raises(UserError, match=r"was made with data\.path=.*this run asks for"):
        prepare_store(dataclasses.replace(config, path=str(tmp_path)), VOCAB_SIZE, store.directory)

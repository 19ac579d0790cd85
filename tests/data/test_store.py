import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from emo_jax.data import build_store, encode, is_heldout, open_store, prepare_store
from emo_jax.errors import UserError

VOCAB_SIZE = 320  # as in conftest.py


def documents_of(store, split):
    offsets, tokenizer = split.offsets, store.tokenizer()
    for start, stop, domain in zip(offsets, offsets[1:], split.domains, strict=False):
        assert split.tokens[stop - 1] == store.end_of_text_id
        yield tokenizer.decode(split.tokens[start : stop - 1].tolist()), store.domains[domain]


def written(path):
    return [tuple(json.loads(line).values()) for line in pathlib.Path(path).read_text().splitlines()]


def test_store_holds_every_document_once_on_the_side_its_hash_says(store, config):
    source = set(written(config.path))
    train, heldout = list(documents_of(store, store.train)), list(documents_of(store, store.heldout))
    assert len(train) + len(heldout) == len(source)
    assert set(train) | set(heldout) == source
    assert {text for text, _ in heldout} == {text for text, _ in source if is_heldout(text, config.heldout_fraction)}


def test_training_documents_are_shuffled_and_heldout_ones_sorted_by_domain(store, config):
    order = [text for text, _ in written(config.path)]
    places = [order.index(text) for text, _ in documents_of(store, store.train)]
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.3
    assert (np.diff(store.heldout.domains) >= 0).all()


def test_manifest_counts_agree_with_the_documents(store, config):
    assert store.domains == ("animals", "plants", "stones")
    for name in ("train", "heldout"):
        split, counts = getattr(store, name), store.manifest[name]
        documents = list(documents_of(store, split))
        assert counts["documents"] == len(split) == len(documents)
        assert counts["tokens"] == len(split.tokens)
        assert counts["bytes"] == sum(len(text.encode()) for text, _ in documents)
        for domain, count in counts["by_domain"].items():
            texts = [text for text, its_domain in documents if its_domain == domain]
            assert count["documents"] == len(texts)
            assert count["bytes"] == sum(len(text.encode()) for text in texts)
            assert count["tokens"] == sum(len(ids) + 1 for ids in encode(store.tokenizer(), texts))


def test_equal_settings_give_equal_stores(store, config, tmp_path):
    again = build_store(config, VOCAB_SIZE, tmp_path / "again")
    assert again.manifest == store.manifest
    other = build_store(dataclasses.replace(config, shuffle_seed=1), VOCAB_SIZE, tmp_path / "other")
    assert other.fingerprint != store.fingerprint
    assert sorted(documents_of(other, other.train)) == sorted(documents_of(store, store.train))


def test_copies_are_dropped_and_counted_and_pieces_stay_on_one_side(config, tmp_path):
    path = tmp_path / "long.jsonl"
    texts = [f"{number} " + f"word{number} " * 300 for number in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts + texts[:7]))
    config = dataclasses.replace(config, path=str(path), max_document_bytes=400)
    store = build_store(config, VOCAB_SIZE, tmp_path / "store")
    assert store.manifest["duplicates_dropped"] == 7
    sides = [
        {text.split("word")[-1].split()[0] for text, _ in documents_of(store, s)} for s in (store.train, store.heldout)
    ]
    assert not sides[0] & sides[1]
    assert len(store.train) > 4 * len(sides[0])


def test_heldout_cap_takes_first_pieces_of_many_documents(config, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n}th text " + "word " * 300}) + "\n" for n in range(80)))
    config = dataclasses.replace(config, path=str(path), max_document_bytes=400, heldout_documents=6)
    store = build_store(config, VOCAB_SIZE, tmp_path / "store")
    texts = [text for text, _ in documents_of(store, store.heldout)]
    assert len(texts) == 6
    assert all("th text" in text for text in texts)


def test_limit_on_megabytes_is_spread_evenly_and_a_small_domain_leaves_its_rest(config, tmp_path):
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for domain, count in (("large", 1500), ("middle", 700), ("small", 100)):
            for number in range(count):
                file.write(json.dumps({"text": f"{domain} {number:05} " + "x" * 985, "domain": domain}) + "\n")
    config = dataclasses.replace(config, path=str(path), max_megabytes=1)
    manifest = build_store(config, VOCAB_SIZE, tmp_path / "store").manifest
    train, heldout = manifest["train"]["by_domain"], manifest["heldout"]["by_domain"]
    assert 960_000 < manifest["train"]["bytes"] * 1.25 < 1_040_000
    assert train["small"]["documents"] + heldout["small"]["documents"] == 100
    assert abs(train["large"]["bytes"] - train["middle"]["bytes"]) < 60_000


def test_wide_vocabulary_is_stored_in_four_bytes(store, config, tmp_path):
    config = dataclasses.replace(config, tokenizer=str(store.tokenizer_path))
    wide = build_store(config, 70_000, tmp_path / "wide")
    assert wide.train.tokens.dtype == np.uint32
    assert store.train.tokens.dtype == np.uint16
    np.testing.assert_array_equal(wide.train.tokens, store.train.tokens)
    assert wide.tokenizer_hash == store.tokenizer_hash


def test_reuse_does_not_read_the_source_again(config, corpus, tmp_path):
    config = dataclasses.replace(config, path=str(corpus))
    first = prepare_store(config, VOCAB_SIZE, tmp_path / "store")
    corpus.unlink()
    messages = []
    changed = dataclasses.replace(config, sequence_length=64, batch_size=2, max_documents=9, cache_dir="elsewhere")
    changed = dataclasses.replace(changed, packing="best_fit", max_repetitions=32)
    again = prepare_store(changed, VOCAB_SIZE, tmp_path / "store", messages.append)
    assert again.manifest == first.manifest
    assert "Reusing" in messages[-1]


def test_store_made_before_a_setting_existed_counts_as_made_with_its_default(config, tmp_path):
    store = build_store(config, VOCAB_SIZE, tmp_path / "store")
    newer = ("text_field", "labels", "special_tokens", "sequence_length")
    older = {name: value for name, value in store.manifest["settings"].items() if name not in newer}
    (store.directory / "manifest.json").write_text(json.dumps(store.manifest | {"settings": older}))
    assert prepare_store(config, VOCAB_SIZE, store.directory).fingerprint == store.fingerprint
    with pytest.raises(UserError, match=r"data\.text_field='text', this run asks for 'body'"):
        prepare_store(dataclasses.replace(config, text_field="body"), VOCAB_SIZE, store.directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heldout_fraction": 0.3}, r"data\.heldout_fraction=0\.2, this run asks for 0\.3"),
        ({"shuffle_seed": 5}, r"data\.shuffle_seed=0, this run asks for 5"),
        ({"max_document_bytes": 50}, r"data\.max_document_bytes=12000, this run asks for 50"),
    ],
)
def test_store_made_with_other_settings_is_refused_with_both_values(store, config, change, message):
    with pytest.raises(UserError, match=message + r".*workdir.*delete"):
        prepare_store(dataclasses.replace(config, **change), VOCAB_SIZE, store.directory)
    with pytest.raises(UserError, match=r"model\.vocab_size=320, this run asks for 321"):
        prepare_store(config, 321, store.directory)


def test_folders_that_are_no_store_are_refused(store, config, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="is not a token store"):
        prepare_store(config, VOCAB_SIZE, tmp_path)
    with pytest.raises(UserError, match="is not empty"):
        build_store(config, VOCAB_SIZE, tmp_path)
    with pytest.raises(UserError, match="is not a token store"):
        open_store(tmp_path / "none")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        prepare_store(config, VOCAB_SIZE, "gs://bucket/run")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_shortened_token_file_and_other_format_are_refused(config, tmp_path):
    store = build_store(config, VOCAB_SIZE, tmp_path / "store")
    os.truncate(store.directory / "train.bin", 100)
    with pytest.raises(UserError, match=r"train\.bin has 100 bytes.*rebuild"):
        _ = open_store(store.directory).train
    (store.directory / "manifest.json").write_text(json.dumps(store.manifest | {"format_version": 0}))
    with pytest.raises(UserError, match="has token format 0, this version reads 1"):
        open_store(store.directory)


def test_source_without_training_text_says_so_and_leaves_nothing_behind(config, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text('{"text": " "}\n')
    few = dataclasses.replace(config, path=str(path))
    with pytest.raises(UserError, match="holds no text"):
        prepare_store(few, VOCAB_SIZE, tmp_path / "store")
    path.write_text('{"text": "lonely"}\n')
    with pytest.raises(UserError, match=r"data\.heldout_fraction=0\.999999 leaves none of 1 documents"):
        prepare_store(dataclasses.replace(few, heldout_fraction=0.999999), VOCAB_SIZE, tmp_path / "store")
    assert {entry.name for entry in tmp_path.iterdir()} == {"few.jsonl", ".store.lock"}


def test_build_killed_in_the_middle_leaves_no_store_and_the_next_one_succeeds(config, tmp_path):
    directory = tmp_path / "store"
    code = (
        "import sys; from emo_jax.data import DataConfig, prepare_store; "
        "prepare_store(DataConfig(source='jsonl', path=sys.argv[1]), 320, sys.argv[2])"
    )
    source = tmp_path / "input.jsonl"
    source.write_bytes(pathlib.Path(config.path).read_bytes() * 1000)
    process = subprocess.Popen([sys.executable, "-c", code, str(source), str(directory)])
    building = tmp_path / ".store.building"
    deadline = time.monotonic() + 60
    while not (building / "texts").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (building / "texts").exists()
    assert not directory.exists()
    store = prepare_store(config, VOCAB_SIZE, directory)
    assert len(store.train) > 0
    assert not building.exists()


def _prepare(config, directory, results):
    results.put(prepare_store(config, VOCAB_SIZE, directory).fingerprint)


def test_two_processes_that_need_a_store_share_one(config, store, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_prepare, args=(config, tmp_path / "store", results)) for _ in range(2)]
    for process in processes:
        process.start()
    fingerprints = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert fingerprints == [store.fingerprint] * 2

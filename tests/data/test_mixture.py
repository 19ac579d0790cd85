"""Mixtures: what is read, and that any mixture, packing and process count gives each document once an epoch."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.data import DataConfig, Split, TokenStore, build_store, heldout_batches, prepare_store, train_batches
from emo_jax.errors import UserError

NAMES = ("tokens", "targets", "document_ids", "positions", "loss_mask")


@pytest.fixture
def texts(tmp_path):
    """Three sources: JSON lines with a domain, JSON lines without, a folder of text files."""
    lines = [{"text": f"a named document, number {n}", "domain": "named"} for n in range(60)]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"text": f"something without a domain {n}"} for n in range(40)]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "files").mkdir()
    for n in range(50):
        (tmp_path / "files" / f"{n}.txt").write_text(f"text of file {n}")
    return tmp_path


def mixture(texts, *weights, **fields) -> DataConfig:
    sources = ("one={}:jsonl:{}/named.jsonl", "two={}:jsonl:{}/plain.jsonl", "three={}:text:{}/files")
    parts = tuple(source.format(weight, texts) for source, weight in zip(sources, weights, strict=False))
    fields = {"sequence_length": 16, "batch_size": 4, "heldout_fraction": 0.2} | fields
    return DataConfig(source="mixture", mixture=parts, **fields)


def test_a_mixture_holds_every_part_apart_and_names_what_has_no_domain(texts):
    store = build_store(mixture(texts, 1, 1, 1), 300, texts / "store")
    assert store.domains == ("named", "three", "two")
    assert [name for name, _, _ in store.parts] == ["one", "two", "three"]
    bounds = [0, *(stop for _, _, stop in store.parts)]
    assert [start for _, start, _ in store.parts] == bounds[:-1] and bounds[-1] == len(store.train)
    tokenizer, split = store.tokenizer(), store.train
    beginnings = {"one": "a named", "two": "something", "three": "text of"}
    for name, start, stop in store.parts:
        for document in range(start, stop):
            text = tokenizer.decode(split.tokens[split.offsets[document] : split.offsets[document + 1]].tolist())
            assert text.startswith(beginnings[name])
    numbers = [int(n) for n in split.domains[: bounds[1]]]
    assert len(set(numbers)) == 1
    assert sum(len(batch["tokens"]) for batch in heldout_batches(store, mixture(texts, 1, 1, 1), 4)) > 0


def test_weights_choose_rows_and_not_tokens(texts):
    first = prepare_store(mixture(texts, 1, 2, 1), 300, texts / "store")
    lines = []
    second = prepare_store(mixture(texts, 5, 1, 1), 300, texts / "store", lines.append)
    assert lines == [f"Reusing the tokens in {texts / 'store'}."]
    assert second.fingerprint == first.fingerprint
    with pytest.raises(UserError, match=r"was made with data\.mixture="):
        prepare_store(mixture(texts, 1, 2), 300, texts / "store")


def test_a_mixture_of_one_part_trains_on_the_rows_of_its_source(texts):
    alone = DataConfig(source="jsonl", path=f"{texts}/named.jsonl", sequence_length=16, batch_size=4)
    mixed = dataclasses.replace(mixture(texts, 3), heldout_fraction=alone.heldout_fraction)
    batches = {}
    for name, config in (("alone", alone), ("mixed", mixed)):
        batches[name] = take(train_batches(build_store(config, 300, texts / name), config), 9)
    for ours, theirs in zip(batches["mixed"], batches["alone"], strict=True):
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])


def test_a_part_without_text_of_its_own_is_refused_by_name(texts):
    config = mixture(texts, 1)
    config.mixture += (f"copy=1:jsonl:{texts}/named.jsonl",)
    with pytest.raises(UserError, match=r"part 'copy' \(jsonl .*named\.jsonl\) holds no text of its own"):
        build_store(config, 300, texts / "store")
    assert not (texts / "store").exists()


@pytest.mark.parametrize("loaded", [False, True])
def test_documents_may_end_without_a_token(texts, loaded):
    config = mixture(texts, 1, 1, 1, end_of_text="")
    if loaded:
        tokenizer = build_store(mixture(texts, 1, 1, 1), 300, texts / "other").tokenizer_path
        config = dataclasses.replace(config, tokenizer=str(tokenizer))
    store = build_store(config, 300, texts / "store")
    assert store.end_of_text_id == -1
    split, tokenizer = store.train, store.tokenizer()
    read = [tokenizer.decode(split.tokens[a:b].tolist()) for a, b in itertools.pairwise(split.offsets)]
    assert all(text.startswith(("a named", "something", "text of")) for text in read)
    assert len(set(read)) == len(read) == len(split)
    (batch,) = take(train_batches(store, config), 1)
    ends = np.flatnonzero(np.diff(batch["document_ids"][0]) != 0)
    assert not batch["loss_mask"][0][ends].any()


# Any mixture


def take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


class Store(TokenStore):
    """Tokens in memory: document d of all is d, d, d, …"""

    def __init__(self, lengths_by_part):
        lengths = [length for lengths in lengths_by_part for length in lengths]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        bounds = np.cumsum([0, *map(len, lengths_by_part)]).tolist()
        parts = [[str(i), start, stop] for i, (start, stop) in enumerate(itertools.pairwise(bounds))]
        split = Split(np.repeat(np.arange(len(lengths)), lengths), offsets, np.zeros(len(lengths), np.int32))
        super().__init__(None, {"parts": parts, "domains": ["all"]})
        self.__dict__["train"] = split  # in place of the cached property


PARTS = st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=12), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(PARTS, st.data())
def test_every_document_comes_once_an_epoch_whatever_the_mixture_packing_and_processes(lengths_by_part, data):
    store = Store(lengths_by_part)
    weights = [data.draw(st.integers(1, 9)) / 4 for _ in lengths_by_part]
    config = DataConfig(
        source="mixture",
        mixture=tuple(f"{i}={weight}:installed_text" for i, weight in enumerate(weights)),
        sequence_length=data.draw(st.integers(2, 16)),
        batch_size=data.draw(st.sampled_from([2, 4, 6])),
        max_documents=data.draw(st.integers(1, 5)),
        packing=data.draw(st.sampled_from(["concatenate", "best_fit"])),
        shuffle_seed=data.draw(st.integers(0, 3)),
    )
    part_of = np.repeat(np.arange(len(lengths_by_part)), [len(lengths) for lengths in lengths_by_part])
    count = -(-60 // config.batch_size)
    whole = take(train_batches(store, config), count)
    rows = [{name: batch[name][r] for name in NAMES} for batch in whole for r in range(config.batch_size)]

    # A row holds one part; the parts' shares of any stretch are their weights.
    row_parts = [set(part_of[row["tokens"][row["document_ids"] > 0]]) for row in rows]
    assert all(len(parts) == 1 for parts in row_parts)
    order = np.array([parts.pop() for parts in row_parts])
    for part, weight in enumerate(weights):
        expected = weight / sum(weights) * np.arange(1, len(order) + 1)
        assert (np.abs(np.cumsum(order == part) - expected) <= len(weights)).all()

    # Each part: every token of every document once before any row of it comes again.
    for part, lengths in enumerate(lengths_by_part):
        documents = np.flatnonzero(part_of == part)
        seen, epoch = np.zeros(len(part_of), int), 0
        for row in (row for row, its in zip(rows, order, strict=True) if its == part):
            tokens = row["tokens"][row["document_ids"] > 0]
            seen += np.bincount(tokens, minlength=len(part_of))
            if seen[documents].sum() == sum(lengths):
                np.testing.assert_array_equal(seen[documents], lengths)
                seen, epoch = np.zeros(len(part_of), int), epoch + 1
        assert (seen[documents] <= lengths).all()

    # Any number of processes sees the same, from any place on.
    processes = data.draw(st.sampled_from([p for p in (1, 2, 3, 4) if config.batch_size % p == 0]))
    stop = data.draw(st.integers(0, count - 1))
    iterator = iter(train_batches(store, config))
    for _ in range(stop):
        next(iterator)
    state = iterator.get_state()
    shares = []
    for p in range(processes):
        size = config.batch_size // processes
        share = iter(train_batches(store, config, range(p * size, (p + 1) * size)))
        share.set_state(state)
        shares.append([next(share) for _ in range(min(3, count - stop))])
    for k, parts in enumerate(zip(*shares, strict=True)):
        for name in NAMES:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[stop + k][name])

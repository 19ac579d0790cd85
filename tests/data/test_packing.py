import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.data import Split, is_repetitive, pack_rows, padding_share, row, row_domains

DOCUMENTS = st.lists(st.lists(st.integers(1, 99), min_size=0, max_size=12), min_size=1, max_size=30)


def split_of(documents):
    """Documents as lists of tokens, an end token 0 behind each."""
    tokens = [token for document in documents for token in [*document, 0]]
    lengths = [len(document) + 1 for document in documents]
    domains = np.arange(len(documents), dtype=np.int32)
    return Split(np.array(tokens, np.uint16), np.concatenate(([0], np.cumsum(lengths))).astype(np.int64), domains)


def naive_rows(documents, sequence_length, max_documents):
    """Rows as lists of (document, tokens), filled one token at a time."""
    rows, current, size = [], [], 0
    for index, document in enumerate(documents):
        new = True
        for token in [*document, 0]:
            if size == sequence_length or (new and len(current) == max_documents):
                rows.append(current)
                current, size, new = [], 0, True
            if new:
                current.append((index, []))
                new = False
            current[-1][1].append(token)
            size += 1
    return [*rows, current]


def naive_batch_row(runs, sequence_length, max_documents):
    expected = {name: [] for name in ("tokens", "targets", "document_ids", "positions", "loss_mask")}
    for number, (_, tokens) in enumerate(runs, start=1):
        for position, token in enumerate(tokens):
            last = position == len(tokens) - 1
            expected["tokens"].append(token)
            expected["targets"].append(0 if last else tokens[position + 1])
            expected["document_ids"].append(number)
            expected["positions"].append(position)
            expected["loss_mask"].append(not last)
    padding = sequence_length - len(expected["tokens"])
    expected = {name: values + [0] * padding for name, values in expected.items()}
    domains = [index for index, _ in runs]
    return expected | {"document_domains": domains + [0] * (max_documents - len(domains))}


@settings(deadline=None)
@given(DOCUMENTS, st.integers(2, 16), st.integers(1, 6))
def test_rows_are_those_that_filling_token_by_token_gives(documents, sequence_length, max_documents):
    split = split_of(documents)
    rows = pack_rows(split.offsets, sequence_length, max_documents)
    assert_rows(split, rows, naive_rows(documents, sequence_length, max_documents), sequence_length, max_documents)


def assert_rows(split, rows, expected, sequence_length, max_documents):
    assert rows.spans.dtype == rows.offsets.dtype == np.int64
    assert len(rows) == len(expected)
    for r, runs in enumerate(expected):
        found = row(split, rows[r], sequence_length)
        found["document_domains"] = row_domains(split, rows[r], max_documents)
        for name, values in naive_batch_row(runs, sequence_length, max_documents).items():
            assert found[name].dtype == (bool if name == "loss_mask" else np.int32)
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def starts_of(rows):
    assert len(rows.spans) == len(rows)
    assert (rows.spans[1:, 0] == rows.spans[:-1, 1]).all()
    return np.append(rows.spans[:, 0], rows.spans[-1, 1])


def naive_best_fit(documents, sequence_length, max_documents):
    """Rows as `naive_rows` gives them, by looking at every row for every piece."""
    full, rest = [], []
    for index, document in enumerate(documents):
        tokens = [*document, 0]
        while len(tokens) >= sequence_length:
            full.append([(index, tokens[:sequence_length])])
            tokens = tokens[sequence_length:]
        if tokens:
            rest.append((index, tokens))
    rows = []
    for piece in sorted(rest, key=lambda piece: -len(piece[1])):
        sizes = [sum(len(tokens) for _, tokens in row) for row in rows]
        fits = [
            r for r, row in enumerate(rows) if sizes[r] + len(piece[1]) <= sequence_length and len(row) < max_documents
        ]
        if fits:
            rows[max(fits, key=lambda r: (sizes[r], -r))].append(piece)
        else:
            rows.append([piece])
    return full + [sorted(row) for row in rows]


@settings(deadline=None)
@given(DOCUMENTS, st.integers(2, 16), st.integers(1, 6))
def test_best_fit_rows_are_those_that_looking_at_every_row_gives(documents, sequence_length, max_documents):
    split = split_of(documents)
    rows = pack_rows(split.offsets, sequence_length, max_documents, "best_fit")
    expected = naive_best_fit(documents, sequence_length, max_documents)
    assert_rows(split, rows, expected, sequence_length, max_documents)
    padding = len(expected) * sequence_length - len(split.tokens)
    assert padding_share(rows, sequence_length) == pytest.approx(padding / (len(expected) * sequence_length))


@settings(deadline=None)
@given(DOCUMENTS, st.data(), st.sampled_from(["concatenate", "best_fit"]), st.sampled_from(["first", "last"]))
def test_a_document_has_one_loss_of_its_label_and_types_from_its_second_part_on(documents, data, packing, label_at):
    split = split_of(documents)
    sizes = np.diff(split.offsets)
    labels = np.array([data.draw(st.integers(-1, 3)) for _ in documents], np.int32)
    seconds = np.array([data.draw(st.integers(0, size)) for size in sizes.tolist()])
    labelled = dataclasses.replace(split, answers=seconds, labels=labels)
    sequence_length, max_documents = data.draw(st.integers(2, 16)), data.draw(st.integers(1, 6))
    found = {}
    for spans in pack_rows(split.offsets, sequence_length, max_documents, packing):
        plain = row(split, spans, sequence_length)
        values = row(labelled, spans, sequence_length, label_at=label_at)
        assert values.keys() == plain.keys() | {"token_types"}
        for name in ("tokens", "document_ids", "positions"):
            np.testing.assert_array_equal(values[name], plain[name])
        untyped = row(dataclasses.replace(labelled, answers=None), spans, sequence_length, label_at=label_at)
        assert untyped.keys() == plain.keys()
        np.testing.assert_array_equal(untyped["loss_mask"], values["loss_mask"])
        assert not values["targets"][~values["loss_mask"]].any()
        owners = row_domains(split, spans, max_documents)  # each document has a domain of its own
        for s in np.flatnonzero(values["document_ids"]):
            seen = [int(values[name][s]) for name in ("token_types", "loss_mask", "targets")]
            found.setdefault(owners[values["document_ids"][s] - 1], []).append(seen)
    for document, (size, second, label) in enumerate(zip(sizes, seconds, labels, strict=True)):
        types, losses, targets = np.array(found[document]).T
        assert types.tolist() == [0] * second + [1] * (size - second)
        read = 0 if label_at == "first" else size - 1
        assert np.flatnonzero(losses).tolist() == [read]
        assert targets[read] == max(label, 0)


@pytest.mark.parametrize("max_documents", [1, 3, 64])
def test_best_fit_over_many_windows_holds_every_token_once_and_cuts_only_long_documents(max_documents):
    lengths = np.random.default_rng(0).integers(1, 300, 30_000)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    rows = pack_rows(offsets, 128, max_documents, "best_fit")
    starts, stops = rows.spans[np.argsort(rows.spans[:, 0])].T
    assert starts[0] == 0
    assert stops[-1] == offsets[-1]
    assert (starts[1:] == stops[:-1]).all()
    row_sizes = np.add.reduceat(rows.spans[:, 1] - rows.spans[:, 0], rows.offsets[:-1])
    assert row_sizes.max() <= 128
    assert np.diff(rows.offsets).min() >= 1
    assert np.diff(rows.offsets).max() <= max_documents
    cuts = np.setdiff1d(starts, offsets)
    assert len(cuts) == ((lengths - 1) // 128).sum()
    again = pack_rows(offsets, 128, max_documents, "best_fit")
    np.testing.assert_array_equal(again.spans, rows.spans)
    if max_documents == 64:
        assert padding_share(rows, 128) < 0.01
        assert padding_share(pack_rows(offsets, 128, max_documents), 128) < 1e-4


def naive_is_repetitive(tokens, times):
    windows = [(start, p) for p in range(1, 14) for start in range(len(tokens) - p * times + 1)]
    return any(tokens[start : start + p] * times == tokens[start : start + p * times] for start, p in windows)


@settings(deadline=None, max_examples=300)
@given(st.data(), st.integers(2, 5))
def test_repetition_filter_agrees_with_comparing_every_window(data, times):
    few = st.lists(st.integers(0, 2), max_size=12)
    unit = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=15))
    tokens = data.draw(few) + unit * data.draw(st.integers(0, 6)) + unit[: data.draw(st.integers(0, 15))]
    tokens += data.draw(few)
    assert is_repetitive(np.array(tokens, np.int32), times) == naive_is_repetitive(tokens, times)


@pytest.mark.parametrize(
    ("period", "times", "filtered"), [(1, 32, 1), (1, 31, 0), (13, 32, 1), (13, 31, 0), (14, 32, 0)]
)
def test_filtered_row_keeps_its_tokens_only(period, times, filtered):
    split = split_of([[7, 8], list(range(1, period + 1)) * times, [9]])
    (spans,) = pack_rows(split.offsets, 512, 8)
    kept, found = row(split, spans, 512), row(split, spans, 512, 32)
    np.testing.assert_array_equal(found["tokens"], kept["tokens"])
    for name in ("targets", "document_ids", "positions", "loss_mask"):
        np.testing.assert_array_equal(found[name], 0 * kept[name] if filtered else kept[name])


def test_padding_is_no_repetition():
    split = split_of([[7, 8]])
    assert row(split, np.array([[0, 3]]), 512, 32)["document_ids"].any()


def test_rows_cover_every_token_once_in_a_large_store():
    lengths = np.random.default_rng(0).integers(1, 60, 20_000)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    for max_documents in (1, 3, 64):
        starts = starts_of(pack_rows(offsets, 128, max_documents))
        assert starts[0] == 0
        assert starts[-1] == offsets[-1]
        assert (np.diff(starts) > 0).all()
        assert (np.diff(starts) <= 128).all()
        counts = np.searchsorted(offsets, starts[1:]) - (np.searchsorted(offsets, starts[:-1], side="right") - 1)
        assert counts.max() <= max_documents


def test_remainder_of_one_end_token_is_a_document_without_target():
    split = split_of([[5, 6, 7], [8]])
    found = row(split, np.array([[3, 6]]), 4)
    assert found["tokens"].tolist() == [0, 8, 0, 0]
    assert found["document_ids"].tolist() == [1, 2, 2, 0]
    assert found["positions"].tolist() == [0, 0, 1, 0]
    assert found["loss_mask"].tolist() == [False, True, False, False]


@pytest.mark.parametrize("max_documents", [1, 3])
def test_row_of_padding_is_all_zero(max_documents):
    split = split_of([[5, 6, 7]])
    nothing = np.zeros((0, 2), np.int64)
    assert not any(values.any() for values in row(split, nothing, 4, 2).values())
    assert row_domains(split, nothing, max_documents).tolist() == [0] * max_documents


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_no_documents_make_no_rows(packing):
    rows = pack_rows(np.zeros(1, np.int64), 8, 2, packing)
    assert len(rows) == 0
    assert padding_share(rows, 8) == 0

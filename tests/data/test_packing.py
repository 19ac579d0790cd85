import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.data import Split, pack_rows, row, row_domains

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
    starts = pack_rows(split.offsets, sequence_length, max_documents)
    expected = naive_rows(documents, sequence_length, max_documents)
    assert starts.dtype == np.int64
    assert len(starts) - 1 == len(expected)
    for start, stop, runs in zip(starts, starts[1:], expected, strict=False):
        found = row(split, int(start), int(stop), sequence_length)
        found["document_domains"] = row_domains(split, int(start), int(stop), max_documents)
        for name, values in naive_batch_row(runs, sequence_length, max_documents).items():
            assert found[name].dtype == (bool if name == "loss_mask" else np.int32)
            np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_rows_cover_every_token_once_in_a_large_store():
    lengths = np.random.default_rng(0).integers(1, 60, 20_000)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    for max_documents in (1, 3, 64):
        starts = pack_rows(offsets, 128, max_documents)
        assert starts[0] == 0
        assert starts[-1] == offsets[-1]
        assert (np.diff(starts) > 0).all()
        assert (np.diff(starts) <= 128).all()
        counts = np.searchsorted(offsets, starts[1:]) - (np.searchsorted(offsets, starts[:-1], side="right") - 1)
        assert counts.max() <= max_documents


def test_remainder_of_one_end_token_is_a_document_without_target():
    split = split_of([[5, 6, 7], [8]])
    found = row(split, 3, 6, 4)
    assert found["tokens"].tolist() == [0, 8, 0, 0]
    assert found["document_ids"].tolist() == [1, 2, 2, 0]
    assert found["positions"].tolist() == [0, 0, 1, 0]
    assert found["loss_mask"].tolist() == [False, True, False, False]


@pytest.mark.parametrize("max_documents", [1, 3])
def test_row_of_padding_is_all_zero(max_documents):
    split = split_of([[5, 6, 7]])
    assert not any(values.any() for values in row(split, 0, 0, 4).values())
    assert row_domains(split, 0, 0, max_documents).tolist() == [0] * max_documents


def test_no_documents_make_no_rows():
    assert pack_rows(np.zeros(1, np.int64), 8, 2).tolist() == [0]

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emo_jax.data import deduplication
from emo_jax.data.deduplication import DigestWriter, bucket_count, duplicates_of, find_duplicates
from emo_jax.data.documents import digest


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=5), st.sampled_from([1, 2, 7]))
def test_all_but_the_first_of_equal_texts_are_found(units, buckets):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(deduplication, "_SEGMENT", 4)  # several a unit
        files, repeated = [], []
        for number, texts in enumerate(units):
            writer = DigestWriter(Path(folder, f"{number}"))
            for place, text in enumerate(texts):
                writer.add(digest(str(text)), 2 * place)  # a document in between was dropped
            writer.close()
            files.append((f"{folder}/{number}", writer.segments))
            repeated.append(writer.repeated.tobytes())
        for bucket in range(buckets):
            find_duplicates(folder, f"places{bucket}", bucket, buckets, files)
        names = [f"{folder}/places{bucket}" for bucket in range(buckets)]
        found = [
            duplicates_of(number, len(units), 2 * len(texts), names, repeated[number])
            for number, texts in enumerate(units)
        ]
    seen = set()
    for texts, marks in zip(units, found, strict=True):
        for place, text in enumerate(texts):
            assert marks[2 * place] == (text in seen)
            seen.add(text)
        assert not marks[1::2].any()


def test_buckets_grow_with_the_corpus_and_share_all_digests():
    assert bucket_count(0) == bucket_count(100) == 1
    assert bucket_count(10**8) == -(-(10**8) // 2**19)
    assert bucket_count(10**13) == 4096
    for buckets in (1, 3, 191, 4096):
        bounds = [bucket * 4096 // buckets for bucket in range(buckets + 1)]
        assert np.all(np.diff(bounds) > 0)
        assert sum(b - a for a, b in itertools.pairwise(bounds)) == 4096

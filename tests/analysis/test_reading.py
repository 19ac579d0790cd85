"""Documents and what routers do with them, against NumPy and the tokenizer's own bytes."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from emo_jax.analysis import reading
from emo_jax.analysis.reading import (
    Text,
    choose_documents,
    document_means,
    first_tokens,
    label,
    read_routers,
    read_texts,
)
from emo_jax.api import Model
from emo_jax.data import Document, train_tokenizer
from emo_jax.errors import UserError
from emo_jax.modularity import Subset
from tests import oracle
from tests.modularity import small

TOKENIZER = train_tokenizer(["the rose and the moon, the sea and the heart; ääää 👩💻👩💻 straße"] * 9, 300, "<end>")
TEXTS = [
    Text("the rose and the moon", "poems"),
    Text("", "poems"),
    Text("Straße 👩‍💻", "other"),
    Text("the sea " * 20, "poems"),
]


def byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for the characters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


@given(st.text(max_size=60), st.integers(1, 70))
def test_a_piece_ends_where_the_last_whole_character_of_its_bytes_does(text, tokens):
    ids, pieces = first_tokens(TOKENIZER, text, tokens)
    every = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert ids == every[:tokens] and len(pieces) == len(ids)
    alphabet, seen = byte_alphabet(), b""
    for place, token in enumerate(ids):
        seen += bytes(alphabet[symbol] for symbol in TOKENIZER.id_to_token(token))
        assert "".join(pieces[: place + 1]) == seen.decode("utf-8", errors="ignore")
    if tokens >= len(every):
        assert "".join(pieces) == text


def test_pieces_join_to_the_text_whatever_the_tokenizer_leaves_out():
    trimming = Tokenizer.from_str(TOKENIZER.to_str())
    trimming.post_processor = processors.ByteLevel(trim_offsets=True)
    words = Tokenizer(models.WordLevel({"a": 0, "rose": 1, "?": 2}, unk_token="?"))
    words.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for tokenizer in (trimming, words):
        text = "  A rose  is a\n rose \n"
        ids, pieces = first_tokens(tokenizer, text, 99)
        assert "".join(pieces) == text and len(ids) == len(pieces)
        assert text.startswith("".join(first_tokens(tokenizer, text, 3)[1]))
    assert first_tokens(words, "  A rose is", 99)[1] == ["  A", " rose", " is"]


def test_a_long_text_is_tokenized_as_far_as_it_is_read():
    text = "the rose and " * 5000
    assert first_tokens(TOKENIZER, text, 50)[0] == TOKENIZER.encode(text).ids[:50]
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    long = " ".join(["x" * 500] * 8)  # words longer than what is looked at first
    assert first_tokens(words, long, 7) == ([0] * 7, ["x" * 500, *[" " + "x" * 500] * 6])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return path


@pytest.mark.parametrize("always", [(), (1,)])
def test_routers_decide_as_the_model_does_document_by_document(tokenizer, always, monkeypatch):
    monkeypatch.setattr(reading, "_ROWS", 2)  # several batches, the last not full
    with jax.enable_x64(True):
        config = dataclasses.replace(
            small.config(always_active_experts=("1", "1") if always else ()), vocab_size=TOKENIZER.get_vocab_size()
        )
        params = small.parameters(config)
        read = read_routers(Model(config, params, tokenizer, 0), TEXTS, 16, "tiny")
    assert read.name == "tiny" and [p.shape[1] for p in read.probability_LNR] == [7, 9]
    assert set(read.document_N.tolist()) == {0, 2, 3} and (np.diff(read.document_N) >= 0).all()
    assert "".join(piece for piece, n in zip(read.pieces, read.document_N, strict=True) if n == 2) == TEXTS[2].text
    settings = oracle.Settings.of(config, always_active=always)
    for document in (0, 2, 3):
        ids = TOKENIZER.encode(TEXTS[document].text).ids[:16]
        mine = read.document_N == document
        assert read.token_N[mine].tolist() == ids
        places = np.arange(len(ids))[None]
        batch = {"tokens": np.array([ids]), "document_ids": np.ones_like(places), "positions": places}
        routings = oracle.forward(params, batch, settings).routings
        for probability_NR, chosen_NC, wanted in zip(read.probability_LNR, read.chosen_LNC, routings, strict=True):
            np.testing.assert_allclose(probability_NR[mine], wanted.probabilities_BSR[0], rtol=1e-3, atol=1e-7)
            np.testing.assert_array_equal(chosen_NC[mine], wanted.indices_BSC[0])
        if always:
            assert (read.chosen_LNC[0][:, 0] == 1).all()
    assert read.probability_LNR[0].dtype == np.float16 and read.chosen_LNC[0].dtype == np.int16

    labels = label(read, TEXTS)
    assert labels.names == ["other", "poems"] and labels.domain_M.tolist() == [1, 0, 1]
    assert [TEXTS[n].domain for n in read.document_N] == [labels.names[d] for d in labels.domain_N]
    for layer, means_MR in enumerate(document_means(read)):
        for row, document in enumerate((0, 2, 3)):
            wanted = read.probability_LNR[layer][read.document_N == document].astype(np.float64).mean(axis=0)
            np.testing.assert_allclose(means_MR[row], wanted, rtol=1e-5)
    part = read.select(read.document_N == 2)
    assert label(part, TEXTS).names == ["other"] and "".join(part.pieces) == TEXTS[2].text


def test_what_cannot_be_read_is_told_in_words(tokenizer):
    config = dataclasses.replace(small.config(dtype="float32"), vocab_size=TOKENIZER.get_vocab_size())
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), small.parameters(config))
    model = Model(config, params, tokenizer, 0)
    for documents, words in (([], "None of the 0 documents"), ([Text("", "")], "None of the 1 documents")):
        with pytest.raises(UserError, match=words):
            read_routers(model, documents, 5)
    with pytest.raises(UserError, match="tokens=0 must be at least 1"):
        read_routers(model, TEXTS, 0)
    with pytest.raises(UserError, match="has no tokenizer"):
        read_routers(Model(config, params), TEXTS, 5)
    everything = Subset(tuple(tuple(range(r)) for r in config.routed_experts), model.fingerprint)
    with pytest.raises(UserError, match=r"is masked; look at model.cut\(subset\)"):
        read_routers(model.apply_subset(everything), TEXTS, 5)
    dense = dataclasses.replace(config, experts_per_layer=(), num_experts=0)
    with pytest.raises(UserError, match="is dense"):
        read_routers(Model(dense, {}, tokenizer, 0), TEXTS, 5, "x")


def test_documents_are_chosen_evenly_whatever_their_order():
    documents = [
        Document(f"{name} {n}", name) for name, count in zip("abc", (50, 3, 30), strict=True) for n in range(count)
    ]
    chosen = choose_documents(documents, 20, seed=0)
    count = {name: sum(text.domain == name for text in chosen) for name in "abc"}
    assert count == {"a": 9, "b": 3, "c": 8} and [t.domain for t in chosen] == sorted(t.domain for t in chosen)
    shuffled = documents[:]
    random.Random(0).shuffle(shuffled)
    assert choose_documents(shuffled, 20, seed=0) == chosen != choose_documents(documents, 20, seed=1)
    assert sorted(t.text for t in choose_documents(documents, 0, seed=0)) == sorted(d.text for d in documents)
    # Fewer are a part of more, and those of a domain do not depend on the others.
    assert set(choose_documents(documents, 10, seed=0)) <= set(chosen)
    assert choose_documents([d for d in documents if d.domain == "b"], 20, 0) == [t for t in chosen if t.domain == "b"]
    with pytest.raises(UserError, match="no documents"):
        choose_documents([], 5, 0)


def test_texts_are_json_lines_or_files_in_folders(tmp_path):
    lines = [{"text": "one", "domain": "d"}, {"text": "two"}, {"prompt": "a", "answer": "b", "domain": "e"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = choose_documents(read_texts(str(tmp_path)), 0, 0)
    assert sorted(found) == [("ab", "e"), ("one", "d"), ("two", "")]
    folder = tmp_path / "books"
    (folder / "poems").mkdir(parents=True)
    (folder / "poems" / "a.txt").write_text("rose")
    (folder / "b.md").write_text("moon")
    assert sorted(choose_documents(read_texts(str(folder)), 0, 0)) == [("moon", ""), ("rose", "poems")]
    assert choose_documents(read_texts(str(folder / "b.md")), 0, 0) == [("moon", "")]
    assert len(choose_documents(read_texts(f"{folder}/*/*.txt"), 0, 0)) == 1
    for path in ("missing.jsonl", "missing"):
        with pytest.raises(UserError, match="does not exist"):
            list(read_texts(str(tmp_path / path)))

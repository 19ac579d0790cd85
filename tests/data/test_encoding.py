"""Texts with labels as tokens, against calls of the tokenizer itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from emo_jax.data import load_tokenizer, train_tokenizer
from emo_jax.data.encoding import Encoded, encode_labelled
from emo_jax.errors import UserError

END = "<|endoftext|>"
WORDS = st.lists(st.sampled_from(["a", "cat", "moss", "search", "Flint,", "žába", "[SEP]", "x1"]), max_size=12)
TEXT = WORDS.map(" ".join)


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("byte_pairs") / "tokenizer.json"
    train_tokenizer(["cat moss search Flint, žába x1 " * 9], 280, END).save(str(path))
    return path


def independent(path, text, pair, *, length, special):
    """Ids, types and whether anything was left out, by the tokenizer's own truncation."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True
    texts = (text, pair) if pair else (text,)
    whole = tokenizer.encode(*texts, add_special_tokens=special)
    tokenizer.enable_truncation(length, strategy="longest_first")
    fitting = tokenizer.encode(*texts, add_special_tokens=special)
    return fitting.ids, fitting.type_ids, len(whole.ids) > length


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.integers(4, 30))
def test_special_tokens_and_types_are_those_the_tokenizer_puts_and_stay_when_texts_are_cut(wordpiece, pairs, length):
    tokenizer = load_tokenizer(wordpiece, "", 1000)
    found = encode_labelled(tokenizer, pairs, sequence_length=length, special_tokens=True)
    for (text, pair), encoded in zip(pairs, found, strict=True):
        ids, types, cut = independent(wordpiece, text, pair, length=length, special=True)
        second = types.index(1) if pair else len(types)
        assert encoded == Encoded(ids, second, cut)
        assert len(ids) <= length
        assert ids[0] == 2 and ids[-1] == 3  # [CLS] and [SEP]
        assert types == [0] * second + [1] * (len(ids) - second)
        assert ids.count(3) == (2 if pair else 1)
        if pair:
            assert ids[second - 1] == 3


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.integers(2, 30))
def test_without_special_tokens_a_text_is_followed_by_its_pair_alone(byte_pairs, pairs, length):
    tokenizer = load_tokenizer(byte_pairs, END, 1000)
    found = encode_labelled(tokenizer, pairs, sequence_length=length, special_tokens=False)
    for (text, pair), encoded in zip(pairs, found, strict=True):
        ids, _, cut = independent(byte_pairs, text, pair, length=length, special=False)
        assert encoded == Encoded(ids, 0, cut)
        if not cut:
            assert encoded.tokens == tokenizer.encode(text).ids + tokenizer.encode(pair).ids


def test_two_long_texts_are_cut_without_joining_every_piece_of_one_with_every_piece_of_the_other(wordpiece):
    tokenizer = load_tokenizer(wordpiece, "", 1000)
    pair = ("cat " * 20_000, "moss " * 20_000)
    (encoded,) = encode_labelled(tokenizer, [pair], sequence_length=9, special_tokens=True)
    tokens = " ".join(tokenizer.id_to_token(token) for token in encoded.tokens)
    assert (tokens, encoded.second, encoded.cut) == ("[CLS] ca ##t ca [SEP] mo ##ss mo [SEP]", 5, True)


def test_templates_that_cannot_work_are_refused(wordpiece, byte_pairs):
    def encode(tokenizer, length=16):
        return list(encode_labelled(tokenizer, [("cat moss", "moss")], sequence_length=length, special_tokens=True))

    with pytest.raises(UserError, match=r"data\.special_tokens=True, but the template .* adds no tokens"):
        encode(load_tokenizer(byte_pairs, END, 1000))
    tokenizer = load_tokenizer(wordpiece, "", 1000)
    assert encode(tokenizer, 4)
    with pytest.raises(UserError, match=r"data\.sequence_length=3 leaves no room for a text"):
        encode(tokenizer, 3)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [CLS]:2", pair="$A $B:1 [CLS]:2", special_tokens=[("[CLS]", 2)]
    )
    with pytest.raises(UserError, match=r"gives tokens the types \[0, 1, 2\]"):
        encode(tokenizer)


def test_a_template_without_types_has_no_second_part(wordpiece):
    tokenizer = load_tokenizer(wordpiece, "", 1000)
    tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    (encoded,) = encode_labelled(tokenizer, [("a", "x")], sequence_length=16, special_tokens=True)
    assert encoded.second == len(encoded.tokens) == 6

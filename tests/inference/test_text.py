"""From tokens to text: stop sequences, what may be shown when, and how a completion ends."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_jax.api import Model
from emo_jax.data import encode, train_tokenizer
from emo_jax.errors import UserError
from emo_jax.inference.text import _overlap, _Row
from emo_jax.model import ModelConfig, init_parameters

END = "<end>"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["ab abc bca äöü 中文 " * 20], 280, END)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    config = ModelConfig(
        vocab_size=288, d_model=32, num_layers=1, num_heads=2, num_experts=6, top_k=3, d_expert=16, dtype="float32"
    )
    file = tmp_path_factory.mktemp("model") / "tokenizer.json"
    tokenizer.save(str(file))
    params = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, init_parameters(config, 1))
    return Model(config, params, file, end_of_text_id=0)


class Stream:
    """Gives a token's characters, as a real stream does for a tokenizer of single characters."""

    def step(self, _, token):
        return chr(token)


TEXTS = st.text(alphabet="ab\n", max_size=12)


@given(TEXTS, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=3), max_size=2))
def test_what_is_shown_piece_by_piece_is_the_text_up_to_the_first_stop(text, stop):
    row, shown = _Row(stop, Stream()), ""
    for character in text:
        if row.stopped:
            break
        shown += row.add(ord(character), object(), -1)
        assert not any(word in shown for word in stop)
    shown += "" if row.stopped else row.release(True)
    wanted = text
    for n in range(len(text) + 1):  # the first prefix that holds a stop sequence ends the text
        found = [text[:n].find(word) for word in stop if word in text[:n]]
        if found:
            wanted = text[: min(found)]
            break
    assert shown == row.text == wanted
    assert (row.stopped == "stop") == any(word in text for word in stop)


def test_an_overlap_is_the_longest_end_that_begins_the_word():
    assert [_overlap(*pair) for pair in [("xab", "abc"), ("xa", "abc"), ("x", "abc"), ("abc", "abc"), ("", "a")]] == [
        2,
        1,
        0,
        0,
        0,
    ]


def test_characters_of_several_tokens_appear_whole(tokenizer):
    text = "bca 中文 äb"
    (tokens,) = encode(tokenizer, [text])
    from tokenizers.decoders import DecodeStream

    row = _Row((), DecodeStream(skip_special_tokens=True))
    pieces = [row.add(token, tokenizer, 0) for token in tokens]
    assert "".join(pieces) == row.text == text
    assert "\ufffd" not in "".join(pieces) and "" in pieces  # of a character's first bytes nothing is shown
    assert row.add(0, tokenizer, 0) == "" and row.stopped == "end_of_text" and row.text == text


def test_texts_and_tokens_give_the_same_completions_and_pieces_add_up(model, tokenizer):
    prompts = ["ab abc", "bca äö"]
    pieces = {0: "", 1: ""}

    def show(row, text):
        pieces[row] += text

    found = model.generate(prompts, max_new_tokens=12, on_text=show)
    assert [pieces[row] for row in (0, 1)] == [completion.text for completion in found]
    assert found == model.generate(encode(tokenizer, prompts), max_new_tokens=12)
    assert found[0] == model.generate(prompts[0], max_new_tokens=12)[0]
    for completion in found:
        assert completion.stopped == ("end_of_text" if completion.tokens[-1] == 0 else "length")
        assert len(completion.tokens) == 12 or completion.stopped == "end_of_text"
        assert max(completion.tokens) < tokenizer.get_vocab_size() <= model.config.vocab_size


def test_a_stop_sequence_ends_its_row_alone(model):
    prompts = ["ab abc", "bca äö"]
    whole = model.generate(prompts, max_new_tokens=12)
    stop = next(c.text[2:4] for c in whole if len(c.text) > 4)
    stopped = model.generate(prompts, max_new_tokens=12, stop=stop)
    for before, after in zip(whole, stopped, strict=True):
        if stop in before.text:
            assert (after.text, after.stopped) == (before.text[: before.text.find(stop)], "stop")
            assert after.tokens == before.tokens[: len(after.tokens)] != []
        else:
            assert after == before
    assert any(completion.stopped == "stop" for completion in stopped)


def test_the_end_token_ends_a_row(model):
    tokens = model.generate("ab abc", max_new_tokens=6)[0].tokens
    ended = Model(model.config, model.params, model.tokenizer, end_of_text_id=tokens[3])
    first = tokens.index(tokens[3])
    completion = ended.generate("ab abc", max_new_tokens=6)[0]
    assert (completion.tokens, completion.stopped) == (tokens[: first + 1], "end_of_text")


def test_a_pool_and_a_subset_change_what_may_be_used(model):
    subset = model.select(["ab abc bca", ("ab", " abc")], keep=4)
    assert [len(experts) for experts in subset.experts] == [3]
    confined = model.apply_subset(subset).generate("ab abc", max_new_tokens=8)
    small = model.cut(subset).generate("ab abc", max_new_tokens=8)
    assert confined == small
    assert model.generate("ab abc", max_new_tokens=8, pool="prompt:5") == model.generate("ab abc", max_new_tokens=8)


def test_bad_calls_are_refused_in_words(model):
    bare = Model(model.config, model.params)
    for call, words in [
        (lambda: bare.generate("ab"), "has no tokenizer.json, so prompts must be token ids"),
        (lambda: bare.generate([[1]], stop="x"), r"stop=\['x'\] is text, and the model has no tokenizer"),
        (lambda: bare.select(["ab"], keep=4), "no tokenizer.json to read the examples"),
        (lambda: model.select([], keep=4), "no examples"),
        (lambda: model.generate("ab", max_new_tokens=0), "max_new_tokens=0 must be at least 1"),
        (lambda: model.generate("ab", stop=[""]), "A stop sequence is empty"),
        (lambda: model.generate([]), "There is no prompt"),
        (lambda: model.generate(""), "A prompt is empty"),
    ]:
        with pytest.raises(UserError, match=words):
            call()
    assert len(bare.generate([[1, 2]], max_new_tokens=3)[0].tokens) == 3

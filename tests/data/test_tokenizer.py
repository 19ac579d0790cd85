import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from emo_jax.data import encode, load_tokenizer, train_tokenizer
from emo_jax.errors import UserError

END = "<|endoftext|>"


def sentences(count=400):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(80)]
    return [" ".join(rng.choices(words, k=12)) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(sentences(), 300, END)


@pytest.fixture
def saved(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@settings(deadline=None)
@given(st.text())
def test_any_unicode_text_survives_the_round_trip(tokenizer, text):
    (ids,) = encode(tokenizer, [text])
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_training_reaches_the_vocabulary_size_and_is_deterministic(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    assert sorted(tokenizer.get_vocab().values()) == list(range(300))
    assert tokenizer.token_to_id(END) == 0
    assert train_tokenizer(sentences(), 300, END).to_str() == tokenizer.to_str()


def test_small_corpus_yields_fewer_entries_with_ids_below_the_size():
    small = train_tokenizer(["ab ab"], 1000, END)
    assert 257 <= small.get_vocab_size() < 300
    assert max(small.get_vocab().values()) == small.get_vocab_size() - 1


@pytest.mark.parametrize("loaded", [False, True])
def test_end_token_spelled_out_in_a_text_is_not_the_end_token(tokenizer, saved, loaded):
    tested = load_tokenizer(saved, END, 300) if loaded else tokenizer
    text = f"before{END}after {END}"
    (ids,) = encode(tested, [text])
    assert 0 not in ids
    assert tested.decode(ids, skip_special_tokens=False) == text


def test_end_token_listed_as_an_ordinary_one_cannot_be_injected_either(tmp_path):
    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    other.train_from_iterator(["ab"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    other.add_tokens(["</s>"])
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json", "</s>", 1000)
    assert loaded.token_to_id("</s>") == other.token_to_id("</s>")
    assert loaded.token_to_id("</s>") not in encode(loaded, ["a</s>b"])[0]


def test_released_recipes_kind_of_tokenizer_loads_and_keeps_every_id(tmp_path):
    """Byte-level BPE, added tokens, special and ordinary ones, behind its vocabulary."""
    base = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated", invert=False)
    base.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    base.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base.train_from_iterator(
        sentences(), trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    )
    content = json.loads(base.to_str())
    names = ["<|extra_id_0|>", END, "<|fim_prefix|>", "|||PHONE_NUMBER|||", "<|im_start|>", "<|pad|>"]
    ids = list(range(290, 296))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] = [
        {"id": number, "content": name, "special": not name.startswith("|||"), **flags}
        for number, name in zip(ids, names, strict=True)
    ]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    loaded = load_tokenizer(path, END, 384)  # 296 ids, padded as a model pads them
    assert [loaded.token_to_id(name) for name in names] == ids
    text = f"abc def 12345{END}<|pad|> ž <|im_start|>"
    (encoded,) = encode(loaded, [text])
    assert max(encoded) < 290
    assert loaded.decode(encoded) == text
    assert encode(loaded, ["a|||PHONE_NUMBER|||b"])[0][1:2] == [293]
    saved = tmp_path / "again.json"
    loaded.save(str(saved))
    assert encode(load_tokenizer(saved, END, 384), [text]) == [encoded]
    with pytest.raises(UserError, match=r"model\.vocab_size=295 .* at least 296"):
        load_tokenizer(path, END, 295)
    with pytest.raises(UserError, match=r"data\.end_of_text='<eos>' is not a token .* it has '<\|endoftext\|>'"):
        load_tokenizer(path, "<eos>", 384)


def test_padding_truncation_and_templates_of_a_file_add_and_drop_nothing(saved):
    content = json.loads(saved.read_text())
    file = Tokenizer.from_str(json.dumps(content))
    file.enable_truncation(3)
    file.enable_padding(length=50)
    from tokenizers.processors import TemplateProcessing

    file.post_processor = TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, 0)])
    file.save(str(saved))
    texts = ["abcdefgh abcdefgh", "a"]
    loaded = load_tokenizer(saved, END, 300)
    assert [loaded.decode(ids) for ids in encode(loaded, texts)] == texts


def test_missing_file_and_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.tokenizer=.*is not a file"):
        load_tokenizer(tmp_path / "none.json", END, 300)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path / "config.json", END, 300)


def test_absent_end_token_is_answered_with_those_the_file_has(saved):
    with pytest.raises(UserError, match=r"data\.end_of_text='</s>' is not a token .* it has '<\|endoftext\|>'"):
        load_tokenizer(saved, "</s>", 300)


def test_ids_beyond_the_models_vocabulary_are_refused_with_both_numbers(saved):
    with pytest.raises(UserError, match=r"model\.vocab_size=299 .* largest id is 299.* at least 300"):
        load_tokenizer(saved, END, 299)
    with pytest.raises(UserError, match=r"model\.vocab_size=256 .* at least 257"):
        train_tokenizer(["a"], 256, END)

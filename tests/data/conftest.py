"""A small corpus of three domains, and the store made of it."""

import json
import pathlib
import random
import string

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from emo_jax.data import DataConfig, prepare_store

VOCAB_SIZE = 320
_WORDS = {
    "animals": "cat dog horse sparrow whale lynx otter badger heron",
    "plants": "oak fern moss birch lily thistle clover willow reed",
    "stones": "granite basalt chalk flint marble slate opal quartz",
}


def write_corpus(path: pathlib.Path, documents: int = 240) -> pathlib.Path:
    rng = random.Random(7)
    with path.open("w") as file:
        for number in range(documents):
            domain = list(_WORDS)[number % 3]
            text = " ".join(rng.choices(_WORDS[domain].split(), k=rng.randint(1, 60))) + f" {number}\n"
            file.write(json.dumps({"text": text, "domain": domain}) + "\n")
    return path


def write_wordpiece(path: pathlib.Path) -> pathlib.Path:
    """A tokenizer as BERT's: pieces of a letter or a few, [CLS] and [SEP] around texts, types 0 and 1."""
    letters = [*string.ascii_lowercase, *string.digits, "ca", "mo"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{piece}" for piece in [*letters, "ss", "rch"])]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory):
    return write_wordpiece(tmp_path_factory.mktemp("wordpiece") / "tokenizer.json")


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus.jsonl")


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")
    return DataConfig(
        source="jsonl", path=str(path), sequence_length=32, batch_size=8, max_documents=4, heldout_fraction=0.2
    )


@pytest.fixture(scope="session")
def store(config, tmp_path_factory):
    return prepare_store(config, VOCAB_SIZE, tmp_path_factory.mktemp("stores") / "store")

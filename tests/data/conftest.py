"""A small corpus of three domains, and the store made of it."""

import json
import pathlib
import random

import pytest

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

"""Examples of a task: what is read, what is asked for, and how they become rows."""

import json
import re

import numpy as np
import pytest

from emo_jax.data import (
    DataConfig,
    Example,
    build_store,
    encode,
    example_batches,
    pack_rows,
    read_examples,
    row,
)
from emo_jax.errors import UserError

TEXTS = [
    {"prompt": "Which animal barks?", "answer": " A dog.", "domain": "animals"},
    {"text": "oak and fern and moss", "domain": "plants"},
    {"prompt": "What is granite?", "answer": " A stone, and rather a hard one at that."},
    {"text": "  "},
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in TEXTS))
    return file


def test_documents_and_prompts_with_answers_are_read(path):
    wanted = [
        Example("Which animal barks?", " A dog.", "animals"),
        Example("", "oak and fern and moss", "plants"),
        Example("What is granite?", " A stone, and rather a hard one at that.", "text"),
    ]
    assert read_examples(str(path)) == wanted
    assert read_examples(str(path), documents=2) == wanted[:2]
    assert read_examples(str(path), domain="plants") == [wanted[1]]
    assert read_examples(str(path), domain="animals", whole=True) == [
        Example("", "Which animal barks? A dog.", "animals")
    ]


def test_what_holds_no_examples_is_refused(path, tmp_path):
    words = "holds no examples of domain 'stones'; its domains are 'animals', 'plants', 'text'"
    with pytest.raises(UserError, match=re.escape(words)):
        read_examples(str(path), domain="stones")
    for line, words in (
        (
            '{"prompt": "only", "body": "x"}',
            "other.jsonl:1 has no string field 'answer'; its fields are 'prompt', 'body'",
        ),
        ('{"prompt": "only", "answer": ""}', "other.jsonl:1 has an empty answer"),
        ('{"body": "x"}', "other.jsonl:1 has no string field 'text'; its fields are 'body'"),
    ):
        (tmp_path / "other.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=re.escape(words)):
            read_examples(str(tmp_path / "other.jsonl"))


@pytest.mark.parametrize("end", [-1, 0])
@pytest.mark.parametrize("sequence_length", [48, 7])
def test_rows_hold_every_token_once_and_ask_for_the_answers_alone(path, store, end, sequence_length):
    tokenizer, examples = store.tokenizer(), read_examples(str(path))
    batches = example_batches(examples, tokenizer, end, sequence_length=sequence_length, batch_size=2)
    assert {batch["tokens"].shape for batch in batches} == {(2, sequence_length)}
    found, asked = [], []
    for batch in batches:
        real = batch["document_ids"] > 0
        assert not batch["asked"][~real].any()
        for b in range(2):
            for g in range(1, batch["document_ids"][b].max(initial=0) + 1):
                part = batch["document_ids"][b] == g
                found.append(batch["tokens"][b, part].tolist())
                asked.append(batch["asked"][b, part].tolist())
                # A position's loss counts where its target, the next token of its document, is asked for.
                assert batch["loss_mask"][b, part].tolist() == [*asked[-1][1:], False]
                np.testing.assert_array_equal(batch["positions"][b, part], np.arange(part.sum()))
    ends = [end] if end >= 0 else []
    wanted = []
    for example in examples:
        prompt, answer = encode(tokenizer, [example.prompt, example.answer])
        tokens, marks = prompt + answer + ends, [False] * len(prompt) + [True] * len(answer + ends)
        for start in range(0, len(tokens), sequence_length):
            wanted.append((tokens[start : start + sequence_length], marks[start : start + sequence_length]))
    assert sorted(zip(found, asked, strict=True)) == sorted(wanted)


@pytest.mark.parametrize("end_of_text", ["", "<|endoftext|>"])
@pytest.mark.parametrize("cut", [2**20, 16])
def test_a_store_of_examples_trains_on_the_answers_alone(path, store, tmp_path, end_of_text, cut):
    config = DataConfig(
        source="examples",
        path=str(path),
        tokenizer=str(store.tokenizer_path),
        end_of_text=end_of_text,
        heldout_fraction=1e-9,
        max_document_bytes=cut,
        sequence_length=64,
        packing="best_fit",
    )
    made = build_store(config, 320, tmp_path / "store")
    tokenizer, split = made.tokenizer(), made.train
    learnt, rows = [], pack_rows(split.offsets, 64, 8, "best_fit")
    for spans in (rows[r] for r in range(len(rows))):
        values = row(split, spans, 64)
        for g in range(1, values["document_ids"].max() + 1):
            of = (values["document_ids"] == g) & values["loss_mask"]
            learnt.append(tokenizer.decode(values["targets"][of].tolist()))
    answers = " ".join(learnt)
    assert "barks" not in answers and "What" not in answers
    if cut > 100:  # whole examples: only a text's own first token has nothing before it
        assert {" A dog.", " A stone, and rather a hard one at that."} <= set(learnt)
        assert any(text.endswith("and fern and moss") for text in learnt)


def test_a_mixture_may_hold_examples_beside_texts(path, store, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "lynx and otter"}\n{"text": "flint and slate"}\n')
    config = DataConfig(
        source="mixture",
        mixture=(f"task=1:examples:{path}", f"plain=1:jsonl:{tmp_path / 'texts.jsonl'}"),
        tokenizer=str(store.tokenizer_path),
        heldout_fraction=1e-9,
    )
    made = build_store(config, 320, tmp_path / "store")
    by_domain = dict(zip((made.domains[d] for d in made.train.domains), made.train.answers, strict=True))
    assert by_domain["plain"] == 0 and by_domain["plants"] == 0 and by_domain["animals"] > 0
    assert by_domain["task"] > 0  # a line without a domain has its part's name

"""Examples of a task: what is read, what is asked for, and how they become rows."""

import json
import re

import numpy as np
import pytest

from emo_jax.data import Example, encode, example_batches, read_examples
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
        Example("What is granite?", " A stone, and rather a hard one at that."),
    ]
    assert read_examples(str(path)) == wanted
    assert read_examples(str(path), documents=2) == wanted[:2]
    assert read_examples(str(path), domain="plants") == [wanted[1]]


def test_what_holds_no_examples_is_refused(path, tmp_path):
    words = "holds no examples of domain 'stones'; its domains are '', 'animals', 'plants'"
    with pytest.raises(UserError, match=re.escape(words)):
        read_examples(str(path), domain="stones")
    (tmp_path / "other.jsonl").write_text('{"prompt": "only", "body": "x"}\n')
    words = "other.jsonl:1 has neither a text nor a prompt with an answer; its fields are prompt, body"
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

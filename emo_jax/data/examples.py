"""Texts of a task in batches: whole documents, or prompts with the answers that are asked for.

Letters: B rows, S sequence.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from emo_jax.data.packing import pack_rows, row
from emo_jax.data.sources import example_documents
from emo_jax.data.store import Split
from emo_jax.data.tokenizer import encode
from emo_jax.errors import require

Batch = dict[str, np.ndarray]


class Example(NamedTuple):
    """A text of a task.

    Attributes:
      prompt: what is given; empty for a document.
      answer: what is asked for.
      domain: its label; "text" where it has none.
    """

    prompt: str
    answer: str
    domain: str


def read_examples(path: str, *, domain: str = "", documents: int = 0, whole: bool = False) -> list[Example]:
    """JSON lines with `text`, or with `prompt` and `answer`, and an optional `domain`.

    Args:
      path: file, folder or glob, each file plain, `.gz` or `.zst`.
      domain: only examples of it; empty: all.
      documents: the first so many; 0: all.
      whole: prompts are asked for as well as answers.

    Raises:
      UserError: where a line holds neither, or nothing is left.
    """
    examples: list[Example] = []
    found: set[str] = set()
    for text, own, answer in example_documents(path):
        found.add(own)
        if domain and own != domain:
            continue
        data, start = text.encode(), 0 if whole else answer
        examples.append(Example(data[:start].decode(), data[start:].decode(), own))
        if documents and len(examples) == documents:
            break
    known = f"; its domains are {', '.join(sorted(map(repr, found)))}" if domain else ""
    require(bool(examples), f"{path} holds no examples{f' of domain {domain!r}' if domain else ''}{known}.")
    return examples


def example_batches(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    end_of_text_id: int,
    *,
    sequence_length: int,
    batch_size: int,
    max_documents: int = 64,
) -> list[Batch]:
    """Examples in rows, whole where they fit, by the batch contract of `emo_jax.data`.

    Args:
      examples: prompts and answers are tokenized apart; the end token belongs to the answer.
      tokenizer: of the model.
      end_of_text_id: −1 for none.
      sequence_length: S; longer examples are cut every S tokens.
      batch_size: B; the last batch is filled up with rows of padding.
      max_documents: most examples in a row.

    Returns:
      Batches with `asked`, bool [B, S], beside: the tokens of answers; `loss_mask` is true where the target is one.
    """
    examples = list(examples)
    prompts = encode(tokenizer, [example.prompt for example in examples])
    answers = encode(tokenizer, [example.answer for example in examples])
    ends = [end_of_text_id] if end_of_text_id >= 0 else []
    pieces = [(prompt, [*answer, *ends]) for prompt, answer in zip(prompts, answers, strict=True)]
    pieces = [(prompt, answer) for prompt, answer in pieces if prompt or answer]
    tokens = np.array([token for pair in pieces for part in pair for token in part], np.int32)
    asked = np.array([place == 1 for pair in pieces for place, part in enumerate(pair) for _ in part], np.int32)
    offsets = np.cumsum([0, *(len(prompt) + len(answer) for prompt, answer in pieces)])
    domains = np.zeros(len(pieces), np.int32)
    split, marks = Split(tokens, offsets, domains), Split(asked, offsets, domains)
    rows = pack_rows(offsets, sequence_length, max_documents, "best_fit")
    empty = np.zeros((0, 2), np.int64)
    batches = []
    for first in range(0, len(rows), batch_size):
        made = []
        for r in range(first, first + batch_size):
            spans = rows[r] if r < len(rows) else empty
            values = row(split, spans, sequence_length)
            marked = row(marks, spans, sequence_length)
            values["asked"] = marked["tokens"] > 0
            values["loss_mask"] &= marked["targets"] > 0
            made.append(values)
        batches.append({name: np.stack([values[name] for values in made]) for name in made[0]})
    return batches


def examples_by_domain(
    path: str, tokenizer: Path, end_of_text_id: int, *, documents: int = 0, sequence_length: int, batch_size: int
) -> tuple[dict[str, list[Batch]], dict[str, int]]:
    """Batches of each domain of a file, and the UTF-8 bytes of their answers.

    Args:
      path: see `read_examples`.
      tokenizer: path of a `tokenizer.json`.
      end_of_text_id: −1 for none.
      documents: the first so many of each domain; 0: all.
      sequence_length, batch_size: see `example_batches`.
    """
    loaded = Tokenizer.from_file(str(tokenizer))
    by_domain: dict[str, list[Example]] = {}
    for example in read_examples(path):
        by_domain.setdefault(example.domain, []).append(example)
    batches, sizes = {}, {}
    for name in sorted(by_domain):
        used = by_domain[name][: documents or None]
        sizes[name] = sum(len(example.answer.encode()) for example in used)
        batches[name] = example_batches(
            used, loaded, end_of_text_id, sequence_length=sequence_length, batch_size=batch_size
        )
    return batches, sizes

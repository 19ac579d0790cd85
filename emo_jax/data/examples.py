"""Texts of a task in batches: whole documents, prompts with the answers that are asked for, or texts with labels.

Letters: B rows, S sequence.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from emo_jax.data.config import LABEL_PLACES
from emo_jax.data.documents import divide
from emo_jax.data.encoding import encode_labelled
from emo_jax.data.packing import Rows, pack_rows, row, row_domains
from emo_jax.data.sources import example_documents
from emo_jax.data.store import Split
from emo_jax.data.tokenizer import encode, load_tokenizer
from emo_jax.errors import require, require_choice

Batch = dict[str, np.ndarray]


class Example(NamedTuple):
    """A text of a task.

    Attributes:
      prompt: what is given; empty for a document; the text that has a label.
      answer: what is asked for; the second text of a pair that has a label, or empty.
      domain: the name of its domain; "text" where it has none.
      label: its index; -1: none, or unknown.
    """

    prompt: str
    answer: str
    domain: str
    label: int = -1


def read_examples(
    path: str, *, domain: str = "", documents: int = 0, whole: bool = False, labels: Sequence[str] = ()
) -> list[Example]:
    """JSON lines with `text`, or with `prompt` and `answer`, and an optional `domain`.

    Args:
      path: file, folder or glob, each file plain, `.gz` or `.zst`.
      domain: only examples of it; empty: all.
      documents: the first so many; 0: all.
      whole: prompts are asked for as well as answers.
      labels: of a classifier: lines have `text`, maybe `text_pair`, and `label`; `whole` means nothing then.

    Raises:
      UserError: where a line holds neither, has no label of these, or nothing is left.
    """
    examples: list[Example] = []
    found: set[str] = set()
    for text, own, answer, label in example_documents(path, labels):
        found.add(own)
        if domain and own != domain:
            continue
        examples.append(Example(*divide(text, 0 if whole and not labels else answer), own, label))
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

    def made(spans: np.ndarray) -> Batch:
        values = row(split, spans, sequence_length)
        marked = row(marks, spans, sequence_length)
        values["asked"] = marked["tokens"] > 0
        values["loss_mask"] &= marked["targets"] > 0
        return values

    return _in_batches(pack_rows(offsets, sequence_length, max_documents, "best_fit"), made, batch_size)


def labelled_batches(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    *,
    label_at: str,
    special_tokens: bool,
    sequence_length: int,
    batch_size: int,
    max_documents: int = 64,
) -> list[Batch]:
    """Texts in rows, each whole or cut to S tokens, as a store of texts with labels has them.

    Args:
      examples: `prompt` is the text, `answer` the second one of a pair; `label` may be unknown.
      tokenizer: of the model, from `load_tokenizer`.
      label_at, special_tokens: as in `DataConfig`.
      sequence_length: S; longer texts are cut to it.
      batch_size: B; the last batch is filled up with rows of padding.
      max_documents: most examples in a row.

    Returns:
      Batches as of a store with labels: `loss_mask` is true where the label of a text is read, `targets` its index
      there, 0 where unknown. Beside, `examples`, int32 [B, S]: the index of the example that a token is of, −1 for
      none. A text without any token is in no row.
    """
    require_choice("label_at", label_at, LABEL_PLACES)
    examples = list(examples)
    pairs = [(example.prompt, example.answer) for example in examples]
    encoded = list(encode_labelled(tokenizer, pairs, sequence_length=sequence_length, special_tokens=special_tokens))
    kept = np.array([index for index, text in enumerate(encoded) if text.tokens], np.int32)
    split = Split(
        tokens=np.array([token for text in encoded for token in text.tokens], np.int32),
        offsets=np.cumsum([0, *(len(encoded[index].tokens) for index in kept)]),
        domains=kept,  # so that `row_domains` says which example a document is
        answers=np.array([encoded[index].second for index in kept], np.int64) if special_tokens else None,
        labels=np.array([examples[index].label for index in kept], np.int32),
    )

    def made(spans: np.ndarray) -> Batch:
        values = row(split, spans, sequence_length, label_at=label_at)
        ids_S = values["document_ids"]
        values["examples"] = np.where(ids_S > 0, row_domains(split, spans, max_documents)[ids_S - 1], -1)
        return values

    return _in_batches(pack_rows(split.offsets, sequence_length, max_documents, "best_fit"), made, batch_size)


def _in_batches(rows: Rows, made: Callable[[np.ndarray], Batch], batch_size: int) -> list[Batch]:
    """What is made of the spans of each row, in batches; the last is filled up with what is made of no spans."""
    empty = np.zeros((0, 2), np.int64)
    batches = []
    for first in range(0, len(rows), batch_size):
        found = [made(rows[r] if r < len(rows) else empty) for r in range(first, first + batch_size)]
        batches.append({name: np.stack([values[name] for values in found]) for name in found[0]})
    return batches


def examples_by_domain(
    path: str,
    tokenizer: Path,
    end_of_text_id: int,
    *,
    documents: int = 0,
    sequence_length: int,
    batch_size: int,
    labels: Sequence[str] = (),
    label_at: str = "last",
    special_tokens: bool = False,
) -> tuple[dict[str, list[Batch]], dict[str, int]]:
    """Batches of each domain of a file, and the UTF-8 bytes of their answers; of texts with labels, of the texts.

    Args:
      path: see `read_examples`.
      tokenizer: path of a `tokenizer.json`.
      end_of_text_id: −1 for none.
      documents: the first so many of each domain; 0: all.
      sequence_length, batch_size: see `example_batches`.
      labels: of a classifier; empty: of a language model.
      label_at, special_tokens: see `labelled_batches`.
    """
    loaded = load_tokenizer(tokenizer, "", sys.maxsize)
    by_domain: dict[str, list[Example]] = {}
    for example in read_examples(path, labels=labels):
        by_domain.setdefault(example.domain, []).append(example)
    batches, sizes = {}, {}
    for name in sorted(by_domain):
        used = by_domain[name][: documents or None]
        asked = [example.prompt + example.answer if labels else example.answer for example in used]
        sizes[name] = sum(len(text.encode()) for text in asked)
        if labels:
            batches[name] = labelled_batches(
                used,
                loaded,
                label_at=label_at,
                special_tokens=special_tokens,
                sequence_length=sequence_length,
                batch_size=batch_size,
            )
        else:
            batches[name] = example_batches(
                used, loaded, end_of_text_id, sequence_length=sequence_length, batch_size=batch_size
            )
    return batches, sizes

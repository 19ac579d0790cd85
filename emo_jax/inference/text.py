"""Text after text: prompts to tokens, tokens to text as they come, until each text has ended."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from emo_jax.data import token_count
from emo_jax.errors import UserError, require
from emo_jax.inference.decoding import Generator, Sampling
from emo_jax.model import Kept
from emo_jax.model.functional import Parameters


class Completion(NamedTuple):
    """What a model wrote after a prompt.

    Attributes:
      text: without the prompt, and without the stop sequence that ended it; empty for a model without a tokenizer.
      tokens: the ids it drew, that which ended it included.
      stopped: `end_of_text`, `stop` (a stop sequence) or `length` (of `max_new_tokens`).
    """

    text: str
    tokens: list[int]
    stopped: str


class Speed(NamedTuple):
    """How long a generation took.

    Attributes:
      prompt_tokens: of all prompts.
      first_seconds: until every row's first token, compilation included where the shapes are new.
      new_tokens: drawn after the second one, which may have waited for a compilation, and until their row had ended.
      seconds: that these took.
    """

    prompt_tokens: int
    first_seconds: float
    new_tokens: int
    seconds: float


@dataclasses.dataclass
class _Row:
    """A text being written."""

    stop: Sequence[str]
    stream: DecodeStream | None
    text: str = ""
    shown: int = 0
    stopped: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)

    def add(self, token: int, tokenizer: Tokenizer | None, end: int) -> str:
        """Takes a token; returns the text that cannot change any more."""
        self.tokens.append(token)
        if token == end:
            self.stopped = "end_of_text"
        elif tokenizer is not None and self.stream is not None:
            self.text += self.stream.step(tokenizer, token) or ""
            found = [place for place in (self.text.find(word) for word in self.stop) if place >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], "stop"
        return self.release(bool(self.stopped))

    def release(self, whole: bool) -> str:
        """The text that was not returned yet, but for an end that may grow into a stop sequence."""
        held = 0 if whole else max((_overlap(self.text, word) for word in self.stop), default=0)
        start, self.shown = self.shown, max(len(self.text) - held, self.shown)
        return self.text[start : self.shown]


def complete(
    generator: Generator,
    params: Parameters,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer | None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    end_of_text_id: int = -1,
    pool: int = 0,
    kept: list[Kept] | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> tuple[list[Completion], Speed]:
    """Continues every prompt until its end-of-text token, a stop sequence or `max_new_tokens`.

    Args:
      generator, params, prompts, sampling, pool, kept: see `Generator`.
      tokenizer: None: only tokens.
      max_new_tokens: at least 1.
      stop: texts that end a row; not part of its text.
      end_of_text_id: −1: none.
      on_text: receives (row, text) as soon as a piece of text is certain.

    Raises:
      UserError: where an argument cannot work.
    """
    require(bool(prompts), "There is no prompt.")
    require(max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1.")
    require(all(stop), "A stop sequence is empty; it would end every text at once.")
    if stop and tokenizer is None:
        raise UserError(f"stop={list(stop)!r} is text, and the model has no tokenizer.json to read its tokens with.")
    rows = [_Row(stop, DecodeStream(skip_special_tokens=True) if tokenizer else None) for _ in prompts]
    vocabulary = token_count(tokenizer) if tokenizer else 0  # embedding rows from there on are padding
    begun = time.perf_counter()
    steps = generator(params, prompts, max_new_tokens, sampling=sampling, pool=pool, kept=kept, vocabulary=vocabulary)
    times, counts = [], []
    pending = next(steps, None)
    while pending is not None:
        coming = next(steps, None)  # asked for before the one at hand is read
        counts.append(0)
        for index, (row, token) in enumerate(zip(rows, np.asarray(pending).tolist(), strict=True)):
            if not row.stopped:
                counts[-1] += 1
                piece = row.add(token, tokenizer, end_of_text_id)
                if on_text and piece:
                    on_text(index, piece)
        times.append(time.perf_counter())
        pending = None if all(row.stopped for row in rows) else coming
    for index, row in enumerate(rows):
        if not row.stopped:
            row.stopped = "length"
            piece = row.release(True)
            if on_text and piece:
                on_text(index, piece)
    speed = Speed(sum(map(len, prompts)), times[0] - begun, sum(counts[2:]), times[-1] - times[min(1, len(times) - 1)])
    return [Completion(row.text, row.tokens, row.stopped) for row in rows], speed


def _overlap(text: str, word: str) -> int:
    """Characters at the end of the text that begin the word, fewer than all of it."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)

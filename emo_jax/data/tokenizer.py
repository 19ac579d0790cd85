"""Byte-level BPE: trained on a run's own text, or any Hugging Face `tokenizer.json`."""

import pathlib
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from emo_jax.errors import UserError, require

SAMPLE_BYTES = 10_000_000
"""Text that a tokenizer is trained on; more changes its merges little."""
_BYTES = 256
_END_HINTS = ("end", "eos", "eot", "</s>")


def train_tokenizer(texts: Iterable[str], vocab_size: int, end_of_text: str) -> Tokenizer:
    """Trains a byte-level BPE: no unknown token, any Unicode text survives the round trip.

    Args:
      texts: training text; the same texts in the same order give the same tokenizer.
      vocab_size: entries to reach, end token included. A corpus with too few repeated pairs gives fewer;
        ids then still lie below `vocab_size`.
      end_of_text: the token with id 0; in a text its characters are ordinary ones. Empty: there is none.

    Raises:
      UserError: if `vocab_size` cannot hold the 256 bytes and the end token.
    """
    require(
        vocab_size > _BYTES,
        f"model.vocab_size={vocab_size} is too small to train a tokenizer: it needs {_BYTES} bytes and the end "
        f"token, so at least {_BYTES + 1}.",
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text] if end_of_text else [],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: str | pathlib.Path, end_of_text: str, vocab_size: int) -> Tokenizer:
    """Reads a Hugging Face `tokenizer.json`; padding and truncation that it may ask for are switched off.

    Args:
      path: the file.
      end_of_text: the token that ends a document; in a text its characters are ordinary ones. Empty: there is none.
      vocab_size: the model's; every id must lie below it.

    Raises:
      UserError: if the file is missing or not a tokenizer, lacks `end_of_text`, or has ids beyond `vocab_size`.
    """
    path = pathlib.Path(path).expanduser()
    require(path.is_file(), f"data.tokenizer={str(path)!r} is not a file; give the path of a tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise UserError(f"data.tokenizer={str(path)!r} is not a Hugging Face tokenizer.json: {error}") from error
    if end_of_text and tokenizer.token_to_id(end_of_text) is None:
        candidates = _end_candidates(tokenizer)
        hint = f"it has {', '.join(map(repr, candidates))}" if candidates else "it has no special tokens"
        raise UserError(f"data.end_of_text={end_of_text!r} is not a token of {str(path)!r}; {hint}.")
    largest = token_count(tokenizer) - 1
    require(
        largest < vocab_size,
        f"model.vocab_size={vocab_size} is too small for {str(path)!r}, whose largest id is {largest}: "
        f"set model.vocab_size to at least {largest + 1}.",
    )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if end_of_text:
        tokenizer.add_special_tokens([end_of_text])  # some files list it as an ordinary token, matched inside text
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_count(tokenizer: Tokenizer) -> int:
    """One past the largest id, added tokens included: the rows that a vocabulary needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, on all cores, without any token that the texts do not spell out."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _end_candidates(tokenizer: Tokenizer) -> list[str]:
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    likely = [token for token in special if any(hint in token.lower() for hint in _END_HINTS)]
    return (likely or special)[:8]

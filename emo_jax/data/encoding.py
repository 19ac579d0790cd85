"""Documents as tokens: those of a prompt and its answer, and those of a text, or a pair, that has a label."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from emo_jax.data.documents import divide
from emo_jax.data.tokenizer import encode
from emo_jax.errors import require


class Encoded(NamedTuple):
    """A document's tokens.

    Attributes:
      tokens: ids; of what has no label the end token's included.
      second: the token where its answer, or those of type 1, begin.
      cut: whether some were left out because they were too many.
    """

    tokens: list[int]
    second: int
    cut: bool = False


def encode_parts(
    tokenizer: Tokenizer, texts: Sequence[str], answers: np.ndarray, end_of_text_id: int
) -> Iterator[Encoded]:
    """Yields each text's tokens; a prompt and its answer are tokenized apart, as they are met.

    Args:
      tokenizer: from `load_tokenizer`.
      texts: of documents.
      answers: the byte of each text where its answer begins.
      end_of_text_id: −1 for none.
    """
    ends = [end_of_text_id] if end_of_text_id >= 0 else []
    if not answers.any():
        yield from (Encoded(ids + ends, 0) for ids in encode(tokenizer, texts))
        return
    divided = [divide(text, at) for text, at in zip(texts, answers, strict=True)]
    prompts = encode(tokenizer, [prompt for prompt, _ in divided])
    rests = encode(tokenizer, [rest for _, rest in divided])
    for prompt, rest in zip(prompts, rests, strict=True):
        yield Encoded(prompt + rest + ends, len(prompt))


def encode_labelled(
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    sequence_length: int,
    special_tokens: bool,
) -> Iterator[Encoded]:
    """Yields at most S tokens of each text, with its second one behind it.

    The end token is left out, as those who use public classifiers do.

    Args:
      tokenizer: from `load_tokenizer`.
      pairs: texts, each with its second one, which may be empty: there is none then.
      sequence_length: S. Of longer ones tokens are left out at the end of the longer text, once they are of equal
        length of both; those of the template stay.
      special_tokens: whether texts get the tokens of the tokenizer's template; `second` is 0 without.

    Raises:
      UserError: where the template has no tokens, its types are not 0 and then 1, or it leaves no room for a text.
    """
    require(
        not special_tokens or tokenizer.num_special_tokens_to_add(False) > 0,
        "data.special_tokens=True, but the template (post_processor) of the tokenizer adds no tokens to a text; set "
        "data.special_tokens=False, or use a tokenizer.json that has one.",
    )
    texts = [pair if pair[1] else pair[0] for pair in pairs]
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=special_tokens):
        ids, types = encoding.ids, encoding.type_ids
        cut = len(ids) > sequence_length
        if cut:
            text_of = encoding.sequence_ids  # None for tokens of the template
            room = sequence_length - text_of.count(None)
            require(
                room > 0,
                f"data.sequence_length={sequence_length} leaves no room for a text beside the tokens that the "
                "tokenizer's template adds; raise it.",
            )
            kept = _longest_first(text_of, room)
            ids, types = [ids[i] for i in kept], [types[i] for i in kept]
        second = types.index(1) if 1 in types else len(ids)
        require(
            not special_tokens or types == [0] * second + [1] * (len(ids) - second),
            f"The tokenizer's template gives tokens the types {sorted(set(types))}, and not 0 first and then 1; use "
            "another one, or set data.special_tokens=False.",
        )
        yield Encoded(ids, second if special_tokens else 0, cut)


def _longest_first(text_of: Sequence[int | None], room: int) -> list[int]:
    """The tokens that are kept: those of no text, and of the texts 0 and 1 the first, as many as there is room for.

    The library's own truncation makes every way to join a piece of one text with one of the other, before it drops all
    but the first: for two long texts more than memory holds.
    """
    sizes = [text_of.count(0), text_of.count(1)]
    short = min(*sizes, room // 2)
    limits = [short, room - short] if sizes[0] <= sizes[1] else [room - short, short]
    kept = []
    for token, text in enumerate(text_of):
        if text is None or limits[text] > 0:
            kept.append(token)
        if text is not None:
            limits[text] -= 1
    return kept

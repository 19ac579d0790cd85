"""A document, the side of the split it belongs to, and how a long one is cut."""

import hashlib
from typing import NamedTuple


class Document(NamedTuple):
    """One text and what is known of it.

    Attributes:
      text: all of it; an answer, or the second one of a pair, stands behind what it belongs to.
      domain: the name of where it comes from.
      answer: the byte of its UTF-8 text where the answer begins, if any; of a text with a label the one where its
        pair begins, the text's end if it has none.
      label: its index; -1: none.
    """

    text: str
    domain: str
    answer: int = 0
    label: int = -1


def divide(text: str, at: int) -> tuple[str, str]:
    """The first `at` bytes of a text, in UTF-8, and what is behind them."""
    data = text.encode()
    return data[:at].decode(), data[at:].decode()


def digest(text: str) -> bytes:
    """16 bytes of blake2b over the text's UTF-8 bytes: equal texts, and in practice only those, share it."""
    return digest_bytes(text.encode())


def digest_bytes(data: bytes) -> bytes:
    """16 bytes of blake2b over any bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def heldout_by_digest(document_digest: bytes, fraction: float) -> bool:
    """`is_heldout` for a text whose `digest` is known."""
    return int.from_bytes(document_digest[:8]) < fraction * 2**64


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a whole document belongs to evaluation: a function of its text alone.

    Args:
      text: the document before it is cut, so that its pieces and its copies land on one side.
      fraction: the share of documents to hold out, between 0 and 1.
    """
    return heldout_by_digest(digest(text), fraction)


def cut_points(text: bytes, max_bytes: int) -> list[int]:
    """Where to cut a text so that no piece exceeds `max_bytes`.

    A piece ends behind the last newline of its second half, else behind the last space there, else
    between two characters. Nothing is dropped: the pieces joined are the text.

    Args:
      text: valid UTF-8.
      max_bytes: at least 4, the longest character.

    Returns:
      The end of every piece, ascending; the last is `len(text)`.
    """
    ends, start = [], 0
    while len(text) - start > max_bytes:
        limit, half = start + max_bytes, start + max_bytes // 2
        end = text.rfind(b"\n", half, limit) + 1 or text.rfind(b" ", half, limit) + 1
        if not end:
            end = limit
            while text[end] & 0xC0 == 0x80:
                end -= 1
        ends.append(end)
        start = end
    return [*ends, len(text)]

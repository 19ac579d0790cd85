"""Rows: consecutive windows of a store's token stream.

Letters: B rows, S sequence, G documents in a row, N tokens in all.
"""

import numpy as np

from emo_jax.data.store import Split


def pack_rows(offsets: np.ndarray, sequence_length: int, max_documents: int) -> np.ndarray:
    """Where each row starts: S tokens behind the one before, or earlier where a document too many would begin.

    Args:
      offsets: int64 [documents + 1], ascending strictly, as in `Split.offsets`.
      sequence_length: S.
      max_documents: G.

    Returns:
      int64 [rows + 1], token positions; row r is `[starts[r], starts[r + 1])` and the last entry is N.
    """
    total = int(offsets[-1])
    last = len(offsets) - 1
    documents = np.arange(last)
    limits = offsets[np.minimum(documents + max_documents, last)]  # where a row that starts in a document must end
    # Only a row that starts in one of these documents can meet its limit before it has S tokens.
    crowded = np.flatnonzero(limits < offsets[1:] - 1 + sequence_length)
    parts, position = [], 0
    while position < total:
        document = int(np.searchsorted(offsets, position, side="right")) - 1
        ahead = int(np.searchsorted(crowded, document))
        reach = int(offsets[crowded[ahead]]) if ahead < len(crowded) else total
        full = max(0, -(-(reach - position) // sequence_length))
        if full:
            parts.append(position + sequence_length * np.arange(full))
            position += sequence_length * full
        else:
            parts.append(np.array([position]))
            position = min(position + sequence_length, int(limits[document]))
    return np.concatenate([*parts, [total]]).astype(np.int64)


def row(split: Split, start: int, stop: int, sequence_length: int) -> dict[str, np.ndarray]:
    """The tokens `[start, stop)` of a split as one row of the batch contract.

    Every document is a run of one id, numbered from 1; so is what a row before has left of one. Positions
    count from 0 in each run. The last token of a run, its end token or the cut at the row's end, has no target.

    Args:
      split: the store's training or held-out side.
      start: first token.
      stop: behind the last; `start == stop` gives a row of padding.
      sequence_length: S, at least `stop - start`.

    Returns:
      `tokens`, `targets`, `document_ids`, `positions` int32 [S] and `loss_mask` bool [S], padded with 0.
    """
    size = stop - start
    names = ("tokens", "targets", "document_ids", "positions")
    values = {name: np.zeros(sequence_length, np.int32) for name in names}
    loss_mask_S = np.zeros(sequence_length, bool)
    if size:
        first, behind = documents_between(split.offsets, start, stop)
        begins = np.concatenate(([0], split.offsets[first + 1 : behind] - start))
        lengths = np.diff(begins, append=size)
        values["tokens"][:size] = split.tokens[start:stop]
        values["document_ids"][:size] = np.repeat(np.arange(1, len(begins) + 1), lengths)
        values["positions"][:size] = np.arange(size) - np.repeat(begins, lengths)
        loss_mask_S[:size] = True
        loss_mask_S[begins + lengths - 1] = False
        values["targets"][:-1] = np.where(loss_mask_S[:-1], values["tokens"][1:], 0)
    return {**values, "loss_mask": loss_mask_S}


def row_domains(split: Split, start: int, stop: int, max_documents: int) -> np.ndarray:
    """Domain indices of the documents of a row.

    Returns:
      int32 [G]: entry g − 1 belongs to document id g; 0 behind the last.
    """
    domains_G = np.zeros(max_documents, np.int32)
    if stop > start:
        first, behind = documents_between(split.offsets, start, stop)
        domains_G[: behind - first] = split.domains[first:behind]
    return domains_G


def documents_between(offsets: np.ndarray, start: int, stop: int) -> tuple[int, int]:
    """The documents that have tokens in `[start, stop)`: the first, and one behind the last."""
    return int(np.searchsorted(offsets, start, side="right")) - 1, int(np.searchsorted(offsets, stop, side="left"))

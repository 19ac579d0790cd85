"""Rows: which spans of a store's token stream share a row, and what such a row looks like to the model.

Letters: B rows, S sequence, G documents in a row, N tokens in all.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from emo_jax.data.store import Split

LONGEST_PERIOD = 13  # of the released recipe's repetition filter
_WINDOW = 1 << 13  # pieces that best-fit packing sorts together, and rows that may still take one


@dataclasses.dataclass(frozen=True)
class Rows:
    """What each row holds: every token of a split once.

    Attributes:
      spans: int64 [spans, 2], token positions `[start, stop)`.
      offsets: int64 [rows + 1]; row r holds `spans[offsets[r]:offsets[r + 1]]`.
    """

    spans: np.ndarray
    offsets: np.ndarray

    @classmethod
    def join(cls, parts: "Sequence[Rows]") -> "Rows":
        """The rows of each, one after another."""
        starts = np.cumsum([0, *(len(part.spans) for part in parts)])
        offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
        return cls(np.concatenate([part.spans for part in parts]), np.concatenate([*offsets, starts[-1:]]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, r: int) -> np.ndarray:
        return self.spans[self.offsets[r] : self.offsets[r + 1]]


def pack_rows(offsets: np.ndarray, sequence_length: int, max_documents: int, packing: str = "concatenate") -> Rows:
    """Divides a token stream into rows of at most S tokens and G documents.

    Args:
      offsets: int64 [documents + 1], ascending strictly, as in `Split.offsets`.
      sequence_length: S.
      max_documents: G.
      packing: `concatenate`: a row starts S tokens behind the one before, or earlier where a document too
        many would begin. `best_fit`: documents are cut every S tokens; the pieces, some thousands of
        consecutive documents at a time and the longest first, go where they leave the least room.
    """
    if packing == "best_fit":
        return _best_fit(offsets, sequence_length, max_documents)
    bounds = _concatenate(offsets, sequence_length, max_documents)
    return Rows(np.column_stack((bounds[:-1], bounds[1:])), np.arange(len(bounds)))


def padding_share(rows: Rows, sequence_length: int) -> float:
    """The share of positions that hold no token."""
    tokens = int((rows.spans[:, 1] - rows.spans[:, 0]).sum())
    return 1 - tokens / (len(rows) * sequence_length) if len(rows) else 0.0


def _concatenate(offsets: np.ndarray, sequence_length: int, max_documents: int) -> np.ndarray:
    """Where each row starts, int64 [rows + 1]; the last entry is N."""
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


def _best_fit(offsets: np.ndarray, sequence_length: int, max_documents: int) -> Rows:
    sizes = np.diff(offsets)
    full, rest = sizes // sequence_length, sizes % sequence_length
    place = np.arange(full.sum()) - np.repeat(np.cumsum(full) - full, full)
    full_starts = np.repeat(offsets[:-1], full) + sequence_length * place
    stops, rest = offsets[1:][rest > 0], rest[rest > 0]
    order = np.lexsort((-rest, np.arange(len(rest)) // _WINDOW))
    row_of = np.empty(len(rest), np.int64)
    row_of[order] = _place(rest[order].tolist(), sequence_length, max_documents)
    by_row = np.argsort(row_of, kind="stable")
    spans = np.column_stack(
        (
            np.concatenate((full_starts, (stops - rest)[by_row])),
            np.concatenate((full_starts + sequence_length, stops[by_row])),
        )
    )
    counts = np.concatenate((np.ones(len(full_starts), np.int64), np.bincount(row_of)))
    return Rows(spans, np.concatenate(([0], np.cumsum(counts))))


def _place(sizes: list[int], sequence_length: int, max_documents: int) -> list[int]:
    """The row of each piece: the open one with the least room that suffices, else a new one."""
    rows: list[int] = []
    opened = 0
    rooms: list[tuple[int, int, int]] = []  # (room, row, documents) of open rows, sorted
    for size in sizes:
        at = bisect.bisect_left(rooms, (size,))
        if at < len(rooms):
            room, row, documents = rooms.pop(at)
        else:
            room, row, documents = sequence_length, opened, 0
            opened += 1
        rows.append(row)
        if room > size and documents + 1 < max_documents:
            bisect.insort(rooms, (room - size, row, documents + 1))
            if len(rooms) > _WINDOW:
                del rooms[0]
    return rows


def row(
    split: Split, spans: np.ndarray, sequence_length: int, max_repetitions: int = 0, label_at: str = "last"
) -> dict[str, np.ndarray]:
    """Spans of a split as one row of the batch contract.

    Every document is a run of one id, numbered from 1; so is what a row before has left of one. Positions
    count from 0 in each run. The last token of a run, its end token or the cut at the row's end, has no target; nor has
    one whose next token is still of the prompt.
    In a split with labels a document has one target, its label, at its first or last token; 0 where it is unknown.
    A row that `is_repetitive` keeps nothing but its tokens: its document ids are all 0.

    Args:
      split: the store's training or held-out side.
      spans: int64 [spans, 2], an item of `Rows`; none give a row of padding.
      sequence_length: S, at least what the spans hold.
      max_repetitions: of `is_repetitive`; 0: any row is kept.
      label_at: `first` or `last`.

    Returns:
      `tokens`, `targets`, `document_ids`, `positions` int32 [S] and `loss_mask` bool [S], padded with 0; `token_types`
      int32 [S], 0 or 1, where the split has labels and types.
    """
    typed = split.labels is not None and split.answers is not None
    names = ("tokens", "targets", "document_ids", "positions", *(["token_types"] if typed else []))
    values = {name: np.zeros(sequence_length, np.int32) for name in names}
    loss_mask_S = np.zeros(sequence_length, bool)
    starts, stops, documents = _runs(split.offsets, spans)
    lengths = stops - starts
    ends = np.cumsum(lengths)
    size = int(lengths.sum())
    if size:
        values["tokens"][:size] = np.concatenate([split.tokens[start:stop] for start, stop in spans.tolist()])
    if size and not (max_repetitions and is_repetitive(values["tokens"][:size], max_repetitions)):
        values["document_ids"][:size] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        values["positions"][:size] = np.arange(size) - np.repeat(ends - lengths, lengths)
        begun = starts - split.offsets[documents]  # tokens of the document before its run
        place = values["positions"][:size] + np.repeat(begun, lengths)
        if split.labels is not None:
            last = split.offsets[documents + 1] - split.offsets[documents] - 1
            at = (last if label_at == "last" else 0) - begun
            here = (at >= 0) & (at < lengths)
            read = (ends - lengths + at)[here]
            loss_mask_S[read] = True
            values["targets"][read] = np.maximum(split.labels[documents[here]], 0)
            if split.answers is not None:
                values["token_types"][:size] = place >= np.repeat(split.answers[documents], lengths)
        else:
            loss_mask_S[:size] = True
            loss_mask_S[ends - 1] = False
            if split.answers is not None:  # where the target stands before its document's answer, nothing is learnt
                loss_mask_S[:size] &= place + 1 >= np.repeat(split.answers[documents], lengths)
            values["targets"][:-1] = np.where(loss_mask_S[:-1], values["tokens"][1:], 0)
    return {**values, "loss_mask": loss_mask_S}


def is_repetitive(tokens: np.ndarray, times: int) -> bool:
    """Whether 1 to 13 tokens stand there `times` (at least 2) times on end: the released recipe's filter at 32."""
    for period in range(1, min(LONGEST_PERIOD, len(tokens) - 1) + 1):
        equal = tokens[period:] == tokens[:-period]
        needed = period * (times - 1)  # a run of n here is n + period tokens long there
        if np.count_nonzero(equal) < needed:
            continue
        longest = np.diff(np.flatnonzero(~equal), prepend=-1, append=len(equal)).max() - 1
        if longest >= needed:
            return True
    return False


def row_domains(split: Split, spans: np.ndarray, max_documents: int) -> np.ndarray:
    """Domain indices of the documents of a row.

    Returns:
      int32 [G]: entry g − 1 belongs to document id g; 0 behind the last.
    """
    domains_G = np.zeros(max_documents, np.int32)
    _, _, documents = _runs(split.offsets, spans)
    domains_G[: len(documents)] = split.domains[documents]
    return domains_G


def _runs(offsets: np.ndarray, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, stop and document of every part of a document that the spans hold, in their order."""
    first = np.searchsorted(offsets, spans[:, 0], side="right") - 1
    counts = np.searchsorted(offsets, spans[:, 1], side="left") - first
    documents = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    starts = np.maximum(offsets[documents], np.repeat(spans[:, 0], counts))
    stops = np.minimum(offsets[documents + 1], np.repeat(spans[:, 1], counts))
    return starts, stops, documents

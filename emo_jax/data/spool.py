"""Documents on their way to tokens: deduplicated, cut and kept in one file, so that memory holds numbers only."""

import pathlib
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from emo_jax.data.documents import Document, cut_points, digest, heldout_by_digest

_MEGABYTE = 10**6


class Spool:
    """Pieces of documents, each with its domain, its side of the split and a hash of its whole document.

    Attributes:
      domains: names, sorted.
      duplicates: documents dropped because an earlier one has the same text (and the same pair and label, if any).
      sizes: int64 [pieces], UTF-8 bytes.
      domain_of: int32 [pieces], indices into `domains`.
      part_of: int32 [pieces], parts of a mixture.
      heldout: bool [pieces].
      hashes: uint64 [pieces], of the whole document.
      ranks: int32 [pieces], a piece's number within its document.
      answers: int64 [pieces], the byte of a piece where training begins, or the pair of a text with a label.
      labels: int32 [pieces], -1 where a document has none.
    """

    def __init__(
        self,
        documents: Iterable[tuple[Document, int]],
        path: pathlib.Path,
        *,
        max_piece_bytes: int,
        heldout_fraction: float,
        max_megabytes: int = 0,
    ):
        """Reads all of `documents` once, writing their pieces to `path`.

        Args:
          documents: whole documents, each with the index of its part of a mixture.
          path: file to create; it holds at most `max_megabytes` a domain.
          max_piece_bytes: where longer documents are cut; those with labels are not.
          heldout_fraction: see `is_heldout`.
          max_megabytes: what is needed of any domain, in 10⁶ bytes; 0: everything.
        """
        limit = max_megabytes * _MEGABYTE or float("inf")
        names: dict[str, int] = {}
        spooled: list[int] = []
        seen: set[bytes] = set()
        ends, domain_of, part_of = array("q"), array("i"), array("i")
        heldout, hashes, ranks, answers, labels = array("b"), array("Q"), array("i"), array("q"), array("i")
        self.duplicates = 0
        position = 0
        with path.open("wb") as file:
            for (text, domain, answer, label), part in documents:
                key = digest(text)
                example = key if label < 0 else key + b"%d %d" % (answer, label)
                if example in seen:
                    self.duplicates += 1
                    continue
                seen.add(example)
                index = names.setdefault(domain, len(names))
                if index == len(spooled):
                    spooled.append(0)
                if spooled[index] >= limit:
                    continue
                data = text.encode()
                cuts = cut_points(data, max_piece_bytes) if label < 0 else [len(data)]
                file.write(data)
                ends.extend(position + cut for cut in cuts)
                domain_of.extend([index] * len(cuts))
                part_of.extend([part] * len(cuts))
                heldout.extend([heldout_by_digest(key, heldout_fraction)] * len(cuts))
                hashes.extend([int.from_bytes(key[:8])] * len(cuts))
                ranks.extend(range(len(cuts)))
                labels.extend([label] * len(cuts))
                starts = [0, *cuts[:-1]]
                answers.extend(
                    min(max(answer - start, 0), end - start) for start, end in zip(starts, cuts, strict=True)
                )
                position += len(data)
                spooled[index] += len(data)
        self.domains = tuple(sorted(names))
        renumbered = np.array([self.domains.index(name) for name in names], np.int32)
        self._ends = np.array(ends, np.int64)
        self.sizes = np.diff(self._ends, prepend=0)
        self.domain_of = renumbered[np.array(domain_of, np.int32)] if names else np.zeros(0, np.int32)
        self.part_of = np.array(part_of, np.int32)
        self.heldout = np.array(heldout, bool)
        self.hashes = np.array(hashes, np.uint64)
        self.ranks = np.array(ranks, np.int32)
        self.answers = np.array(answers, np.int64)
        self.labels = np.array(labels, np.int32)
        self._bytes = np.memmap(path, np.uint8, "r") if position else np.zeros(0, np.uint8)

    def text(self, piece: int) -> str:
        """The text of a piece."""
        end = self._ends[piece]
        return self._bytes[end - self.sizes[piece] : end].tobytes().decode()

    def batches(self, pieces: Sequence[int] | np.ndarray, max_bytes: int) -> Iterator[tuple[list[int], list[str]]]:
        """Yields (pieces, their texts) in the order given, at least one piece and about `max_bytes` at a time."""
        batch: list[int] = []
        size = 0
        for piece in map(int, pieces):
            batch.append(piece)
            size += int(self.sizes[piece])
            if size >= max_bytes:
                yield batch, [self.text(i) for i in batch]
                batch, size = [], 0
        if batch:
            yield batch, [self.text(i) for i in batch]

    def within(self, max_megabytes: int) -> np.ndarray:
        """Which pieces stay when the text is limited, the limit spread evenly over the domains.

        A domain smaller than its share leaves the rest to the others. Pieces are taken in their order, the
        first of a domain always.

        Returns:
          bool [pieces].
        """
        keep = np.ones(len(self.sizes), bool)
        if not max_megabytes:
            return keep
        totals = np.bincount(self.domain_of, self.sizes, minlength=len(self.domains))
        share = _even_share(totals, max_megabytes * _MEGABYTE)
        for domain in range(len(self.domains)):
            pieces = np.flatnonzero(self.domain_of == domain)
            keep[pieces[1:]] = np.cumsum(self.sizes[pieces])[1:] <= share
        return keep


def _even_share(totals: np.ndarray, limit: float) -> float:
    """The largest share x with Σ min(total, x) ≤ limit; infinite if the totals fit."""
    left = float(limit)
    for taken, total in enumerate(np.sort(totals)):
        share = left / (len(totals) - taken)
        if total > share:
            return share
        left -= total
    return float("inf")

"""Exact duplicates among any number of documents, with the digests on disk and some tens of megabytes in memory.

A unit's digests lie in segments, each sorted. A bucket is a range of digests: it reads its part of every segment,
finds which are not the first of their kind, and writes where those stand, unit after unit. Which document is the first
depends on the order of units and places alone.
"""

import pathlib
from array import array
from collections.abc import Sequence

import numpy as np

from emo_jax.data.files import new_file, read_range

_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")])
_SEGMENT = 1 << 19  # digests that are sorted at a time
_SLOT_BITS = 12  # a segment's index has a place for each value of a digest's first bits
_SLOTS = 1 << _SLOT_BITS
_BUCKET = 1 << 19  # documents of a bucket, about


class DigestWriter:
    """Writes a unit's digests to a file, and finds those that occurred before in the same segment.

    Attributes:
      segments: for each segment its digests; what `find_duplicates` needs to know of the file.
      repeated: places of documents whose text stands earlier in their segment.
    """

    def __init__(self, path: pathlib.Path):
        self.segments: list[int] = []
        self.repeated = array("I")
        self._file = path.open("wb")
        self._digests, self._places = bytearray(), array("I")

    def add(self, digest: bytes, place: int) -> None:
        """Takes the digest, 16 bytes, of the document at a place; places ascend."""
        self._digests += digest
        self._places.append(place)
        if len(self._places) == _SEGMENT:
            self._flush()

    def close(self) -> None:
        """Writes what is left."""
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if not self._places:
            return
        records = np.empty(len(self._places), _RECORD)
        halves = np.frombuffer(self._digests, ">u8").reshape(-1, 2)
        records["high"], records["low"], records["place"] = halves[:, 0], halves[:, 1], self._places
        records = records[np.lexsort((records["place"], records["low"], records["high"]))]
        again = _equal_to_the_one_before(records)
        self.repeated.extend(sorted(records["place"][again].tolist()))
        records = records[~again]
        slots = (records["high"] >> np.uint64(64 - _SLOT_BITS)).astype(np.int64)
        self._file.write(np.searchsorted(slots, np.arange(_SLOTS + 1)).astype("<u4").tobytes())
        self._file.write(records.tobytes())
        self.segments.append(len(records))
        self._digests, self._places = bytearray(), array("I")


def bucket_count(documents: int) -> int:
    """How many buckets there are for so many digests."""
    return min(_SLOTS, max(1, -(-documents // _BUCKET)))


def find_duplicates(
    folder: str, name: str, bucket: int, buckets: int, units: Sequence[tuple[str, Sequence[int]]]
) -> None:
    """Writes the places of a bucket's documents that are not the first with their text.

    Args:
      folder: of the preparation.
      name: of the new file in it: int64 [units + 1], where each unit's places begin, then the places, uint32.
      bucket: its number, below `buckets`.
      buckets: how many there are.
      units: for each, in order, the path of its digests and their `DigestWriter.segments`.
    """
    first, stop = bucket * _SLOTS // buckets, (bucket + 1) * _SLOTS // buckets
    parts, owners = [], []
    for unit, (path, segments) in enumerate(units):
        for part in _read_slots(path, segments, first, stop):
            parts.append(part)
            owners.append(np.full(len(part), unit, np.uint32))
    records = np.concatenate(parts) if parts else np.empty(0, _RECORD)
    owner = np.concatenate(owners) if owners else np.empty(0, np.uint32)
    del parts, owners
    order = np.lexsort((records["place"], owner, records["low"], records["high"]))
    again = order[_equal_to_the_one_before(records[order])]
    again = again[np.lexsort((records["place"][again], owner[again]))]
    starts = np.searchsorted(owner[again], np.arange(len(units) + 1)).astype("<i8")
    with new_file(folder, name) as made, made.open("wb") as file:
        file.write(starts.tobytes())
        file.write(records["place"][again].astype("<u4").tobytes())


def duplicates_of(unit: int, units: int, documents: int, files: Sequence[str], repeated: bytes) -> np.ndarray:
    """Which documents of a unit are duplicates.

    Args:
      unit: its number.
      units: how many there are.
      documents: how many the unit has.
      files: of all buckets, as `find_duplicates` wrote them.
      repeated: the unit's `DigestWriter.repeated`, as bytes.

    Returns:
      bool [documents].
    """
    found = np.zeros(documents, bool)
    found[np.frombuffer(repeated, np.uint32)] = True
    for path in files:
        start, stop = np.frombuffer(read_range(path, 8 * unit, 16), "<i8").tolist()
        if stop > start:
            data = read_range(path, 8 * (units + 1) + 4 * start, 4 * (stop - start))
            found[np.frombuffer(data, "<u4")] = True
    return found


def _read_slots(path: str, segments: Sequence[int], first: int, stop: int) -> list[np.ndarray]:
    parts, start = [], 0
    for count in segments:
        index = np.frombuffer(read_range(path, start + 4 * first, 4 * (stop - first + 1)), "<u4")
        low, high = int(index[0]), int(index[-1])
        start += 4 * (_SLOTS + 1)
        if high > low:
            data = read_range(path, start + _RECORD.itemsize * low, _RECORD.itemsize * (high - low))
            parts.append(np.frombuffer(data, _RECORD))
        start += _RECORD.itemsize * count
    return parts


def _equal_to_the_one_before(records: np.ndarray) -> np.ndarray:
    equal = np.zeros(len(records), bool)
    equal[1:] = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
    return equal

"""Shards: documents of one domain in a file of tokens, in either layout, beside a file of where each begins.

`array_record`: one record a document, its tokens as little-endian uint32, end token included. `olmo`: all tokens one
behind another, as little-endian uint32 or uint16, without a header. The offsets are an `.npy` file, int64
[documents + 1], in tokens.
"""

import hashlib
import os
import pathlib
from array import array
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from emo_jax.data.files import new_file, publish, sha256, temporary
from emo_jax.data.store import Split
from emo_jax.errors import require

SUFFIXES = {"array_record": ".array_record", "olmo": ".npy"}
_TOKEN = np.dtype("<u4")
# A record is read without its neighbours. A window longer than most documents takes memory and saves no disk.
_RECORD_OPTIONS = "group_size:1,window_log:16"


class ShardWriter:
    """Writes the documents of one unit and one domain; a new file begins where one has had its share of text.

    Attributes:
      entries: for the manifest: of each finished file names, counts and sha256.
    """

    def __init__(self, folder: str, layout: str, domain: str, unit: int, text_bytes: int):
        """For a preparation's folder, and files of about `text_bytes` bytes of text each."""
        self.entries: list[dict[str, Any]] = []
        self._folder, self._layout, self._domain, self._unit = folder, layout, domain, unit
        self._limit = text_bytes
        self._file: Any = None
        self._lengths, self._bytes = array("q"), 0

    def write(self, tokens: Sequence[int], text_bytes: int) -> None:
        """Adds a document: its tokens, end token included, and how many bytes its text has."""
        if self._file is None:
            self._open()
        self._file.write(np.array(tokens, _TOKEN).tobytes())
        self._lengths.append(len(tokens))
        self._bytes += text_bytes
        if self._bytes >= self._limit:
            self.close()

    def close(self) -> None:
        """Finishes the file in hand, if there is one."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        name = f"train/{folder_name(self._domain)}/part-{self._unit:05d}-{len(self.entries):05d}"
        entry = {"file": f"{name}{SUFFIXES[self._layout]}", "offsets": f"{name}.offsets.npy", "domain": self._domain}
        offsets = np.concatenate(([0], np.cumsum(self._lengths, dtype=np.int64))).astype("<i8")
        counts = {"documents": len(self._lengths), "tokens": int(offsets[-1]), "bytes": self._bytes}
        digest = sha256(self._path)
        write_offsets(self._folder, entry["offsets"], offsets)
        publish(self._path, self._folder, entry["file"])
        self.entries.append({**entry, **counts, "sha256": digest})

    def discard(self) -> None:
        """Removes the file in hand, if there is one."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._path.unlink(missing_ok=True)

    def _open(self) -> None:
        self._path = temporary(self._folder)
        self._lengths, self._bytes = array("q"), 0
        if self._layout == "olmo":
            self._file = self._path.open("wb")
        else:
            from array_record.python.array_record_module import ArrayRecordWriter

            self._file = ArrayRecordWriter(str(self._path), _RECORD_OPTIONS)


def folder_name(domain: str) -> str:
    """A domain's name as that of a folder: other characters than letters, digits and `_-.~` escaped by `%`."""
    name = quote(domain, safe="")
    name = f"%{ord(name[0]):02X}{name[1:]}" if name.startswith(".") else name
    return name if len(name) <= 120 else f"{name[:80]}-{hashlib.sha256(domain.encode()).hexdigest()[:16]}"


def write_offsets(folder: str, name: str, offsets: np.ndarray) -> None:
    """Writes where documents begin, int64 [documents + 1], as `folder/name`."""
    with new_file(folder, name) as path, path.open("wb") as file:
        np.save(file, offsets.astype("<i8"))


def open_shard(folder: pathlib.Path, entry: dict[str, Any], layout: str, domain: int) -> Split:
    """A shard as the documents of a store; nothing is read but what is asked for.

    Args:
      folder: of the preparation.
      entry: the shard's in the manifest; `length` is there where the array has tokens behind the last document's.
      layout: `array_record`, or the type of an array's tokens.
      domain: its index.

    Raises:
      UserError: where the files are not those of the manifest.
    """
    path, documents, total = folder / entry["file"], entry["documents"], entry["tokens"]
    offsets = _mapped(folder / entry["offsets"])
    require(
        offsets.shape == (documents + 1,) and int(offsets[-1]) == total,
        f"{folder / entry['offsets']} is not of {documents} documents with {total} tokens, as {folder}/manifest.json "
        "says; copy or prepare the folder again.",
    )
    tokens: Any
    if layout == "array_record":
        require(path.is_file(), f"{path} is missing; copy or prepare {folder} again.")
        tokens = _Records(path, offsets)
    else:
        dtype = np.dtype(layout).newbyteorder("<")
        length = entry.get("length", total)
        found = path.stat().st_size if path.is_file() else 0
        require(
            found == length * dtype.itemsize,
            f"{path} has {found} bytes, {folder}/manifest.json says {length * dtype.itemsize}; copy or prepare the "
            "folder again.",
        )
        tokens = np.asarray(np.memmap(path, dtype, "r", shape=(total,)))  # slices of the subclass cost more
    return Split(tokens, offsets, np.broadcast_to(np.int32(domain), (documents,)))


class _Records:
    """The tokens of an `array_record` shard, by position, as an array's are."""

    def __init__(self, path: pathlib.Path, offsets: np.ndarray):
        from array_record.python.array_record_module import ArrayRecordReader

        try:
            self._reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
            count = self._reader.num_records()
        except Exception as error:  # of several kinds
            require(False, f"{path} is damaged ({str(error).splitlines()[0][:200]}); copy or prepare it again.")
        require(
            count == len(offsets) - 1,
            f"{path} has {count} records for {len(offsets) - 1} documents; copy or prepare it again.",
        )
        self._path, self._offsets = path, offsets

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(len(self))
        if start >= stop:
            return np.zeros(0, _TOKEN)
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        tokens = np.frombuffer(b"".join(self._reader.read(first, last)), _TOKEN)
        base = int(self._offsets[first])
        require(
            len(tokens) == int(self._offsets[last]) - base,
            f"{self._path} holds other documents than its offsets say; copy or prepare it again.",
        )
        return tokens[start - base : stop - base]


def _mapped(path: pathlib.Path) -> np.ndarray:
    require(os.path.isfile(path), f"{path} is missing; copy or prepare its folder again.")
    return np.asarray(np.load(path, mmap_mode="r"))

"""What a preparation does with one unit. Stages share files below `.work/`, never documents.

`scan` reads a unit, judges its documents and leaves their digests; `dedup` finds which of all digests are not the
first of their kind; `tokenize` reads the unit again and writes its shards. Each leaves a small JSON file when it is
done, last.
"""

import contextlib
import dataclasses
import functools
import hashlib
import heapq
import json
import pathlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from emo_jax.data.config import PrepareConfig
from emo_jax.data.deduplication import DigestWriter, duplicates_of, find_duplicates
from emo_jax.data.documents import Document, cut_points, digest, heldout_by_digest
from emo_jax.data.files import new_file, open_file, read_json, read_range, write_bytes, write_json
from emo_jax.data.shards import ShardWriter
from emo_jax.data.tokenizer import SAMPLE_BYTES, encode, token_count
from emo_jax.data.units import BrokenFile, Corrupt, Input, Unit, lines_before, read_unit
from emo_jax.errors import UserError

WORK = ".work"
STOPPED = f"{WORK}/stopped.json"
"""There once a worker met a mistake of the user's: the others do no further unit."""
_SAMPLE_CHARACTERS = 20_000  # of a document
_ENCODE_BYTES = 1_000_000  # text that is tokenized at a time; a longer document is tokenized in pieces
_MAX_DOMAINS = 500  # of a unit: each has a file open


@dataclasses.dataclass(frozen=True)
class Job:
    """What every worker knows.

    Attributes:
      config: as given; `out` is absolute.
      given: the input.
      units: how many there are.
      bytes: of the input.
      buckets: of the deduplication; 0 before it.
      run: differs between runs of the program, whose workers keep what they read once.
    """

    config: PrepareConfig
    given: Input
    units: int
    bytes: int
    buckets: int = 0
    run: str = ""


def work_file(stage: str, number: int, suffix: str = "json") -> str:
    """The name of a file that a stage leaves for a unit or bucket, below the preparation's folder."""
    return f"{WORK}/{stage}/{number:06d}.{suffix}"


def drop_reason(config: PrepareConfig, text: str) -> str:
    """Why a document is dropped whatever else there is: `blank`, `short`, `long` or `repetitive`; empty: it stays."""
    if not text.strip():
        return "blank"
    if len(text) < config.min_characters:
        return "short"
    if config.max_characters and len(text) > config.max_characters:
        return "long"
    if config.max_duplicate_lines < 1 and duplicate_line_share(text) > config.max_duplicate_lines:
        return "repetitive"
    return ""


def duplicate_line_share(text: str) -> float:
    """The share of a document's characters that is in lines which stand earlier in it; line ends do not count."""
    seen: set[str] = set()
    total = repeated = 0
    for line in text.split("\n"):
        line = line.strip()
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / total if total else 0.0


def scan(job: Job, number: int, unit: Unit) -> None:
    """Reads a unit: what is dropped and why, what is corrupt, a fingerprint, digests, a sample for a tokenizer.

    Raises:
      UserError: on what cannot be read, unless it is to be skipped.
    """
    started, config, out = time.process_time(), job.config, job.config.out
    corrupt: list[Corrupt] = []
    broken = False
    with new_file(out, work_file("scan", number, "digests")) as path:
        found = _Scan(job, unit, path)
        try:
            found.read(corrupt)
        except BrokenFile as error:
            _refuse(job, error.corrupt, 0)
            corrupt, broken = [error.corrupt], True
            found.digests.close()
            found = _Scan(job, unit, path)  # what the file gave before it broke is not used
        finally:
            found.digests.close()
    if config.dedup:
        write_bytes(out, work_file("scan", number, "repeated"), found.digests.repeated.tobytes())
    if found.sample:
        write_json(out, work_file("sample", number), found.sample.texts())
    first_line = lines_before(job.given, unit) if corrupt and unit.start and job.given.source == "jsonl" else 0
    first_line = unit.start if job.given.source == "tfds" else first_line
    write_json(
        out,
        work_file("scan", number),
        {
            "documents": found.documents,
            "kept": found.kept,
            "bytes": found.bytes,
            "dropped": found.dropped,
            "corrupt": [c._replace(line=c.line + first_line if c.line else 0) for c in corrupt],
            "broken": broken,
            "segments": found.digests.segments,
            "fingerprint": found.summary.hexdigest(),
            "seconds": time.process_time() - started,
        },
    )


class _Scan:
    """What reading a unit once finds."""

    def __init__(self, job: Job, unit: Unit, path: pathlib.Path):
        self.digests = DigestWriter(path)
        self.summary = hashlib.sha256()
        self.dropped: dict[str, Counter[str]] = {}
        self.documents = self.kept = self.bytes = 0
        share = SAMPLE_BYTES * unit.bytes // max(job.bytes, 1) + 1
        self.sample = None if job.config.tokenizer else _Sample(share)
        self._job, self._unit = job, unit

    def read(self, corrupt: list[Corrupt]) -> None:
        config = self._job.config
        for document in _readable(self._job, self._unit, corrupt):
            key, reason = digest(document.text), drop_reason(config, document.text)
            self.summary.update(key + document.domain.encode() + b"\0")
            if reason:
                self.dropped.setdefault(reason, Counter())[document.domain] += 1
            else:
                self.kept += 1
                if config.dedup:
                    self.digests.add(key, self.documents)
                if self.sample and not heldout_by_digest(key, config.heldout_fraction):
                    self.sample.add(key, document.text)
            self.documents += 1
            self.bytes += len(document.text.encode())


def dedup(job: Job, bucket: int) -> None:
    """Finds the duplicates of one bucket."""
    started = time.process_time()
    scanned = _scanned(job.config.out, job.run)
    files = [
        (f"{job.config.out}/{work_file('scan', number, 'digests')}", segments)
        for number, segments in enumerate(scanned["segments"])
    ]
    find_duplicates(job.config.out, work_file("dedup", bucket, "places"), bucket, job.buckets, files)
    write_json(job.config.out, work_file("dedup", bucket), {"seconds": time.process_time() - started})


def tokenize(job: Job, number: int, unit: Unit) -> None:
    """Writes the shards of a unit, and its candidates for the held-out documents.

    Raises:
      UserError: where the unit reads otherwise than when it was scanned.
    """
    started, out = time.process_time(), job.config.out
    scanned = read_json(f"{out}/{work_file('scan', number)}")
    writer = _UnitWriter(job, number)
    try:
        if not scanned["broken"]:
            _write_documents(job, number, unit, scanned, writer)
            writer.close()
    finally:
        writer.discard()
    write_bytes(out, work_file("heldout", number), writer.heldout.to_json())
    write_json(
        out,
        work_file("tokenize", number),
        {
            "shards": [entry for domain in sorted(writer.shards) for entry in writer.shards[domain].entries],
            "dropped": {"duplicate": writer.duplicates} if writer.duplicates else {},
            "heldout": writer.heldout.counts,
            "bytes": scanned["bytes"],
            "seconds": time.process_time() - started,
        },
    )


def _write_documents(job: Job, number: int, unit: Unit, scanned: dict[str, Any], writer: "_UnitWriter") -> None:
    config, out = job.config, job.config.out
    repeats = np.zeros(scanned["documents"], bool)
    if config.dedup:
        buckets = [f"{out}/{work_file('dedup', bucket, 'places')}" for bucket in range(job.buckets)]
        size = 4 * (scanned["kept"] - sum(scanned["segments"]))
        again = read_range(f"{out}/{work_file('scan', number, 'repeated')}", 0, size)
        repeats = duplicates_of(number, job.units, scanned["documents"], buckets, again)
    summary = hashlib.sha256()
    place = -1
    with contextlib.suppress(BrokenFile):  # then the fingerprints differ
        for place, document in enumerate(_readable(job, unit, [])):
            key = digest(document.text)
            summary.update(key + document.domain.encode() + b"\0")
            if place < len(repeats) and not drop_reason(config, document.text):
                writer.add(key, document, repeats[place])
    if summary.hexdigest() != scanned["fingerprint"]:
        raise UserError(
            f"{', '.join(unit.files[:3])} read differently the second time: {scanned['documents']} documents with "
            f"fingerprint {scanned['fingerprint'][:12]} when it was scanned, now {place + 1} with "
            f"{summary.hexdigest()[:12]}. Delete {out} and prepare again from files that nobody changes."
        )


class _UnitWriter:
    """Sorts a unit's documents into shards by domain and held-out candidates, and tokenizes them in batches."""

    def __init__(self, job: Job, number: int):
        self.shards: dict[str, ShardWriter] = {}
        self.duplicates: Counter[str] = Counter()
        self._config, self._number = job.config, number
        self._tokenizer, self._end, _ = load_end_token(job)
        self.heldout = HeldoutChoice(job.config.heldout_documents)
        self._waiting: list[tuple[str, str]] = []
        self._size = 0

    def add(self, key: bytes, document: Document, repeated: bool) -> None:
        """Takes a document with its digest."""
        if repeated:
            self.duplicates[document.domain] += 1
            return
        if heldout_by_digest(key, self._config.heldout_fraction):
            text = document.text.encode()
            text = text[: cut_points(text, self._config.heldout_bytes)[0]]
            self.heldout.add(document.domain, key, text.decode())
            return
        if len(document.text) >= 2 * _ENCODE_BYTES:
            self._encode()  # it is tokenized alone, in pieces
        self._waiting.append((document.domain, document.text))
        self._size += len(document.text)
        if self._size >= _ENCODE_BYTES:
            self._encode()

    def close(self) -> None:
        """Writes what is left."""
        self._encode()
        for shard in self.shards.values():
            shard.close()

    def discard(self) -> None:
        """Removes unfinished files; nothing after `close`."""
        for shard in self.shards.values():
            shard.discard()

    def _encode(self) -> None:
        for domain, tokens, size in self._encoded():
            if domain not in self.shards:
                if len(self.shards) == _MAX_DOMAINS:
                    raise UserError(
                        f"A unit of the corpus has more than {_MAX_DOMAINS} domains, the last {domain!r}: each would "
                        "be a file of its own. Name broader domains, or leave them out: training does not see them."
                    )
                limit = int(1e6 * self._config.unit_megabytes)
                self.shards[domain] = ShardWriter(
                    self._config.out, self._config.format, domain, self._number, max(limit, 1)
                )
            self.shards[domain].write([*tokens, self._end], size)
        self._waiting, self._size = [], 0

    def _encoded(self) -> Iterator[tuple[str, list[int], int]]:
        if len(self._waiting) > 1 or self._size < 2 * _ENCODE_BYTES:
            texts = [text for _, text in self._waiting]
            for (domain, text), tokens in zip(self._waiting, encode(self._tokenizer, texts), strict=True):
                yield domain, tokens, len(text.encode())
            return
        ((domain, text),) = self._waiting
        data, tokens, start = text.encode(), [], 0
        for end in cut_points(data, _ENCODE_BYTES):
            tokens += encode(self._tokenizer, [data[start:end].decode()])[0]
            start = end
        yield domain, tokens, len(data)


class HeldoutChoice:
    """Of each domain's held-out documents those with the smallest digests.

    Attributes:
      counts: how many there were of each domain, chosen or not.
    """

    def __init__(self, most: int):
        self.counts: Counter[str] = Counter()
        self._most = most
        self._kept: dict[str, list[tuple[int, str]]] = {}

    def add(self, domain: str, key: bytes, text: str) -> None:
        """Takes a document."""
        self.counts[domain] += 1
        self._keep(domain, int.from_bytes(key), text)

    def update(self, data: bytes) -> None:
        """Takes what another chose, as its `to_json` gave it; `counts` stays."""
        for domain, documents in json.loads(data).items():
            for key, text in documents:
                self._keep(domain, int(key, 16), text)

    def chosen(self) -> dict[str, list[str]]:
        """Texts by domain, domains in the order of their names, the smallest digest first."""
        return {domain: [text for _, text in sorted(kept, reverse=True)] for domain, kept in sorted(self._kept.items())}

    def to_json(self) -> bytes:
        """For a file."""
        return json.dumps({d: [(f"{-key:x}", text) for key, text in kept] for d, kept in self._kept.items()}).encode()

    def _keep(self, domain: str, key: int, text: str) -> None:
        kept = self._kept.setdefault(domain, [])
        (heapq.heappushpop if len(kept) >= self._most else heapq.heappush)(kept, (-key, text))


class _Sample:
    """Of a unit's texts those with the smallest digests (their last bytes: the first ones choose what is held out)."""

    def __init__(self, size: int):
        self._size, self._held = size, 0
        self._heap: list[tuple[int, str]] = []
        self._keys: set[int] = set()

    def add(self, key: bytes, text: str) -> None:
        rank = -int.from_bytes(key[8:])
        if rank in self._keys or (self._held >= self._size and rank < self._heap[0][0]):
            return
        text = text[:_SAMPLE_CHARACTERS]
        heapq.heappush(self._heap, (rank, text))
        self._keys.add(rank)
        self._held += len(text.encode())
        while self._held - len(self._heap[0][1].encode()) >= self._size:
            rank, text = heapq.heappop(self._heap)
            self._keys.remove(rank)
            self._held -= len(text.encode())

    def texts(self) -> list[tuple[str, str]]:
        return [(f"{-rank:016x}", text) for rank, text in sorted(self._heap, reverse=True)]


def _readable(job: Job, unit: Unit, corrupt: list[Corrupt]) -> Iterator[Document]:
    """The documents of a unit; what cannot be read is appended to `corrupt`, or refused."""
    for item in read_unit(job.given, unit):
        if isinstance(item, Corrupt):
            if job.config.on_corrupt == "stop":
                known = job.given.source == "jsonl" and unit.start and item.line
                first = lines_before(job.given, unit) if known else unit.start if job.given.source == "tfds" else 0
                _refuse(job, item, first)
            corrupt.append(item)
        else:
            yield item


def _refuse(job: Job, corrupt: Corrupt, first_line: int) -> None:
    if job.config.on_corrupt == "stop":
        where = f"{corrupt.file}:{corrupt.line + first_line}" if corrupt.line else corrupt.file
        what = "that line" if corrupt.line else "that file"
        raise UserError(
            f"{where} {corrupt.reason}. Repair it, or give --on_corrupt=skip, which leaves {what} out and lists it."
        )


@functools.lru_cache(maxsize=1)
def _scanned(out: str, run: str) -> dict[str, Any]:
    return read_json(f"{out}/{WORK}/scanned.json")


def load_end_token(job: Job) -> tuple[Tokenizer, int, int]:
    """The preparation's tokenizer, the id of the token that ends documents, and one past the largest id."""
    return _tokenizer(f"{job.config.out}/tokenizer.json", job.config.end_of_text, job.run)


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, end_of_text: str, run: str) -> tuple[Tokenizer, int, int]:
    with open_file(path) as file:
        tokenizer = Tokenizer.from_str(file.read().decode())
    tokenizer.encode_special_tokens = True
    return tokenizer, tokenizer.get_vocab(with_added_tokens=True)[end_of_text], token_count(tokenizer)

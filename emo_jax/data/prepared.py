"""Prepared folders as a token store: their shards are read where they lie; the store holds what refers to them.

Letters: S sequence, G documents in a row.
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from emo_jax.data.config import DataConfig, Part
from emo_jax.data.manifest import count_shards, read_manifest
from emo_jax.data.packing import Rows, pack_rows
from emo_jax.data.shards import open_shard
from emo_jax.data.sources import DEFAULT_DOMAIN
from emo_jax.data.store import FORMAT_VERSION, Log, Split, locked
from emo_jax.data.tokenizer import load_tokenizer
from emo_jax.errors import require

_OPEN_SHARDS = 128  # at a time: each may hold two files
_MOST_ROWS = 2**32  # that the shuffle tells apart


class Shards:
    """Training documents in many files, opened as they are needed.

    Attributes:
      parts: name, first shard and the one behind the last, of each part of a mixture.
      tokens: a range as long as the shards have tokens.
    """

    def __init__(self, prepared: list[dict[str, Any]], domains: tuple[str, ...]):
        """For the `prepared` entries of a store's manifest and its domains.

        Raises:
          UserError: where a folder has gone, or is another one than the store was made for.
        """
        self._entries: list[tuple[pathlib.Path, str, dict[str, Any], int]] = []
        self.parts: list[tuple[str, int, int]] = []
        for part in prepared:
            folder = pathlib.Path(part["path"])
            manifest = read_manifest(str(folder))
            require(
                manifest["fingerprint"] == part["fingerprint"],
                f"{folder} holds other tokens (fingerprint {manifest['fingerprint'][:12]}) than this run began with "
                f"({part['fingerprint'][:12]}); put them back, or use another workdir or data.cache_dir.",
            )
            start = len(self._entries)
            for entry in manifest["shards"]:
                domain = domains.index(named(entry["domain"], part["name"]))
                self._entries.append((folder, manifest["layout"], entry, domain))
            self.parts.append((part["name"], start, len(self._entries)))
        self.tokens = range(sum(entry["tokens"] for _, _, entry, _ in self._entries))
        self._documents = sum(entry["documents"] for _, _, entry, _ in self._entries)
        self.open = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def __len__(self) -> int:
        return self._documents

    def _open(self, shard: int) -> Split:
        """The documents of a shard."""
        folder, layout, entry, domain = self._entries[shard]
        return open_shard(folder, entry, layout, domain)

    def count(self) -> int:
        """How many shards there are."""
        return len(self._entries)

    def first_documents(self, domains: int, documents: int) -> Split:
        """The first so many documents of each domain, 0: all; domain after domain, in memory."""
        tokens: list[list[np.ndarray]] = [[] for _ in range(domains)]
        for shard, (_, _, _, domain) in enumerate(self._entries):
            left = documents - len(tokens[domain]) if documents else None
            if left == 0:
                continue
            split = self.open(shard)
            bounds = np.asarray(split.offsets[: left + 1 if left else None]).tolist()
            tokens[domain] += [np.array(split.tokens[a:b]) for a, b in itertools.pairwise(bounds)]
        flat = [document for found in tokens for document in found]
        joined = np.concatenate(flat) if flat else np.zeros(0, np.uint32)
        owner = np.repeat(np.arange(domains, dtype=np.int32), [len(found) for found in tokens])
        return Split(joined, np.cumsum([0, *map(len, flat)]), owner)


class ShardRows:
    """The rows of all shards, numbered one shard after another; kept in files beside the store.

    Attributes:
      parts: name, first row and the one behind the last, of each part of a mixture.
    """

    def __init__(self, shards: Shards, folder: pathlib.Path):
        self._shards = shards
        self._firsts = np.load(folder / "firsts.npy")
        self._rows = Rows(_mapped(folder / "spans.bin").reshape(-1, 2), _mapped(folder / "offsets.bin"))
        self.parts = [(name, int(self._firsts[start]), int(self._firsts[stop])) for name, start, stop in shards.parts]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, r: int) -> tuple[Split, np.ndarray]:
        shard = int(np.searchsorted(self._firsts, r, side="right")) - 1
        return self._shards.open(shard), self._rows[r]


def open_rows(shards: Shards, directory: pathlib.Path, config: DataConfig) -> ShardRows:
    """The rows of every shard for a shape and packing, from the store's files, which are made if there are none.

    A shard is packed at a time, so memory does not grow with their number. Of several processes one makes the files.

    Args:
      shards: of an open store.
      directory: of the store.
      config: `sequence_length`, `max_documents` and `packing` are read.

    Raises:
      UserError: where there are more rows in a part than the shuffle tells apart.
    """
    length, most = config.sequence_length, config.max_documents
    folder = directory / f"rows-{config.packing}-{length}-{most}"
    if not folder.is_dir():
        with locked(folder):
            if not folder.is_dir():
                _write_rows(shards, folder, config)
    rows = ShardRows(shards, folder)
    for name, start, stop in rows.parts:
        require(
            stop - start <= _MOST_ROWS,
            f"data.path has {stop - start} rows of {length} tokens{f' in part {name!r}' if name else ''}, and at most "
            f"{_MOST_ROWS} can be shuffled; raise data.sequence_length, or divide it into parts of a mixture.",
        )
    return rows


def _write_rows(shards: Shards, folder: pathlib.Path, config: DataConfig) -> None:
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    firsts, spans_written = [0], 0
    with (building / "spans.bin").open("wb") as spans, (building / "offsets.bin").open("wb") as offsets:
        for shard in range(shards.count()):
            ends = np.array(shards.open(shard).offsets)
            rows = pack_rows(ends, config.sequence_length, config.max_documents, config.packing)
            spans.write(rows.spans.astype("<i8").tobytes())
            offsets.write((rows.offsets[:-1] + spans_written).astype("<i8").tobytes())
            spans_written += len(rows.spans)
            firsts.append(firsts[-1] + len(rows))
        offsets.write(np.array([spans_written], "<i8").tobytes())
    np.save(building / "firsts.npy", np.array(firsts, np.int64))
    os.replace(building, folder)


def named(domain: str, part: str) -> str:
    """The name of a domain in a part of a mixture: documents without one have the part's."""
    return part if part and domain == DEFAULT_DOMAIN else domain


def write_prepared_store(
    config: DataConfig, vocab_size: int, directory: pathlib.Path, settings: dict[str, Any], log: Log
) -> None:
    """Writes the files of a store that refers to the prepared folders of `config.parts()`.

    Args:
      config: of source `tokens`, or a mixture of such parts.
      vocab_size: the model's.
      directory: an empty folder.
      settings: for its manifest.
      log: receives a line a part.

    Raises:
      UserError: where a folder is not a prepared one, or they do not fit together, the model or `config`.
    """
    found = [(part, pathlib.Path(part.path).expanduser().absolute()) for part in config.parts()]
    for part, _ in found:
        require(
            "://" not in part.path, f"{part.path} is not a local folder: tokens are memory-mapped; copy or mount it."
        )
    manifests = [read_manifest(str(folder)) for _, folder in found]
    tokenizer = _tokenizer(config, vocab_size, found, manifests)
    domains = sorted(
        {
            named(name, part.name)
            for (part, _), manifest in zip(found, manifests, strict=True)
            for name in manifest["domains"]
        }
    )
    counts, entries = [], []
    for (part, folder), manifest in zip(found, manifests, strict=True):
        what = f"data.mixture's part {part.name!r}" if part.name else "data.path"
        log(f"{what} is {folder}: {manifest['train']['tokens']:,} tokens in {len(manifest['shards'])} shards.")
        entries.append({"name": part.name, "path": str(folder), "fingerprint": manifest["fingerprint"]})
        counts += [{**shard, "domain": named(shard["domain"], part.name)} for shard in manifest["shards"]]
    heldout = _join_heldout(found, manifests, domains, directory)
    (directory / "tokenizer.json").write_bytes(tokenizer)
    manifest = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "domains": domains,
        "dtype": "uint32",
        "train": count_shards(counts, domains),
        "heldout": heldout,
        "tokenizer": manifests[0]["tokenizer"],
        "prepared": entries,
        "fingerprint": hashlib.sha256("".join(entry["fingerprint"] for entry in entries).encode()).hexdigest(),
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _tokenizer(
    config: DataConfig, vocab_size: int, found: list[tuple[Part, pathlib.Path]], manifests: list[dict[str, Any]]
) -> bytes:
    """The one tokenizer of all parts, as it is stored."""
    first = manifests[0]["tokenizer"]
    for (_, folder), manifest in zip(found[1:], manifests[1:], strict=True):
        require(
            manifest["tokenizer"]["sha256"] == first["sha256"],
            f"{folder} has another tokenizer (sha256 {manifest['tokenizer']['sha256'][:12]}) than {found[0][1]} "
            f"({first['sha256'][:12]}); prepare one again with --tokenizer={found[0][1]}/tokenizer.json.",
        )
    path = found[0][1] / "tokenizer.json"
    require(path.is_file(), f"{path} is missing; copy or prepare that folder again.")
    data = path.read_bytes()
    require(
        hashlib.sha256(data).hexdigest() == first["sha256"],
        f"{path} is not the tokenizer that made the tokens beside it; copy or prepare that folder again.",
    )
    require(
        config.end_of_text == first["end_of_text"],
        f"data.end_of_text={config.end_of_text!r}, but the documents of {found[0][1]} end with "
        f"{first['end_of_text']!r}; set that.",
    )
    load_tokenizer(path, config.end_of_text, vocab_size)  # refuses one that does not fit the model
    if config.tokenizer:
        given = load_tokenizer(config.tokenizer, config.end_of_text, vocab_size).to_str(pretty=True).encode()
        digest = hashlib.sha256(given).hexdigest()
        require(
            digest == first["sha256"],
            f"{config.tokenizer} (sha256 {digest[:12]}) is not the tokenizer of {found[0][1]} "
            f"({first['sha256'][:12]}); prepare the corpus with it (--tokenizer), or leave data.tokenizer empty.",
        )
    return data


def _join_heldout(
    found: list[tuple[Part, pathlib.Path]],
    manifests: list[dict[str, Any]],
    domains: list[str],
    directory: pathlib.Path,
) -> dict[str, Any]:
    """Copies the parts' held-out documents, domain after domain; returns their counts."""
    by_domain = {name: dict.fromkeys(("documents", "tokens", "bytes"), 0) for name in domains}
    documents: list[list[np.ndarray]] = [[] for _ in domains]
    for (part, folder), manifest in zip(found, manifests, strict=True):
        tokens = np.fromfile(folder / "heldout.bin", "<u4")
        require(
            hashlib.sha256(tokens.tobytes()).hexdigest() == manifest["heldout"]["sha256"],
            f"{folder}/heldout.bin is damaged; copy or prepare that folder again.",
        )
        offsets = np.load(folder / "heldout_offsets.npy")
        for place, own in enumerate(np.load(folder / "heldout_domains.npy").tolist()):
            index = domains.index(named(manifest["domains"][own], part.name))
            documents[index].append(tokens[offsets[place] : offsets[place + 1]])
        for name, count in manifest["heldout"]["by_domain"].items():
            total = by_domain[named(name, part.name)]
            for key, value in count.items():
                total[key] += value
    flat = [document for own in documents for document in own]
    (directory / "heldout.bin").write_bytes(b"".join(document.tobytes() for document in flat))
    np.save(directory / "heldout_offsets.npy", np.cumsum([0, *map(len, flat)]).astype(np.int64))
    owner = np.repeat(np.arange(len(domains), dtype=np.int32), [len(own) for own in documents])
    np.save(directory / "heldout_domains.npy", owner)
    totals = {key: sum(count[key] for count in by_domain.values()) for key in ("documents", "tokens", "bytes")}
    return {**totals, "by_domain": by_domain}


def _mapped(path: pathlib.Path) -> np.ndarray:
    return np.asarray(np.memmap(path, "<i8", "r")) if path.stat().st_size else np.zeros(0, np.int64)

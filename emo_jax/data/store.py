"""Tokens on disk: built once from a source, then read by memory map, so that a resumed run sees the same tokens."""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from emo_jax.data.config import DataConfig
from emo_jax.data.documents import Document, divide
from emo_jax.data.encoding import Encoded, encode_labelled, encode_parts
from emo_jax.data.sources import read_documents
from emo_jax.data.spool import Spool
from emo_jax.data.tokenizer import SAMPLE_BYTES, load_tokenizer, train_tokenizer
from emo_jax.errors import UserError, require

if TYPE_CHECKING:
    from emo_jax.data.prepared import Shards

FORMAT_VERSION = 1
_SPLITS = ("train", "heldout")
_CONTENT_FIELDS = (
    "source",
    "path",
    "text_field",
    "tokenizer",
    "end_of_text",
    "heldout_fraction",
    "heldout_documents",
    "max_document_bytes",
    "max_megabytes",
    "shuffle_seed",
    "mixture",
    "special_tokens",
)
_PREPARED_FIELDS = ("source", "path", "tokenizer", "end_of_text")  # a prepared folder has decided the others
_ENCODE_BYTES = 2_000_000  # text that is tokenized at a time
_HASH_BYTES = 1 << 22

Log = Callable[[str], None]
_Encode = Callable[[list[str], np.ndarray], Iterator[Encoded]]


def silent(message: str) -> None:
    """A `Log` that drops every message."""


@dataclasses.dataclass(frozen=True)
class Split:
    """One side of a store: documents one after another, each followed by the end token, if there is one (and no label).

    Attributes:
      tokens: uint16 or uint32 [N], read from disk as it is used.
      offsets: int64 [documents + 1], where each document starts; the last is N.
      domains: int32 [documents], indices into `TokenStore.domains`.
      answers: int64 [documents], a document's token where training begins; None: all begin with their first.
        With labels: where its tokens of type 1 begin, its length if it has none; None: the store has no types.
      labels: int32 [documents], of classified texts, -1 where unknown; None: for language modelling.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    domains: np.ndarray
    answers: np.ndarray | None = None
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.domains)


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """A finished store.

    Attributes:
      directory: where it lies; `tokenizer.json` is in there too.
      manifest: the contents of `manifest.json`: settings, domains, counts per split and domain, hashes.
    """

    directory: pathlib.Path
    manifest: dict[str, Any]

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain names, in the order of their indices."""
        return tuple(self.manifest["domains"])

    @property
    def parts(self) -> list[tuple[str, int, int]]:
        """Name, first training document (or shard) and the one behind the last, of each part of the mixture."""
        if not isinstance(self.train, Split):
            return self.train.parts
        return [tuple(part) for part in self.manifest.get("parts", [["", 0, len(self.train)]])]

    @property
    def longest(self) -> int:
        """Tokens of the longest document of both sides, where the store is no prepared folder."""
        assert isinstance(self.train, Split)
        return int(max(np.diff(split.offsets).max(initial=0) for split in (self.train, self.heldout)))

    @property
    def fingerprint(self) -> str:
        """sha256 over both token files, and the labels: equal for equal tokens in an equal order."""
        return self.manifest["fingerprint"]

    @property
    def tokenizer_hash(self) -> str:
        """sha256 of `tokenizer.json`."""
        return self.manifest["tokenizer"]["sha256"]

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The tokenizer that made the tokens."""
        return self.directory / "tokenizer.json"

    @property
    def end_of_text_id(self) -> int:
        """The token that ends every document; -1 where they end without one."""
        return self.manifest["tokenizer"]["end_of_text_id"]

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that made the tokens."""
        settings = self.manifest["settings"]
        return load_tokenizer(self.tokenizer_path, settings["end_of_text"], settings["vocab_size"])

    @functools.cached_property
    def train(self) -> "Split | Shards":
        """Training documents, shuffled within each part of the mixture; of prepared folders their shards."""
        if "prepared" in self.manifest:
            from emo_jax.data.prepared import Shards

            return Shards(self.manifest["prepared"], self.domains)
        return self._split("train")

    def documents(self, split: Split, *, answers: bool = False) -> Iterator[Document]:
        """Text and domain of each document of a split, as far as it was kept; of prompts with answers these alone."""
        tokenizer, starts = self.tokenizer(), split.offsets[:-1]
        if answers and split.answers is not None and split.labels is None:
            starts = starts + split.answers
        for start, stop, domain in zip(starts, split.offsets[1:], split.domains, strict=True):
            yield Document(tokenizer.decode(split.tokens[start:stop].tolist()), self.domains[domain])

    @functools.cached_property
    def heldout(self) -> Split:
        """Held-out documents, domain after domain."""
        return self._split("heldout")

    def _split(self, name: str) -> Split:
        count = self.manifest[name]["tokens"]
        path = self.directory / f"{name}.bin"
        dtype = np.dtype(self.manifest["dtype"])
        found = path.stat().st_size if path.exists() else 0
        require(
            found == count * dtype.itemsize,
            f"{path} has {found} bytes, its manifest says {count * dtype.itemsize}: delete {self.directory} "
            "and run again to rebuild it.",
        )

        def of_documents(what: str) -> np.ndarray | None:
            file = self.directory / f"{name}_{what}.npy"
            return np.load(file) if file.exists() else None

        return Split(
            tokens=np.memmap(path, dtype, "r") if count else np.zeros(0, dtype),
            offsets=np.load(self.directory / f"{name}_offsets.npy"),
            domains=np.load(self.directory / f"{name}_domains.npy"),
            answers=of_documents("answers"),
            labels=of_documents("labels"),
        )


def prepare_store(
    config: DataConfig, vocab_size: int, directory: str | os.PathLike[str], log: Log = silent
) -> TokenStore:
    """The store in `directory`, built if there is none yet; a finished one is never read from its source again.

    Processes of one machine may call this at the same time: one builds, the others wait for it.

    Args:
      config: what to read. Only fields that shape the stored tokens must agree with a store that exists.
      vocab_size: the model's.
      directory: local folder.
      log: receives a line of progress at a time.

    Raises:
      UserError: if `directory` holds a store made with other settings, or something else.
    """
    directory = _local(directory)
    with locked(directory):
        if not directory.exists() or not any(directory.iterdir()):
            return build_store(config, vocab_size, directory, log)
    store = open_store(directory)
    made_with = _settings(DataConfig(), vocab_size) | store.manifest["settings"]  # an older store lacks newer fields
    asked = _settings(config, vocab_size)
    if config.labels and store.longest < made_with["sequence_length"] and store.longest <= asked["sequence_length"]:
        asked["sequence_length"] = made_with["sequence_length"]  # neither cuts a text
    for name, value in asked.items():
        if made_with.get(name) != value:
            field = "model.vocab_size" if name == "vocab_size" else f"data.{name}"
            raise UserError(
                f"{directory} was made with {field}={made_with.get(name)!r}, this run asks for {value!r}. "
                f"Use another workdir or data.cache_dir, or delete {directory} to make it anew."
            )
    log(f"Reusing the tokens in {directory}.")
    return store


def open_store(directory: str | os.PathLike[str]) -> TokenStore:
    """Opens a finished store.

    Raises:
      UserError: if there is none, or another version of this library wrote it.
    """
    directory = _local(directory)
    path = directory / "manifest.json"
    require(path.is_file(), f"{directory} is not a token store: it has no manifest.json. Give another folder.")
    manifest = json.loads(path.read_text())
    require(
        "shards" not in manifest,
        f"{directory} is a prepared folder, not a token store: give it as data.path, with data.source=tokens.",
    )
    version = manifest.get("format_version")
    require(
        version == FORMAT_VERSION,
        f"{directory} has token format {version}, this version reads {FORMAT_VERSION}: delete it and run again.",
    )
    return TokenStore(directory, manifest)


def build_store(
    config: DataConfig, vocab_size: int, directory: str | os.PathLike[str], log: Log = silent
) -> TokenStore:
    """Reads the source and writes a store; `directory` appears only when it is complete.

    Args:
      config: what to read.
      vocab_size: the model's; the size of the tokenizer if one is trained.
      directory: local folder that does not exist yet or is empty. No other process may build it at the same
        time: `prepare_store` sees to that.
      log: receives a line of progress at a time.

    Raises:
      UserError: if the source holds no training documents, or the tokenizer does not fit.
    """
    config.validate()
    directory = _local(directory)
    require(
        not directory.exists() or not any(directory.iterdir()),
        f"{directory} is not empty: give another folder, or delete it to make it anew.",
    )
    building = directory.with_name(f".{directory.name}.building")
    shutil.rmtree(building, ignore_errors=True)  # left behind by a build that was killed
    building.mkdir(parents=True)
    try:
        _write(config, vocab_size, building, log)
        os.replace(building, directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return open_store(directory)


def _write(config: DataConfig, vocab_size: int, directory: pathlib.Path, log: Log) -> None:
    if config.parts()[0].source == "tokens":
        from emo_jax.data.prepared import write_prepared_store

        write_prepared_store(config, vocab_size, directory, _settings(config, vocab_size), log)
        return
    log(f"Reading {config.source} {config.path}".rstrip() + " ...")
    texts_path = directory / "texts"
    spool = Spool(
        read_documents(config),
        texts_path,
        max_piece_bytes=config.max_document_bytes,
        heldout_fraction=config.heldout_fraction,
        max_megabytes=config.max_megabytes,
    )
    for index, part in enumerate(config.parts()):
        what = f"data.source={config.source!r} at data.path={config.path!r}"
        what = f"data.mixture's part {part.name!r} ({part.source} {part.path})" if part.name else what
        require(bool((spool.part_of == index).any()), f"{what} holds no text{' of its own' if part.name else ''}.")
    keep = spool.within(config.max_megabytes)
    train = np.flatnonzero(keep & ~spool.heldout)
    require(
        len(train) > 0,
        f"data.heldout_fraction={config.heldout_fraction} leaves none of {len(spool.sizes)} documents for training; "
        "lower it or give more documents.",
    )
    shuffled = np.random.default_rng(config.shuffle_seed).permutation(train)
    pieces = {
        "train": shuffled[np.argsort(spool.part_of[shuffled], kind="stable")],
        "heldout": _choose_heldout(spool, np.flatnonzero(keep & spool.heldout), config.heldout_documents),
    }

    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer, config.end_of_text, vocab_size)
    else:
        log(f"Training a tokenizer of {vocab_size} entries ...")
        tokenizer = train_tokenizer(_sample(spool, pieces["train"]), vocab_size, config.end_of_text)
        if tokenizer.get_vocab_size() < vocab_size:
            log(f"The text yields only {tokenizer.get_vocab_size()} entries; the other ids stay unused.")
    tokenizer_json = tokenizer.to_str(pretty=True).encode()
    (directory / "tokenizer.json").write_bytes(tokenizer_json)

    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    end_id = tokenizer.get_vocab(with_added_tokens=True)[config.end_of_text] if config.end_of_text else -1

    def encode(texts: list[str], answers: np.ndarray) -> Iterator[Encoded]:
        if not config.labels:
            return encode_parts(tokenizer, texts, answers, end_id)
        pairs = [divide(text, at) for text, at in zip(texts, answers, strict=True)]
        length, special = config.sequence_length, config.special_tokens
        return encode_labelled(tokenizer, pairs, sequence_length=length, special_tokens=special)

    counts = {}
    for name in _SPLITS:
        pieces[name], counts[name], cut = _write_split(spool, pieces[name], encode, np.dtype(dtype), directory / name)
        log(f"{name}: {counts[name]['documents']} documents, {counts[name]['tokens']} tokens.")
        if cut:
            log(f"{name}: {cut} documents are cut to data.sequence_length={config.sequence_length} tokens.")
    texts_path.unlink()
    missing = [name for name, count in counts["heldout"]["by_domain"].items() if not count["documents"]]
    if missing:
        log(f"No held-out documents in {', '.join(missing)}: raise data.heldout_fraction or give more text.")
    manifest = {
        "format_version": FORMAT_VERSION,
        "settings": _settings(config, vocab_size),
        "domains": spool.domains,
        "parts": _parts(config, spool.part_of[pieces["train"]]),
        "dtype": np.dtype(dtype).name,
        **counts,
        "duplicates_dropped": spool.duplicates,
        "tokenizer": {
            "sha256": hashlib.sha256(tokenizer_json).hexdigest(),
            "vocab_size": tokenizer.get_vocab_size(),
            "end_of_text_id": end_id,
        },
        "fingerprint": _fingerprint(directory),
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _choose_heldout(spool: Spool, pieces: np.ndarray, most: int) -> np.ndarray:
    """The first `most` pieces of every domain: first pieces before second ones, then by hash of the document."""
    domains = spool.domain_of[pieces]
    pieces = pieces[np.lexsort((spool.hashes[pieces], spool.ranks[pieces], domains))]
    domains = spool.domain_of[pieces]
    place = np.arange(len(pieces)) - np.searchsorted(domains, domains)
    return pieces[place < most]


def _sample(spool: Spool, pieces: np.ndarray) -> Iterator[str]:
    few = np.searchsorted(np.cumsum(spool.sizes[pieces]), SAMPLE_BYTES) + 1
    for _, texts in spool.batches(pieces[:few], _ENCODE_BYTES):
        yield from texts


def _write_split(
    spool: Spool, pieces: np.ndarray, encode: _Encode, dtype: np.dtype, path: pathlib.Path
) -> tuple[np.ndarray, dict[str, Any], int]:
    """Writes `path`.bin and its arrays; returns the pieces that have tokens, their counts, and how many were cut."""
    lengths: list[int] = []
    answers: list[int] = []
    cut = 0
    with path.with_name(f"{path.name}.bin").open("wb") as file:
        for batch, texts in spool.batches(pieces, _ENCODE_BYTES):
            for encoded in encode(texts, spool.answers[batch]):
                answers.append(encoded.second)
                file.write(np.array(encoded.tokens, dtype).tobytes())
                lengths.append(len(encoded.tokens))
                cut += encoded.cut
    lengths_N = np.array(lengths, np.int64)
    pieces, lengths_N = pieces[lengths_N > 0], lengths_N[lengths_N > 0]
    domains_N = spool.domain_of[pieces]
    if any(answers):
        np.save(path.with_name(f"{path.name}_answers.npy"), np.array(answers, np.int64)[np.array(lengths) > 0])
    if (spool.labels[pieces] >= 0).any():
        np.save(path.with_name(f"{path.name}_labels.npy"), spool.labels[pieces])
    np.save(path.with_name(f"{path.name}_offsets.npy"), np.concatenate(([0], np.cumsum(lengths_N))).astype(np.int64))
    np.save(path.with_name(f"{path.name}_domains.npy"), domains_N.astype(np.int32))

    def count(chosen: np.ndarray) -> dict[str, int]:
        sizes = spool.sizes[pieces][chosen]
        return {"documents": len(sizes), "tokens": int(lengths_N[chosen].sum()), "bytes": int(sizes.sum())}

    by_domain = {name: count(domains_N == index) for index, name in enumerate(spool.domains)}
    return pieces, {**count(np.ones(len(pieces), bool)), "by_domain": by_domain}, cut


def _parts(config: DataConfig, part_of: np.ndarray) -> list[list[Any]]:
    """Name and document range of each part; `part_of` is sorted."""
    names = [part.name for part in config.parts()]
    bounds = np.searchsorted(part_of, np.arange(len(names) + 1)).tolist()
    for name, start, stop in zip(names, bounds, bounds[1:], strict=False):
        require(stop > start, f"data.mixture's part {name!r} has no training documents; give it more text.")
    return [[name, start, stop] for name, start, stop in zip(names, bounds, bounds[1:], strict=False)]


def _fingerprint(directory: pathlib.Path) -> str:
    digest = hashlib.sha256()
    paths = [directory / f"{name}{what}" for what in (".bin", "_labels.npy") for name in _SPLITS]
    for path in (path for path in paths if path.exists()):
        with path.open("rb") as file:
            while chunk := file.read(_HASH_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _settings(config: DataConfig, vocab_size: int) -> dict[str, Any]:
    fields = _PREPARED_FIELDS if config.parts()[0].source == "tokens" else _CONTENT_FIELDS
    settings = {name: getattr(config, name) for name in fields} | {"vocab_size": vocab_size}
    settings |= {"labels": list(config.labels)}  # as JSON has it
    settings |= {"sequence_length": config.sequence_length if config.labels else 0}  # else it only shapes rows
    # Weights choose rows, not tokens.
    return settings | {"mixture": [[part.name, part.source, part.path] for part in config.parts() if part.name]}


def _local(directory: str | os.PathLike[str]) -> pathlib.Path:
    require(
        "://" not in str(directory),
        f"{directory} is not a local folder: tokens are memory-mapped, so set data.cache_dir to a local one.",
    )
    return pathlib.Path(directory).expanduser().absolute()


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Held by one process of this machine at a time; the system releases it when a process dies."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f".{directory.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

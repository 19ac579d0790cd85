"""A corpus becomes shards of tokens, a held-out set and a manifest, by stages that can be interrupted anywhere."""

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import pathlib
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from emo_jax.data.arrays import choose_heldout, plan_arrays
from emo_jax.data.config import PrepareConfig
from emo_jax.data.deduplication import bucket_count
from emo_jax.data.files import (
    delete_file,
    delete_folder,
    exists,
    is_remote,
    list_folder,
    open_file,
    read_json,
    write_bytes,
    write_json,
)
from emo_jax.data.manifest import count_shards, read_manifest, write_heldout, write_manifest, write_mix
from emo_jax.data.stages import STOPPED, WORK, HeldoutChoice, Job, load_end_token, work_file
from emo_jax.data.store import Log, silent
from emo_jax.data.tokenizer import SAMPLE_BYTES, encode, load_tokenizer, train_tokenizer
from emo_jax.data.units import Unit, plan_units
from emo_jax.errors import UserError, require

# Where things lie, which the manifest has by what they hold; and what may change between a run and its continuation.
_NOT_CONTENT = ("path", "out", "tokenizer", "on_corrupt")


def prepare(config: PrepareConfig, flags: Sequence[str] = (), workers: int = 1, log: Log = silent) -> dict[str, Any]:
    """Prepares a corpus; goes on where an earlier call was interrupted.

    What it writes is a function of the input and `config`: not of workers, runner or interruptions.

    Args:
      config: what to read and what to make of it.
      flags: Beam's, such as `--runner=DataflowRunner`.
      workers: processes on this machine.
      log: receives a line of progress at a time.

    Returns:
      The manifest.

    Raises:
      UserError: on settings that cannot work, or other ones than `config.out` was begun with; on input that cannot be
        read, or has changed.
    """
    config.validate()
    if not is_remote(config.out):
        config = dataclasses.replace(config, out=str(pathlib.Path(config.out).expanduser().absolute()))
    with _only_process(config.out):
        return _Preparation(config, flags, workers, log).run()


class _Preparation:
    """One call of `prepare`."""

    def __init__(self, config: PrepareConfig, flags: Sequence[str], workers: int, log: Log):
        from emo_jax.data.beam import pipeline_options

        self.config, self.out, self.log, self.workers = config, config.out, log, workers
        names = [field.name for field in dataclasses.fields(config)]
        self.options = pipeline_options(flags, workers, names)
        self.given_tokenizer = _given_tokenizer(config)
        with _flag_names():
            if config.source == "olmo":
                self.given, self.units = plan_arrays(config.path)
            else:
                self.given, self.units = plan_units(
                    config.source, config.path, config.text_field, config.unit_megabytes
                )
        self.job = Job(config, self.given, len(self.units), sum(unit.bytes for unit in self.units), 0, uuid.uuid4().hex)

    def run(self) -> dict[str, Any]:
        """All stages."""
        plan = {"settings": _settings(self.config, self.given_tokenizer), "inputs": _inputs(self.units)}
        done = f"{self.out}/manifest.json"
        if exists(done):
            manifest = read_manifest(self.out)
            _same(self.out, manifest, plan)
            delete_folder(f"{self.out}/{WORK}")
            self.log(f"{self.out} is complete; there is nothing to do.")
            return manifest
        self._begin(plan)
        if self.config.source == "olmo":
            self._make_tokenizer()
            self._stage("index", list(enumerate(self.units)))
            manifest = self._finish_arrays(plan)
            delete_folder(f"{self.out}/{WORK}")
            return manifest
        self._stage("scan", list(enumerate(self.units)))
        scanned = self._scanned()
        self._make_tokenizer()
        if self.config.dedup:
            self.job = dataclasses.replace(self.job, buckets=bucket_count(sum(scanned["kept"])))
            self._stage("dedup", [(bucket, None) for bucket in range(self.job.buckets)])
        self._stage("tokenize", list(enumerate(self.units)))
        manifest = self._finish(plan)
        delete_folder(f"{self.out}/{WORK}")
        return manifest

    def _begin(self, plan: dict[str, Any]) -> None:
        path = f"{self.out}/{WORK}/plan.json"
        if exists(path):
            _same(self.out, read_json(path), plan)
            self.log(f"Going on with {self.out}.")
        else:
            found = [name for name in list_folder(self.out) if not name.startswith(WORK)]
            require(not found, f"{self.out} is not empty: it holds {', '.join(found[:3])}. Give another --out.")
            write_json(self.out, f"{WORK}/plan.json", plan)
        delete_folder(f"{self.out}/{WORK}/tmp")
        delete_file(f"{self.out}/{STOPPED}")
        size = (
            f"{len(self.units)} units"
            if self.given.source == "tfds"
            else (f"{self.job.bytes / 1e6:,.1f} MB in {len(self.units)} units")
        )
        self.log(f"Preparing {size} of {self.config.source} {self.config.path}.")

    def _stage(self, stage: str, elements: list[tuple[int, Unit | None]]) -> None:
        from emo_jax.data.beam import run_stage

        folder = os.path.dirname(work_file(stage, 0))
        names = set(list_folder(f"{self.out}/{folder}"))
        left = [element for element in elements if os.path.basename(work_file(stage, element[0])) not in names]
        before = len(elements) - len(left)
        if before:
            self.log(f"{stage}: {before} of {len(elements)} were done.")
        if not left:
            return
        # Beam's local runner deals the parts out in turn: large ones first, so that each worker has its share.
        left.sort(key=lambda element: -(element[1].bytes if element[1] else 0))
        started = time.monotonic()

        def progress(done: int) -> None:
            share = max(done - before, 0) / len(left)
            ahead = f", {(time.monotonic() - started) * (1 - share) / share:,.0f} s to go" if share else ""
            self.log(f"{stage}: {done} of {len(elements)}{ahead}")

        run_stage(stage, self.job, left, self.options, progress)
        self._tell_rate(stage, left, time.monotonic() - started)

    def _tell_rate(self, stage: str, elements: list[tuple[int, Unit | None]], seconds: float) -> None:
        results = [read_json(f"{self.out}/{work_file(stage, number)}") for number, _ in elements]
        text, busy = sum(result.get("bytes", 0) for result in results), sum(result["seconds"] for result in results)
        line = f"{stage}: {len(elements)} done in {seconds:.1f} s"
        if text:
            rate = f"{text / 1e6:,.1f} MB of text, {text / 1e6 / seconds:,.1f} MB/s"
            line += f", {rate}, {text / 1e6 / max(busy, 1e-9):,.1f} MB/s a busy core"
        if stage == "tokenize":
            tokens = sum(shard["tokens"] for result in results for shard in result["shards"])
            line += f", {tokens / max(busy, 1e-9):,.0f} tokens/s a busy core"
        self.log(line + ".")

    def _scanned(self) -> dict[str, Any]:
        """What the later stages need to know of every unit; also tells what is corrupt."""
        summary: dict[str, list] = {"segments": [], "kept": []}
        for number in range(len(self.units)):
            result = read_json(f"{self.out}/{work_file('scan', number)}")
            for name, values in summary.items():
                values.append(result[name])
            for file, line, reason in result["corrupt"]:
                self.log(f"Skipped {file}{f':{line}' if line else ''}: it {reason}.")
        require(
            sum(summary["kept"]) > 0,
            f"--path={self.config.path!r} holds no document that the filters keep; nothing is left to prepare.",
        )
        write_json(self.out, f"{WORK}/scanned.json", summary)
        return summary

    def _make_tokenizer(self) -> None:
        if exists(f"{self.out}/tokenizer.json"):
            return
        data = self.given_tokenizer
        if not data:
            self.log(f"Training a tokenizer of {self.config.vocab_size} entries ...")
            with _flag_names():
                made = train_tokenizer(self._sample(), self.config.vocab_size, self.config.end_of_text)
            data = made.to_str(pretty=True).encode()
        write_bytes(self.out, "tokenizer.json", data)

    def _sample(self) -> Iterator[str]:
        texts: dict[str, str] = {}
        for number in range(len(self.units)):
            name = f"{self.out}/{work_file('sample', number)}"
            texts |= dict(read_json(name)) if exists(name) else {}
        size = 0
        for rank in sorted(texts):
            if size >= SAMPLE_BYTES:
                return
            size += len(texts[rank].encode())
            yield texts[rank]

    def _finish(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Writes the held-out documents, the mix file and, last, the manifest."""
        shards: list[dict[str, Any]] = []
        dropped: dict[str, Counter[str]] = {}
        choice = HeldoutChoice(self.config.heldout_documents)
        corrupt, inputs = [], plan["inputs"]
        for number in range(len(self.units)):
            scanned = read_json(f"{self.out}/{work_file('scan', number)}")
            result = read_json(f"{self.out}/{work_file('tokenize', number)}")
            shards += result["shards"]
            for reason, counts in [*scanned["dropped"].items(), *result["dropped"].items()]:
                dropped.setdefault(reason, Counter()).update(counts)
            choice.counts.update(result["heldout"])
            with open_file(f"{self.out}/{work_file('heldout', number)}") as file:
                choice.update(file.read())
            corrupt += [{"file": file, "line": line, "reason": reason} for file, line, reason in scanned["corrupt"]]
            inputs[number] |= {"documents": scanned["documents"], "fingerprint": scanned["fingerprint"]}
        require(
            bool(shards),
            f"--heldout_fraction={self.config.heldout_fraction} leaves nothing for training; lower it or give more.",
        )
        domains = sorted({shard["domain"] for shard in shards} | set(choice.counts))
        tokenizer, end, _ = load_end_token(self.job)
        heldout = _write_heldout(self.out, domains, choice, tokenizer, end)
        missing = [name for name in domains if not choice.counts[name]]
        if missing:
            self.log(f"No held-out documents in {', '.join(missing)}: raise --heldout_fraction or give more text.")
        if self.config.format == "olmo":
            write_mix(self.out, shards)
        manifest = {
            "settings": plan["settings"],
            "tokenizer": self._tokenizer_entry(),
            "layout": "array_record" if self.config.format == "array_record" else "uint32",
            "domains": domains,
            "train": count_shards(shards, domains),
            "heldout": heldout,
            "dropped": {reason: dict(sorted(dropped[reason].items())) for reason in sorted(dropped)},
            "corrupt": corrupt,
            "inputs": inputs,
            "shards": shards,
        }
        return write_manifest(self.out, manifest)

    def _finish_arrays(self, plan: dict[str, Any]) -> dict[str, Any]:
        """The same for arrays that others made."""
        shards, domains, heldout = choose_heldout(self.job, self.units)
        manifest = {
            "settings": plan["settings"],
            "tokenizer": self._tokenizer_entry(),
            "layout": self.config.token_type,
            "domains": domains,
            "train": count_shards(shards, domains),
            "heldout": heldout,
            "dropped": {},
            "corrupt": [],
            "inputs": plan["inputs"],
            "shards": shards,
        }
        return write_manifest(self.out, manifest)

    def _tokenizer_entry(self) -> dict[str, Any]:
        tokenizer, end, _ = load_end_token(self.job)
        with open_file(f"{self.out}/tokenizer.json") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        return {
            "sha256": digest,
            "vocab_size": tokenizer.get_vocab_size(),
            "end_of_text": self.config.end_of_text,
            "end_of_text_id": end,
        }


def _write_heldout(
    out: str, domains: list[str], choice: HeldoutChoice, tokenizer: Tokenizer, end: int
) -> dict[str, Any]:
    documents = [
        (domains.index(domain), [*tokens, end], len(text.encode()))
        for domain, texts in choice.chosen().items()
        for text, tokens in zip(texts, encode(tokenizer, texts), strict=True)
    ]
    return write_heldout(out, documents, domains) | {"kept_out": dict(sorted(choice.counts.items()))}


def _given_tokenizer(config: PrepareConfig) -> bytes:
    if not config.tokenizer:
        return b""
    with _flag_names():
        return load_tokenizer(config.tokenizer, config.end_of_text, 2**32).to_str(pretty=True).encode()


def _settings(config: PrepareConfig, tokenizer: bytes) -> dict[str, Any]:
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_CONTENT}
    if tokenizer:
        del values["vocab_size"]
    return values | {"tokenizer": f"sha256 {hashlib.sha256(tokenizer).hexdigest()}" if tokenizer else "trained"}


def _inputs(units: Sequence[Unit]) -> list[dict[str, Any]]:
    return [unit.to_json() for unit in units]


def _same(out: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises `UserError` where a folder was begun with other settings or other input."""
    for name in sorted(before["settings"].keys() | now["settings"].keys()):
        old, new = before["settings"].get(name), now["settings"].get(name)
        require(
            old == new,
            f"{out} was begun with --{name}={old}, this command asks for {new}: give what it was begun with, another "
            "--out, or delete it.",
        )
    old_sizes, new_sizes = _sizes(before["inputs"]), _sizes(now["inputs"])
    for name in sorted(old_sizes.keys() | new_sizes.keys()):
        old, new = old_sizes.get(name, "absent"), new_sizes.get(name, "absent")
        require(
            old == new,
            f"{name} of --path is not what {out} was begun with: its size was {old}, now {new}. Put the input back, "
            "give another --out, or delete it.",
        )


def _sizes(inputs: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {file: size for unit in inputs for file, size in zip(unit["files"], unit["sizes"], strict=True)}


@contextlib.contextmanager
def _flag_names() -> Iterator[None]:
    """Messages about a run's fields name our flags instead."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for name in ("data.path", "data.tokenizer", "data.end_of_text", "model.vocab_size"):
            text = text.replace(f"{name}=", f"--{name.partition('.')[2]}=")
        raise UserError(text) from error


@contextlib.contextmanager
def _only_process(out: str) -> Iterator[None]:
    """Holds a local folder; the system lets go of it however the process ends."""
    if is_remote(out):
        yield
        return
    folder = pathlib.Path(out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"Another process is preparing {out}; wait for it, stop it, or give another --out."
            ) from None
        yield

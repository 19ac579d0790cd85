"""Arrays of tokens that others made, by their mix file: indexed and split, never copied.

An array has no header; every document ends with the end token. A mix file has a line `label,path` an array, labels
being domains; paths are relative to its folder. Blank lines and lines with `#` in front are not read.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from emo_jax.data.documents import digest_bytes
from emo_jax.data.files import is_remote, join, open_file, read_json, write_json
from emo_jax.data.manifest import write_heldout
from emo_jax.data.shards import folder_name, write_offsets
from emo_jax.data.stages import Job, load_end_token, work_file
from emo_jax.data.units import Input, Unit
from emo_jax.errors import require

_CHUNK = 1 << 22  # tokens read at a time
_TEXT_BYTES = 4  # of a token, about


def plan_arrays(path: str) -> tuple[Input, list[Unit]]:
    """One unit an array of a mix file.

    Raises:
      UserError: where the file or one of its arrays is missing, or a line is something else.
    """
    require(not is_remote(path), f"--path={path!r} is not local: arrays are memory-mapped; copy or mount them.")
    path = os.path.expanduser(path)
    require(os.path.isfile(path), f"--path={path!r} is not a file; give a mix file with lines label,path.")
    root, units = os.path.dirname(os.path.abspath(path)), []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            label, comma, name = (part.strip() for part in line.partition(","))
            where = f"{path}:{number}"
            require(bool(label and comma and name), f"{where} is {line!r}; a line of a mix file is label,path.")
            require("{" not in name, f"{where} has the placeholder of {name!r}; write what stands there.")
            require(os.path.isfile(join(root, name)), f"{where} names {join(root, name)}, which does not exist.")
            units.append(Unit((name,), (os.path.getsize(join(root, name)),), domain=label))
    require(bool(units), f"--path={path!r} names no arrays; a line of a mix file is label,path.")
    return Input("olmo", root, False, ""), units


def index(job: Job, number: int, unit: Unit) -> None:
    """Finds an array's documents, and takes some at its end for evaluation.

    Raises:
      UserError: where the array has no end token, or is not of the type that was given.
    """
    started, config, out = time.process_time(), job.config, job.config.out
    (name,), path = unit.files, join(job.given.root, unit.files[0])
    dtype = np.dtype(config.token_type).newbyteorder("<")
    total, rest = divmod(os.path.getsize(path), dtype.itemsize)
    require(
        rest == 0 and total > 0,
        f"{path} has {os.path.getsize(path)} bytes, which is no number of {config.token_type} tokens; check "
        "--token_type, and that the file is whole.",
    )
    _, end, size = load_end_token(job)
    ends, summary = [np.zeros(1, np.int64)], hashlib.sha256()
    for start, tokens in _chunks(path, dtype):
        summary.update(tokens.tobytes())
        require(
            int(tokens.max()) < size,
            f"{path} has token {int(tokens.max())}, but --tokenizer={config.tokenizer!r} has only {size}; check it, "
            f"and --token_type={config.token_type}.",
        )
        ends.append(np.flatnonzero(tokens == end) + start + 1)
    offsets = np.concatenate(ends)
    require(
        len(offsets) > 1,
        f"{path} has no token {end}, which is --end_of_text={config.end_of_text!r}; check that, --tokenizer and "
        "--token_type.",
    )
    if offsets[-1] != total:
        offsets = np.append(offsets, total)  # a last document that has no end
    documents = len(offsets) - 1
    kept_out = min(config.heldout_documents, int(np.ceil(config.heldout_fraction * documents)), documents - 1)
    part = f"train/{folder_name(unit.domain)}/part-{number:05d}-00000.offsets.npy"
    last = documents - kept_out
    write_offsets(out, part, offsets[: last + 1])
    mapped = np.memmap(path, dtype, "r")
    most = max(config.heldout_bytes // _TEXT_BYTES, 1)
    chosen = [
        np.array(mapped[a : min(b, a + most)]) for a, b in zip(offsets[last:-1], offsets[last + 1 :], strict=True)
    ]
    write_json(
        out,
        work_file("index", number),
        {
            "shard": {
                "file": name if name.startswith("/") else os.path.relpath(path, out),
                "offsets": part,
                "domain": unit.domain,
                "documents": last,
                "tokens": int(offsets[last]),
                "bytes": 0,  # of text: nobody counted them
                "length": total,
                "sha256": summary.hexdigest(),
            },
            "documents": documents,
            "heldout": [tokens.tolist() for tokens in chosen],
            "seconds": time.process_time() - started,
        },
    )


def choose_heldout(job: Job, units: list[Unit]) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """All arrays' shards, the domains, and the held-out documents' counts; writes these documents.

    Of a domain those with the smallest digests of their tokens are taken.
    """
    tokenizer, end, _ = load_end_token(job)
    shards: list[dict[str, Any]] = []
    found: dict[str, list[tuple[bytes, list[int]]]] = {}
    for number, unit in enumerate(units):
        result = read_json(f"{job.config.out}/{work_file('index', number)}")
        shards.append(result["shard"])
        kept = found.setdefault(unit.domain, [])
        kept += [(digest_bytes(np.array(tokens, "<u4").tobytes()), tokens) for tokens in result["heldout"]]
        kept.sort()
        del kept[job.config.heldout_documents :]
    domains = sorted(found)
    documents = []
    for place, domain in enumerate(domains):
        for _, tokens in found[domain]:
            size = len(tokenizer.decode(tokens).encode())
            documents.append((place, tokens if tokens[-1] == end else [*tokens, end], size))
    return shards, domains, write_heldout(job.config.out, documents, domains)


def _chunks(path: str, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    with open_file(path) as file:
        while data := file.read(_CHUNK * dtype.itemsize):
            tokens = np.frombuffer(data, dtype)
            yield start, tokens
            start += len(tokens)

"""A prepared folder's manifest, held-out documents and mix file: what a reader needs to know of it."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from emo_jax.data.files import exists, new_file, read_json, write_bytes, write_json
from emo_jax.errors import require

FORMAT = "emo_jax prepared tokens"
FORMAT_VERSION = 1


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
      UserError: if it has none, or one of another version.
    """
    path = f"{folder}/manifest.json"
    require(
        exists(path),
        f"{folder} is not a prepared folder: it has no manifest.json. Give another, or make it with "
        "python -m emo_jax.prepare (a preparation that was interrupted goes on with the same command).",
    )
    manifest = read_json(path)
    require(
        manifest.get("format") == FORMAT,
        f"{folder} holds something else than prepared tokens; give a folder made by python -m emo_jax.prepare.",
    )
    version = manifest["format_version"]
    require(
        version == FORMAT_VERSION,
        f"{folder} has format {version}, this version reads {FORMAT_VERSION}: prepare it again.",
    )
    return manifest


def write_manifest(out: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Adds the fingerprint, of tokens and tokenizer, and writes the manifest; nothing is written after it."""
    content = [[shard["file"], shard["sha256"], shard["documents"], shard["tokens"]] for shard in manifest["shards"]]
    content += [manifest["heldout"]["sha256"], manifest["tokenizer"]["sha256"], manifest["domains"]]
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, **manifest}
    manifest["fingerprint"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    write_json(out, "manifest.json", manifest, indent=1)
    return manifest


def write_mix(out: str, shards: Sequence[dict[str, Any]]) -> None:
    """Writes `mix.txt`: a line `label,path` a shard."""
    lines = [f"{shard['file'].split('/')[1]},{shard['file']}\n" for shard in shards]
    write_bytes(out, "mix.txt", "".join(lines).encode())


def count_shards(shards: Sequence[dict[str, Any]], domains: Sequence[str]) -> dict[str, Any]:
    """Documents, tokens and bytes of text, in all and by domain."""
    by_domain = {name: dict.fromkeys(("documents", "tokens", "bytes"), 0) for name in domains}
    for shard in shards:
        for name, value in by_domain[shard["domain"]].items():
            by_domain[shard["domain"]][name] = value + shard[name]
    return {**_sum(by_domain), "by_domain": by_domain}


def write_heldout(out: str, documents: Sequence[tuple[int, Sequence[int], int]], domains: Sequence[str]) -> dict:
    """Writes held-out documents as a token store has them.

    Args:
      out: folder of the preparation.
      documents: domain's index, tokens and bytes of text of each, domain after domain.
      domains: their names.

    Returns:
      Counts for the manifest, in all and by domain, and a sha256.
    """
    lengths = [len(tokens) for _, tokens, _ in documents]
    flat = np.array([token for _, tokens, _ in documents for token in tokens], "<u4")
    for name, values in (
        ("heldout_offsets.npy", np.cumsum([0, *lengths]).astype("<i8")),
        ("heldout_domains.npy", np.array([domain for domain, _, _ in documents], "<i4")),
    ):
        with new_file(out, name) as path, path.open("wb") as file:
            np.save(file, values)
    write_bytes(out, "heldout.bin", flat.tobytes())
    by_domain = {name: dict.fromkeys(("documents", "tokens", "bytes"), 0) for name in domains}
    for domain, tokens, size in documents:
        count = by_domain[domains[domain]]
        count["documents"] += 1
        count["tokens"] += len(tokens)
        count["bytes"] += size
    return {**_sum(by_domain), "by_domain": by_domain, "sha256": hashlib.sha256(flat.tobytes()).hexdigest()}


def _sum(by_domain: dict[str, dict[str, int]]) -> dict[str, int]:
    return {name: sum(count[name] for count in by_domain.values()) for name in ("documents", "tokens", "bytes")}

"""Prepares a corpus: `python -m emo_jax.prepare --source=jsonl --path='texts/*.jsonl.gz' --out=prepared --workers=8`.

Reads JSON lines, text files or a TensorFlow dataset, leaves out duplicates and what the filters name, and writes
tokens that training reads where they lie: `--config.data.source=tokens --config.data.path=prepared`. What it writes
does not depend on the number of workers. The same command goes on where it was interrupted, and ends with the same
bytes.

It is an Apache Beam pipeline (`pip install 'emo_jax[prepare]'`): other runners and their options are Beam's own flags,
as in `--runner=DataflowRunner --project=P --region=R --temp_location=gs://B/tmp --setup_file=./setup.py`.
"""

import importlib.util
import os
import sys
from typing import Any

from absl import app, flags

from emo_jax import cli
from emo_jax.data.config import FORMATS, ON_CORRUPT, PREPARED_SOURCES, TOKEN_TYPES, PrepareConfig
from emo_jax.errors import UserError

_FLAGS = {
    "source": f"What is read: {', '.join(PREPARED_SOURCES)} (arrays of tokens that others made, by their mix file).",
    "path": "File, folder or glob; a dataset's folder or name; a mix file.",
    "out": "Folder for the result.",
    "text_field": "Where JSON objects and a dataset's examples hold their text.",
    "format": f"Of the result: {' or '.join(FORMATS)} (32-bit tokens without a header, and a mix file).",
    "tokenizer": "A tokenizer.json; empty: a byte-level BPE is trained on a sample of the corpus.",
    "vocab_size": "Entries of a tokenizer that is trained.",
    "end_of_text": "The token that ends every document.",
    "heldout_fraction": "Share of documents kept from training, by a hash of their text.",
    "heldout_documents": "Of those, how many of each domain evaluations read.",
    "heldout_bytes": "Of each of them at most so many first bytes.",
    "dedup": "Keep only the first of documents with the same text.",
    "min_characters": "Drop shorter documents.",
    "max_characters": "Drop longer documents; 0: none.",
    "max_duplicate_lines": "Drop documents with more than this share of characters in lines that they repeat; 1: none.",
    "on_corrupt": f"At what cannot be read: {' or '.join(ON_CORRUPT)} it, listed in the manifest.",
    "unit_megabytes": "Input that is done at a time, in 10^6 bytes.",
    "token_type": f"Of the arrays that --source=olmo reads: {' or '.join(TOKEN_TYPES)}.",
}
_DEFINE: dict[type, Any] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}
for _name, _help in _FLAGS.items():
    _default = getattr(PrepareConfig(), _name)
    _DEFINE[type(_default)](_name, _default, _help)
_WORKERS = flags.DEFINE_integer("workers", 1, "Processes on this machine.")
_BEAM: list[str] = []


def main() -> int:
    """Prepares, and prints what there is."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is a core
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in _FLAGS}
    config = PrepareConfig(**values)
    config.validate()
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError("emo_jax.prepare needs Apache Beam: pip install 'emo_jax[prepare]'.")
    from emo_jax.data.preparation import prepare

    manifest = prepare(config, _BEAM, _WORKERS.value, lambda line: print(line, flush=True))
    _print_counts(manifest)
    print(f"\nTrain on it: --config.data.source=tokens --config.data.path={config.out}")
    return 0


def _print_counts(manifest: dict) -> None:
    train, heldout = manifest["train"]["by_domain"], manifest["heldout"]["by_domain"]
    width = max(map(len, [*manifest["domains"], "domain"]))
    print(f"\n{'domain':<{width}}  {'documents':>12}  {'tokens':>15}  {'MB of text':>12}  {'held out':>9}")
    for name, count in [*train.items(), ("all", manifest["train"])]:
        kept = heldout[name] if name in heldout else manifest["heldout"]
        size = f"{count['bytes'] / 1e6:,.1f}" if count["bytes"] else "unknown"  # of others' arrays
        print(
            f"{name:<{width}}  {count['documents']:>12,}  {count['tokens']:>15,}  {size:>12}  {kept['documents']:>9,}"
        )
    dropped = {reason: sum(counts.values()) for reason, counts in manifest["dropped"].items()}
    print("Dropped: " + (", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "nothing") + ".")
    if manifest["corrupt"]:
        print(f"Skipped as corrupt: {len(manifest['corrupt']):,} lines or files, listed in manifest.json.")


def _take_beam_flags() -> None:
    """Moves what is not ours from the command line to `_BEAM`: absl would refuse it."""
    app.define_help_flags()
    ours, argv = [sys.argv[0]], sys.argv[1:]
    known = set(flags.FLAGS)
    takes_value = False
    for argument in argv:
        if argument.startswith("-"):
            name, has_value, _ = argument.lstrip("-").partition("=")
            mine = name in known or (name.startswith("no") and name[2:] in known)
            takes_value = name in known and not has_value and not flags.FLAGS[name].boolean
            (ours if mine else _BEAM).append(argument)
        else:
            (ours if takes_value else _BEAM).append(argument)
            takes_value = False
    sys.argv = ours


if __name__ == "__main__":
    os.environ.setdefault("GLIBC_TUNABLES", "")  # huge pages are for training: here they would only cost memory
    _take_beam_flags()
    cli.run(main)

"""From a Hugging Face folder to a saved model and back, a parameter at a time.

What a saved model cannot hold of the folder it came from lies beside it in `source/`: the small files, the rows of the
vocabulary that were cropped and the router rows of shared experts. So an export gives every bit back.
"""

import dataclasses
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from emo_jax.config import Config, DataConfig, PoolConfig
from emo_jax.data import token_count
from emo_jax.errors import UserError, require, require_choice
from emo_jax.interop import (
    abstract_leaves,
    copy_small_files,
    missing_leaves,
    read_config,
    read_leaves,
    read_unrouted,
    require_new,
    write_folder,
)
from emo_jax.interop.huggingface import CONFIG_FILE, read_json
from emo_jax.model import ModelConfig
from emo_jax.model.functional import LeafPath, leaf_shapes
from emo_jax.modularity import Subset
from emo_jax.training.checkpoints import DamagedError, check, checksums, first_line
from emo_jax.training.weights import (
    LEFT_OUT,
    POOLER,
    SOURCE,
    Saving,
    Stored,
    end_of_text,
    published_folder,
    saved_fingerprint,
    saved_model,
)

DTYPES = ("float32", "bfloat16", "float16")
"""That tensors can be exported in."""

_OTHERS = ("a", "b")
"""Any labels: an encoder with some has a pooler."""
_VOCABULARY_AXIS: dict[LeafPath, int] = {("embedding",): 0, ("head",): 1}
_DOWNLOADED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")

Kept = Sequence[Sequence[int]] | None
Progress = Callable[[int, int], None]
"""Told of bytes done and bytes in all, after each parameter."""


def silent(done: int, total: int) -> None:
    """A `Progress` that says nothing."""


def source_folder(name: str) -> Path:
    """The folder of that name, or else a repository of the Hugging Face Hub, downloaded into the hub's own cache.

    Raises:
      UserError: where there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    require(
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None,
        f"There is no folder {name!r}, and that is no name of a repository, such as owner/model, either.",
    )
    import huggingface_hub  # here, because most conversions do without

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_DOWNLOADED), ignore_patterns=["*/*"]))
    except Exception as error:  # whatever it, or a library below it, says of the network
        raise UserError(
            f"There is no folder {name!r}, and no repository of that name could be downloaded from the Hugging Face "
            f"Hub ({first_line(error)}). Check the name and the network (a gated repository also needs HF_TOKEN), or "
            "download it elsewhere and give the folder."
        ) from None


def import_folder(
    source: Path,
    target: Path,
    *,
    vocab_rows: int = 0,
    subset: Path | None = None,
    log: Callable[[str], None] = print,
    progress: Progress = silent,
) -> None:
    """Writes a Hugging Face folder as a saved model, see `save_model`; goes on where the same call was interrupted.

    Args:
      source: with `config.json` and safetensors.
      target: must not exist, or be empty; it appears when it is complete.
      vocab_rows: of the embedding and of a head that is not tied to it: rows beyond are cropped, missing ones are
        zeros. 0: as many as the folder's tokenizer has ids, or the folder's own number where it has no tokenizer.
      subset: file of the experts to keep; no other is read. None: all.
      log: told in words what is done.
      progress: told after each parameter.

    Raises:
      UserError: before anything is written: the source cannot be read, the target holds something, the subset is
        another model's, the tokenizer has more ids than `vocab_rows`, the disk is too full. Later: a damaged tensor.
    """
    source, target = Path(source), Path(target)
    require(
        is_published(source),
        f"{source} is a run directory or saved model, not a Hugging Face folder; to make it one, give --to_hf.",
    )
    require_new(target)
    config, kept = read_config(source), _kept(source, subset)
    tokenizer = _tokenizer(source)
    rows = _vocabulary_rows(config, tokenizer, vocab_rows)
    sizes = {path: _bytes(leaf) for path, leaf in abstract_leaves(source, config, kept).items()}
    for path in sizes.keys() & _VOCABULARY_AXIS.keys():  # a tied or labelling model has no head
        sizes[path] = sizes[path] // config.vocab_size * rows
    saving = Saving(target, {"files": _files(source), "vocabulary_rows": rows, "kept": kept})
    done, total = sum(sizes[path] for path in saving.done), sum(sizes.values())
    _require_space(target, total - done)
    if saving.done:
        log(f"Going on where it was interrupted: {len(saving.done)} of {len(sizes)} parameters are there already.")
    if rows != config.vocab_size:
        change = "cropped to" if rows < config.vocab_size else "padded with zeros to"
        log(f"The vocabulary's {config.vocab_size} rows are {change} {rows}.")
    left_out = saving.making / SOURCE / LEFT_OUT
    left_out.mkdir(parents=True, exist_ok=True)
    progress(done, total)
    for path, leaf in read_leaves(source, config, kept, skip=saving.done):
        if path in _VOCABULARY_AXIS:
            leaf = _cropped_or_padded(path, leaf, rows, left_out)
        saving.add(path, leaf)
        done += leaf.nbytes
        del leaf  # before the next is read
        progress(done, total)
    _keep(read_unrouted(source, config), left_out / "routers.safetensors")
    keep_pooler(source, config, left_out)
    shutil.copyfile(source / CONFIG_FILE, saving.making / SOURCE / CONFIG_FILE)
    copy_small_files(source, saving.making / SOURCE)
    data = DataConfig(end_of_text=end_of_text(source) if tokenizer else "")
    model = dataclasses.replace(config if kept is None else config.cut(kept), vocab_size=rows)
    meta = {"vocabulary_rows": config.vocab_size, LEFT_OUT: checksums(_left_out(left_out))}
    saving.finish(Config(model=model, pool=PoolConfig(kind="none"), data=data), tokenizer, **meta)


def export_folder(
    source: Path, target: Path, *, subset: Path | None = None, dtype: str = "", progress: Progress = silent
) -> None:
    """Writes a Hugging Face folder that the public loaders read.

    Args:
      source: a run directory (its newest checkpoint) or saved model; or a Hugging Face folder, to cut or cast it.
      target: must not exist, or be empty; it appears when it is complete.
      subset: file of the experts that the model is cut to; no other is read. None: all.
      dtype: of the tensors, one of `DTYPES`; empty: as they are stored, float32 for a run.
      progress: told after each parameter.

    Raises:
      UserError: the source cannot be read or is damaged, the target holds something, the subset is another model's, no
        published family can hold the model, the disk is too full.
    """
    source, target = Path(source), Path(target)
    if dtype:
        require_choice("dtype", dtype, DTYPES)
    require_new(target)
    origin = (published_origin if is_published(source) else _saved)(source, _kept(source, subset))
    sizes = {path: _bytes(leaf, dtype) for path, leaf in origin.leaves.items()}
    done, total = 0, sum(sizes.values())
    _require_space(target, total)

    def leaf(path: LeafPath) -> np.ndarray:
        nonlocal done
        progress(done, total)
        done += sizes[path]
        return cast(path, origin.read(path), dtype)

    write_folder(
        target,
        dataclasses.replace(origin.config, dtype=dtype or origin.config.dtype),
        leaf,
        origin=origin.folder,
        tokenizer=None if origin.folder is not None and _tokenizer(origin.folder) else _tokenizer(source),
        end_of_text_id=origin.end_of_text_id,
        context_length=origin.context_length,
        unrouted=origin.unrouted,
    )
    progress(total, total)


class Origin(NamedTuple):
    """What is exported.

    Attributes:
      config: of the model as it is written.
      leaves: shape and dtype of each parameter.
      read: a parameter by its path.
      folder: with the published config and other small files; None for none.
      unrouted: see `read_unrouted`.
      end_of_text_id: −1 where none is known, or `folder` knows.
      context_length: in tokens; used where there is no `folder`.
    """

    config: ModelConfig
    leaves: dict[LeafPath, jax.ShapeDtypeStruct]
    read: Callable[[LeafPath], np.ndarray]
    folder: Path | None
    unrouted: dict[str, np.ndarray]
    end_of_text_id: int = -1
    context_length: int = 4096


def published_origin(source: Path, kept: Kept) -> Origin:
    """A Hugging Face folder."""
    config = read_config(source)
    leaves = abstract_leaves(source, config, kept)

    def read(path: LeafPath) -> np.ndarray:
        ((_, leaf),) = read_leaves(source, config, kept, skip=leaves.keys() - {path})
        return leaf

    cut = config if kept is None else config.cut(kept)
    return Origin(cut, leaves, read, source, read_unrouted(source, config))


def _saved(source: Path, kept: Kept) -> Origin:
    """A run directory or saved model; its vocabulary has as many rows as that of the folder it came from, if any."""
    stored = Stored(source)
    run, meta = stored.config, stored.meta
    rows = meta.get("vocabulary_rows", run.model.vocab_size)
    left_out = {}
    if LEFT_OUT in meta:
        folder = source / SOURCE / LEFT_OUT
        with stored.damage_in_words():
            left_out = _left_out(folder)
            if left_out.keys() != meta[LEFT_OUT].keys():
                raise DamagedError(f"{folder} does not hold what was put there")
            check(left_out, meta[LEFT_OUT])

    def read(path: LeafPath) -> np.ndarray:
        leaf = stored.read(path, kept)
        if path not in _VOCABULARY_AXIS:
            return leaf
        axis = _VOCABULARY_AXIS[path]
        if path[0] in left_out:
            return np.concatenate([leaf, left_out[path[0]]], axis)
        return leaf[:rows] if axis == 0 else leaf[:, :rows]

    cut = run.model if kept is None else run.model.cut(kept)
    tokenizer = _tokenizer(source)
    end = Tokenizer.from_file(str(tokenizer)).token_to_id(run.data.end_of_text) if tokenizer else None
    return Origin(
        config=dataclasses.replace(cut, vocab_size=rows),
        leaves=stored.abstract_leaves(kept),
        read=read,
        folder=published_folder(source),
        unrouted={name: rows for name, rows in left_out.items() if (name,) not in _VOCABULARY_AXIS},
        end_of_text_id=-1 if end is None else end,
        context_length=_trained_length(run),
    )


def _trained_length(run: Config) -> int:
    """The longest rows that a run was trained on, or those that it started from, as far as these are still there."""
    origin = Path(run.train.init_from) / CONFIG_FILE
    earlier = 0
    if run.train.init_from and origin.is_file() and not is_published(origin.parent):
        earlier = _trained_length(Config.from_json(origin.read_text()))
    return max(run.data.sequence_length, earlier)


def is_published(folder: Path) -> bool:
    """Whether a folder is of Hugging Face's format; raises `UserError` where it holds no model."""
    require((folder / CONFIG_FILE).is_file(), f"{folder} has no {CONFIG_FILE}: it holds no model.")
    return "model_type" in read_json(folder / CONFIG_FILE)


def _kept(folder: Path, subset: Path | None) -> Kept:
    """The experts that a subset of the folder's model keeps."""
    if subset is None:
        return None
    chosen = Subset.load(subset)
    chosen.check(saved_model(folder), saved_fingerprint(folder))
    return chosen.experts


def _tokenizer(folder: Path) -> Path | None:
    return folder / "tokenizer.json" if (folder / "tokenizer.json").is_file() else None


def _vocabulary_rows(config: ModelConfig, tokenizer: Path | None, asked: int) -> int:
    """Of the model that is saved."""
    if tokenizer is None:
        require(asked >= 0, f"--vocab_rows={asked} must be at least 1.")
        return asked or config.vocab_size
    ids = token_count(Tokenizer.from_file(str(tokenizer)))
    require(
        asked == 0 or asked >= ids,
        f"--vocab_rows={asked} leaves tokens without a row: {tokenizer} has ids up to {ids - 1}; give at least {ids}.",
    )
    return asked or ids


def _files(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a folder's files: what tells it from what it was when a conversion began."""
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]


def _require_space(target: Path, size: int) -> None:
    there = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    require(
        size <= free,
        f"{target} needs {size / 1e9:.1f} GB and {there} has only {free / 1e9:.1f} GB free; make room, or write to "
        "another disk.",
    )


def _cropped_or_padded(path: LeafPath, leaf: np.ndarray, rows: int, left_out: Path) -> np.ndarray:
    """A parameter with so many rows for the vocabulary; those that are cropped are put in the folder `left_out`."""
    axis = _VOCABULARY_AXIS[path]
    missing = rows - leaf.shape[axis]
    if missing > 0:
        return np.pad(leaf, [(0, missing if i == axis else 0) for i in range(leaf.ndim)])
    if missing < 0:
        leaf, rest = np.split(leaf, [rows], axis)
        _keep({path[0]: rest}, left_out / f"{path[0]}.safetensors")
    return leaf


def keep_pooler(source: Path, config: ModelConfig, left_out: Path) -> dict[str, Any]:
    """Puts the pooler of an encoder without labels, if its Hugging Face folder has one, into the folder `left_out`.

    A classifier that is made of the model begins with it, see `weights.saved_parameters`.

    Returns:
      What a saved model says of `left_out` beside its arrays.
    """
    if config.causal or config.labels:
        return {}
    labelled = dataclasses.replace(config, labels=_OTHERS)
    paths = {path for path in leaf_shapes(labelled) if path[0] in ("pooler", "pooler_bias")}
    skip = set(leaf_shapes(labelled)) - (paths - missing_leaves(source, labelled))
    left_out.mkdir(parents=True, exist_ok=True)
    _keep({path[0]: leaf for path, leaf in read_leaves(source, labelled, skip=skip)}, left_out / POOLER)
    return {LEFT_OUT: checksums(_left_out(left_out))}


def _keep(arrays: dict[str, np.ndarray], file: Path) -> None:
    """Writes some arrays, if there are any; the file appears when it is complete."""
    if arrays:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)


def _left_out(folder: Path) -> dict[str, np.ndarray]:
    """What `_keep` wrote into a folder."""
    arrays: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        arrays |= load_file(file)
    return arrays


def _bytes(leaf: jax.ShapeDtypeStruct, dtype: str = "") -> int:
    return leaf.size * np.dtype(dtype or leaf.dtype).itemsize


def cast(path: LeafPath, leaf: np.ndarray, dtype: str) -> np.ndarray:
    """A parameter in one of `DTYPES`; empty: as it is.

    Raises:
      UserError: where it has values beyond the range of float16.
    """
    if not dtype:
        return leaf
    with np.errstate(over="ignore"):
        made = leaf.astype(dtype, copy=False)
    require(
        dtype != "float16" or bool(np.isfinite(made).all()),
        f"The parameter {'/'.join(path)} has values beyond the range of float16; export it as bfloat16 or float32.",
    )
    return made

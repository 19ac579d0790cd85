"""The weights of a model on disk: of a run's newest checkpoint, all of them or some experts, or saved by themselves.

Orbax holds what it reads and writes at least twice, a whole model. So parameters are read and written here a leaf at a
time, through tensorstore, the store below it, in the layout that Orbax reads.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from emo_jax.config import Config
from emo_jax.errors import UserError, require
from emo_jax.interop import missing_leaves, read_config, read_leaves, read_routers, require_new
from emo_jax.interop.huggingface import CONFIG_FILE, read_json
from emo_jax.model import ModelConfig, abstract_parameters, mixture_layers
from emo_jax.model.functional import LeafPath, leaf_at, leaf_path, leaf_shapes
from emo_jax.modularity import fingerprint
from emo_jax.modularity.subset import identifying_leaves
from emo_jax.training.checkpoints import (
    FORMAT_VERSION,
    DamagedError,
    apart,
    check,
    checksums,
    digest,
    first_line,
    read_meta,
    saved_steps,
)

SOURCE = "source"
"""Folder in a saved model for what the Hugging Face folder it came from has beside parameters."""

LEFT_OUT = "left_out"
"""Folder in `source` for arrays of it that are no parameters of the model, and the key of their checksums in `meta`."""

POOLER = "pooler.safetensors"
"""File there with the pooler of an encoder without labels."""

_CHUNK_BYTES = 2**23
"""Of leaves that are not experts apart."""

_BLOCK_BYTES = 2**25
"""Read and written at a time: tensorstore holds it several times. 32 MiB are as fast as more."""

_THREADS = tensorstore.Context({"file_io_concurrency": {"limit": 2}, "data_copy_concurrency": {"limit": 2}})
"""Of tensorstore: the allocator keeps tens of megabytes for each thread that ever held chunks, so there are few."""

_CACHE = {"cache_pool#tree": {"total_bytes_limit": 2**26}}
"""Of where chunks lie, as Orbax has one too; chunks themselves are not kept."""


class Stored:
    """The parameters in a run's newest checkpoint, read a leaf at a time.

    Attributes:
      config: of the run.
      step: of the checkpoint.
      meta: what is kept beside its arrays.
    """

    def __init__(self, run_dir: Path):
        """Opens it and reads no array.

        Raises:
          UserError: where the folder is no run or has no checkpoint, or it is of another format, or damaged.
        """
        self._run_dir = Path(run_dir).absolute()
        require((self._run_dir / CONFIG_FILE).exists(), f"{run_dir} has no {CONFIG_FILE}: it is not a run directory.")
        self.config = Config.from_json((self._run_dir / CONFIG_FILE).read_text())
        steps = saved_steps(self._run_dir)
        require(bool(steps), f"{run_dir} has no checkpoint yet; let the run reach train.checkpoint_every steps.")
        self.step = steps[-1]
        self._checkpoint = self._run_dir / "checkpoints" / str(self.step)
        with self.damage_in_words():
            self.meta = read_meta(self._checkpoint)
            version = self.meta["format_version"]
            require(
                version == FORMAT_VERSION,
                f"{run_dir} has checkpoint format {version}, this version reads {FORMAT_VERSION}.",
            )
        self._shapes = leaf_shapes(self.config.model)
        self._mixtures = mixture_layers(abstract_parameters(self.config.model))
        self._context = tensorstore.Context(_CACHE, _THREADS)

    def abstract_leaves(self, kept: Sequence[Sequence[int]] | None = None) -> dict[LeafPath, jax.ShapeDtypeStruct]:
        """Shape and dtype of what `read` returns, by path, the largest first; reads no array.

        Raises:
          UserError: as `read`.
        """
        config = self.config.model if kept is None else self.config.model.cut(kept)
        with self.damage_in_words():
            dtypes = {path: self._open(path).dtype.numpy_dtype for path in self._shapes}
        leaves = {path: jax.ShapeDtypeStruct(shape, dtypes[path]) for path, shape in leaf_shapes(config).items()}
        return dict(sorted(leaves.items(), key=lambda item: -item[1].size * item[1].dtype.itemsize))

    def read(self, path: LeafPath, kept: Sequence[Sequence[int]] | None = None) -> np.ndarray:
        """One parameter as it is stored, checked.

        Args:
          path: of it.
          kept: routed experts of each mixture layer; no other is read. None: all.

        Raises:
          UserError: where it is damaged.
        """
        with self.damage_in_words():
            store, experts = self._open(path), self._kept(path, kept)
            name = "/".join(("params", *path))
            if experts is not None and "routed" in path:
                leaf = _read_rows(store, experts)
                check(_nested(name, leaf), self.meta["checksums"], {name: experts})
                return leaf
            leaf = _read_rows(store, np.arange(store.shape[0]))
            check(_nested(name, leaf), self.meta["checksums"])
            return leaf if experts is None else leaf[:, experts]  # a router is checked as a whole

    def _open(self, path: LeafPath) -> tensorstore.TensorStore:
        spec = _spec(self._checkpoint / "state", path) | {"fill_missing_data_reads": False}
        store = tensorstore.open(spec, context=self._context, read=True).result()
        if store.shape != self._shapes[path]:
            raise DamagedError(f"{'/'.join(path)} has the shape {store.shape}, not {self._shapes[path]}")
        return store

    def _kept(self, path: LeafPath, kept: Sequence[Sequence[int]] | None) -> np.ndarray | None:
        """The experts that are kept of a stack or a router; None: all of it."""
        if kept is None or not {"routed", "router"} & set(path):
            return None
        return np.array(kept[self._mixtures.index(path[1])])

    @contextlib.contextmanager
    def damage_in_words(self) -> Iterator[None]:
        """Makes a `UserError` of whatever goes wrong with the checkpoint's files."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:  # whatever a library says of a broken file
            remedy = "Continue the run, which moves it aside for the one before" if self.step else "Make it again"
            raise UserError(
                f"The checkpoint of step {self.step} in {self._run_dir} is damaged ({first_line(error)}). {remedy}, or "
                "restore the folder from a copy."
            ) from None


def load_parameters(
    run_dir: Path,
    shardings: Any = None,
    kept: Sequence[Sequence[int]] | None = None,
    skip: Collection[LeafPath] = (),
) -> tuple[Config, dict[str, Any], int]:
    """Config, parameters and step of a run's newest checkpoint.

    Args:
      run_dir: of the run.
      shardings: where each parameter goes; None: the default device.
      kept: routed experts of each mixture layer; no other is read, and the config returned is that of the model cut to
        them. None: all.
      skip: paths of parameters that are not read.

    Returns:
      Parameters as JAX arrays in the precision they are stored in: float32 for a run's.

    Raises:
      UserError: where the folder is no run or has no checkpoint, or it is damaged.
    """
    stored = Stored(run_dir)
    paths = [path for path in stored.abstract_leaves(kept) if path not in skip]
    params = _placed(((path, stored.read(path, kept)) for path in paths), shardings)
    if kept is not None:
        stored.config.model = stored.config.model.cut(kept)
    return stored.config, params, stored.step


def load_routers(run_dir: Path) -> dict[str, Any]:
    """The routers alone (or what tells split models apart), at their places: enough for a model's fingerprint.

    Raises:
      UserError: as `load_parameters`.
    """
    stored = Stored(run_dir)
    leaves = ((path, stored.read(path)) for path in identifying_leaves(stored.config.model))
    return {"layers": _placed(leaves, None).get("layers", {})}


def saved_model(folder: Path) -> ModelConfig:
    """The model in a run directory or a Hugging Face folder.

    Raises:
      UserError: where what is there cannot be read.
    """
    if "model_type" in read_json(folder / CONFIG_FILE):
        return read_config(folder)
    return Config.from_json((folder / CONFIG_FILE).read_text()).model


def saved_parameters(
    folder: Path,
    shardings: Any = None,
    kept: Sequence[Sequence[int]] | None = None,
    labels: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The weights in a run directory or a Hugging Face folder, as `load_parameters` returns them.

    Args:
      folder, shardings, kept: see `load_parameters`.
      labels: of a classifier that the model is to become, where it is none: then without its head, and with what the
        folder has of a classifier's.

    Raises:
      UserError: where what is there cannot be read.
    """
    config = saved_model(folder)
    made = bool(labels) and not config.labels
    if "model_type" in read_json(folder / CONFIG_FILE):
        if made:
            config = dataclasses.replace(config, labels=labels)
        missing = missing_leaves(folder, config) if made else ()
        return _placed(read_leaves(folder, config, kept, skip=missing), shardings)
    params = load_parameters(folder, shardings, kept, [("head",)] if made else ())[1]
    pooler = folder / SOURCE / LEFT_OUT / POOLER
    if made and not config.causal and pooler.is_file():
        params |= _placed((((name,), leaf) for name, leaf in load_file(pooler).items()), shardings)
    return params


def saved_fingerprint(folder: Path) -> str:
    """The fingerprint of the model in a run directory or a Hugging Face folder; reads its routers alone."""
    config = saved_model(folder)
    hugging_face = "model_type" in read_json(folder / CONFIG_FILE)
    return fingerprint(config, read_routers(folder, config) if hugging_face else load_routers(folder))


def end_of_text(folder: Path) -> str:
    """The token that ends a document for the model in a run directory or a Hugging Face folder; empty for none.

    Raises:
      UserError: where the folder has no tokenizer.
    """
    values = read_json(folder / CONFIG_FILE)
    file = folder / "tokenizer.json"
    require(file.is_file(), f"{folder} has no tokenizer.json; put the one the model was trained with there.")
    if "model_type" not in values:
        return Config.from_json((folder / CONFIG_FILE).read_text()).data.end_of_text
    end = values.get("eos_token_id")
    return (Tokenizer.from_file(str(file)).id_to_token(end) or "") if isinstance(end, int) else ""


def published_folder(folder: Path) -> Path | None:
    """A Hugging Face folder itself, or what a run or saved model kept of the one its weights came from; None for none.

    A run that started from other weights (`train.init_from`) has what they had.
    """
    while (folder / CONFIG_FILE).is_file():
        if "model_type" in read_json(folder / CONFIG_FILE):
            return folder
        if (folder / SOURCE / CONFIG_FILE).is_file():
            return folder / SOURCE
        origin = Config.from_json((folder / CONFIG_FILE).read_text()).train.init_from
        if not origin:
            return None
        folder = Path(origin)
    return None


def save_model(folder: Path, config: Config, params: Any, tokenizer: Path | None) -> None:
    """Writes a folder that `load` reads and `train.init_from` starts from: a run directory without a run.

    Args:
      folder: must not exist, or be empty; it appears when it is complete.
      config: of the run that the weights come from, or a default one around the model's config.
      params: nested dict of arrays.
      tokenizer: its file; None for none.

    Raises:
      UserError: where the folder holds something.
    """
    saving = Saving(folder)
    for keys, leaf in jax.tree.leaves_with_path(params):
        saving.add(leaf_path(keys), np.asarray(leaf))
    saving.finish(config, tokenizer)


class Saving:
    """A model on its way to disk, a leaf at a time.

    All is written into a hidden folder beside the one asked for, and renamed at the end. A journal there lists the
    leaves that are complete, with their checksums, so that the same work goes on after it was interrupted; of a leaf
    that was being written its bytes remain in the store, unused.

    Attributes:
      making: the hidden folder; what else is put there becomes part of the model's folder.
      done: paths of the leaves that are complete.
    """

    def __init__(self, folder: Path, origin: dict[str, Any] | None = None):
        """Takes up what an interrupted one of the same origin left, or starts anew.

        Args:
          folder: must not exist, or be empty.
          origin: JSON that tells what is being saved from anything else; None: always start anew.

        Raises:
          UserError: where the folder holds something.
        """
        self._folder = Path(folder).absolute()
        require_new(self._folder)
        self.making = hidden(self._folder)
        self._journal = self.making / "journal.jsonl"
        header = json.loads(json.dumps({"origin": origin, "format_version": FORMAT_VERSION}))
        lines = _json_lines(self._journal) if origin is not None else []
        if lines[:1] != [header]:
            shutil.rmtree(self.making, ignore_errors=True)
            self.making.mkdir(parents=True)
            lines = [header]
        whole = self._journal.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(line) + "\n" for line in lines))  # without a line that is torn
        whole.replace(self._journal)
        self._checksums = {line["leaf"]: line["checksum"] for line in lines[1:]}
        self._context = tensorstore.Context(_CACHE, _THREADS)

    @property
    def done(self) -> set[LeafPath]:
        """Paths of the leaves that are complete."""
        return {tuple(name.split("/")[1:]) for name in self._checksums}

    def add(self, path: LeafPath, leaf: np.ndarray) -> None:
        """Writes a leaf; it is complete when this returns."""
        keys = tuple(jax.tree_util.DictKey(key) for key in path)
        row_bytes = max(leaf.nbytes // len(leaf), 1)
        rows = 1 if apart(keys, leaf) else min(max(_CHUNK_BYTES // row_bytes, 1), len(leaf))
        spec = _spec(self.making / "checkpoints" / "0" / "state", path) | {
            "metadata": {"chunks": [rows, *leaf.shape[1:]], "compressor": {"id": "zstd", "level": 1}},  # as Orbax's
            "store_data_equal_to_fill_value": True,  # so that a chunk that is not there is a lost one
        }
        store = tensorstore.open(
            spec,
            dtype=tensorstore.dtype(leaf.dtype),
            shape=leaf.shape,
            context=self._context,
            create=True,
            delete_existing=True,
        ).result()
        for block in _blocks(len(leaf), rows, row_bytes):
            store[block].write(leaf[block]).result()
        name = "/".join(("params", *path))
        checksum = checksums(_nested(name, leaf))[name]
        with self._journal.open("a") as file:
            file.write(json.dumps({"leaf": name, "checksum": checksum}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._checksums[name] = checksum

    def finish(self, config: Config, tokenizer: Path | None, **meta: Any) -> None:
        """Writes what is not arrays, and gives the folder its name.

        Args:
          config: of the run that the weights come from, or a default one around the model's config.
          tokenizer: its file; None for none.
          meta: JSON that is kept beside the arrays, see `Stored.meta`.
        """
        meta = {"format_version": FORMAT_VERSION, "checksums": self._checksums} | meta
        self._write_frame(meta)
        if tokenizer is not None:
            shutil.copy2(tokenizer, self.making / "tokenizer.json")
        (self.making / CONFIG_FILE).write_text(config.to_json())
        self._journal.unlink()
        if self._folder.exists():
            self._folder.rmdir()
        self.making.rename(self._folder)

    def _write_frame(self, meta: dict[str, Any]) -> None:
        """The files of a checkpoint beside its arrays.

        Orbax writes them itself, for a tree of the same names with an empty stand-in for each array: they are right
        for whatever version of it is installed. Only what it says of the stand-ins' shapes, which older versions did
        not say either, is left out: readers take shapes from the arrays.
        """
        tree: dict[str, Any] = {}
        for name in self._checksums:
            _put(tree, tuple(name.split("/")), jnp.zeros(1))
        frame = self.making / "frame"
        shutil.rmtree(frame, ignore_errors=True)
        with ocp.CheckpointManager(frame) as manager:
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(tree),
                meta=ocp.args.JsonSave({"content": meta, "sha256": digest(meta)}),
            )
            manager.save(0, args=items)
        state = frame / "0" / "state"
        names = json.loads((state / "_METADATA").read_text())
        for entry in names["tree_metadata"].values():
            entry["value_metadata"].pop("write_shape", None)
        (state / "_METADATA").write_text(json.dumps(names))
        for path in state.iterdir():
            if path.name not in ("_METADATA", "_sharding"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(frame / "0", self.making / "checkpoints" / "0", dirs_exist_ok=True)
        shutil.rmtree(frame)


def hidden(folder: Path) -> Path:
    """Where a folder is made, beside its place, until it is complete."""
    return folder.with_name(f".{folder.name}.saving")


def _placed(leaves: Iterable[tuple[LeafPath, np.ndarray]], shardings: Any) -> dict[str, Any]:
    """A nested dict of leaves, each put where it goes before the next is read."""
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params: dict[str, Any] = {}
    for path, leaf in leaves:
        sharding = default if shardings is None else leaf_at(shardings, path)
        placed = jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)
        _put(params, path, placed.block_until_ready())
        del leaf, placed
    return params


def _spec(state: Path, path: LeafPath) -> dict[str, Any]:
    """Where the store has a parameter of a checkpoint."""
    base = {"driver": "file", "path": f"{state}/"}
    return {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": base,
            "path": f"{'.'.join(('params', *path))}/",
            "cache_pool": "cache_pool#tree",
        },
    }


def _read_rows(store: tensorstore.TensorStore, rows: np.ndarray) -> np.ndarray:
    """Some rows of an array."""
    leaf = np.empty((len(rows), *store.shape[1:]), store.dtype.numpy_dtype)
    chunk = (store.chunk_layout.read_chunk.shape or (1,))[0] or 1
    for block in _blocks(len(rows), chunk, leaf.nbytes // len(rows)):
        leaf[block] = store[rows[block]].read().result()
    return leaf


def _blocks(length: int, chunk: int, row_bytes: int) -> Iterator[slice]:
    """Rows in blocks of whole chunks."""
    rows = chunk * max(_BLOCK_BYTES // max(chunk * row_bytes, 1), 1)
    return (slice(start, min(start + rows, length)) for start in range(0, length, rows))


def _nested(name: str, leaf: np.ndarray) -> Any:
    tree: dict[str, Any] = {}
    _put(tree, tuple(name.split("/")), leaf)
    return tree


def _put(tree: dict[str, Any], path: LeafPath, leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def _json_lines(file: Path) -> list[Any]:
    """The values in a file of JSON lines, up to the first that is torn."""
    values: list[Any] = []
    for line in file.read_text().splitlines(keepends=True) if file.is_file() else ():
        try:
            values.append(json.loads(line))
        except ValueError:
            break
        if not line.endswith("\n"):
            values.pop()
    return values

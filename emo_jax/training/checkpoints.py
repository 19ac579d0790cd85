"""Checkpoints of a run: parameters, optimizer, data iterator and step, through Orbax."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding

from emo_jax.config import Config
from emo_jax.errors import UserError, require
from emo_jax.model import PoolConfig
from emo_jax.parallel import processes, replicated
from emo_jax.training.step import TrainState, abstract_state

FORMAT_VERSION = 3

_MIN_CHUNK_BYTES = 2**18
"""Smaller chunks cost more than the reading they save."""

_WORDS = 2**18
"""Of an array in host memory that are summed at a time: what they become stays in the processor's cache."""


class Checkpoints:
    """The `checkpoints/` of a run directory. Saves are atomic and written in the background.

    Orbax notices an interrupted save, but restores flipped bytes without an error; so each checkpoint carries a
    checksum of every array, and a damaged one is moved aside for the one before it.
    """

    def __init__(self, run_dir: Path | epath.Path, config: Config, tokenizer_hash: str):
        """Opens or creates the folder.

        Args:
          run_dir: of the run; absolute, or in a bucket.
          config: of the run.
          tokenizer_hash: of the run's tokenizer; a checkpoint made with another one is refused.
        """
        self._config = config
        self._origin = {"format_version": FORMAT_VERSION, "tokenizer_hash": tokenizer_hash}
        self._folder = epath.Path(run_dir) / "checkpoints"  # Orbax wants it absolute
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        kept = self._config.train.checkpoints_kept
        options = ocp.CheckpointManagerOptions(max_to_keep=kept, cleanup_tmp_directories=True)
        return ocp.CheckpointManager(self._folder, options=options)

    def save(self, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Starts saving `state` and the iterator that has yielded the batches up to it."""
        tree = state._asdict()
        # The iterator's state is that of every process, so it stands here and not in a file for each.
        meta = self._origin | {"checksums": checksums(tree), "iterator": iterator.get_state()}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree, save_args=jax.tree.map_with_path(chunks, tree)),
            meta=ocp.args.JsonSave({"content": meta, "sha256": digest(meta)}),
        )
        self._manager.save(int(state.step), args=items)

    def restore(
        self, mesh: Mesh, iterator: grain.DatasetIterator, log: Callable[[str], None] = print
    ) -> TrainState | None:
        """The newest undamaged state, placed on `mesh`, and `iterator` moved behind its batches; None without any.

        Where several processes restore and one meets damage, the others may be waiting for it inside of Orbax: so the
        job ends, and finds the checkpoint before when it is started again.

        Args:
          mesh: where arrays go.
          iterator: of the training batches.
          log: told of each damaged checkpoint, which moves to `damaged_checkpoints/`.

        Raises:
          UserError: where the checkpoint is of another format or tokenizer, or all of them are damaged.
          processes.OwnError: where one of several processes met a damaged one.
        """
        start = iterator.get_state()
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return self._restore(step, mesh, iterator)
            except UserError:
                raise
            except Exception as error:  # whatever a library says of a broken file
                if not isinstance(error, DamagedError):
                    processes.await_cause()  # no damage where another process was lost
                iterator.set_state(start)
                aside = self._folder.parent / "damaged_checkpoints" / str(step)
                what = f"The checkpoint of step {step} is damaged ({first_line(error)})"
                log(f"{what}; moving it to {aside}.")
                if processes.several():
                    with contextlib.suppress(FileNotFoundError):  # another process may have met the damage as well
                        self._move(step, aside)
                    raise processes.OwnError(
                        f"{what} and lies in {aside} now. The same command goes on without it."
                    ) from error
                self._manager.close()
                self._move(step, aside)
                self._manager = self._open()
        require(not steps, f"Every checkpoint in {self._folder} is damaged; start another --workdir.")
        return None

    def _move(self, step: int, aside: epath.Path) -> None:
        aside.parent.mkdir(exist_ok=True)
        if (self._folder / str(step)).exists():
            aside.rmtree(missing_ok=True)
        (self._folder / str(step)).rename(aside)

    def _restore(self, step: int, mesh: Mesh, iterator: grain.DatasetIterator) -> TrainState:
        meta = read_meta(self._folder / str(step))
        for name, ours in self._origin.items():
            require(
                meta.get(name) == ours,
                f"The checkpoint of step {step} has {name}={meta.get(name)!r}, this run has {ours!r}; "
                "continue it with the version and tokenizer it was made with, or start another --workdir.",
            )
        abstract = abstract_state(self._config, mesh)._asdict()
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        check(restored.state, meta["checksums"])
        iterator.set_state(meta["iterator"])
        return TrainState(**restored.state)

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and releases the folder."""
        self._manager.close()


class DamagedError(Exception):
    """What is on disk is not what was saved."""


def _sums(leaves: list[jax.Array], rows: list[jax.Array]) -> list[jax.Array]:
    def total(leaf: jax.Array, rows: jax.Array) -> jax.Array:
        leaf = leaf.reshape(1) if leaf.ndim == 0 else leaf
        bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32))
        # Place times bits, modulo 2^32: any sharding gives the same sum, and one changed word always changes it.
        place = jnp.zeros(bits.shape, jnp.uint32)
        stride = 1
        for axis in reversed(range(1, bits.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= bits.shape[axis]
        place += jnp.expand_dims(rows, tuple(range(1, bits.ndim))) * jnp.uint32(stride % 2**32)
        return (bits.astype(jnp.uint32) * (2 * place + 1)).sum(range(1, bits.ndim), dtype=jnp.uint32)

    return [total(*pair) for pair in zip(leaves, rows, strict=True)]


@functools.cache
def _compiled_sums(mesh: Mesh | None) -> Callable[..., list[jax.Array]]:
    return jax.jit(_sums, out_shardings=replicated(mesh) if mesh else None)


def _summed(leaves: list[jax.Array], rows: list[np.ndarray]) -> list[jax.Array]:
    """Sums that every process can read, whichever devices the arrays are split over."""
    meshes = [leaf.sharding.mesh for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    return _compiled_sums(meshes[0] if meshes else None)(leaves, rows)


def checksums(tree: Any, experts: dict[str, np.ndarray] | None = None) -> dict[str, int | list[int]]:
    """32-bit checksums of each array by its path, computed where it lives and independent of its sharding.

    A stack of experts has one checksum an expert, so that a part of it can be checked. NumPy arrays take no memory
    beside their own, others on the CPU twice as much again.

    Args:
      tree: nested dict of arrays.
      experts: of a stack that is a part of another, the places of its experts there, by path.
    """
    paths, leaves = zip(*jax.tree.leaves_with_path(tree), strict=True) if tree else ((), ())
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    rows = [
        np.asarray((experts or {}).get(name, np.arange(len(leaf) if leaf.ndim else 1)), np.uint32)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    on_device = [i for i, leaf in enumerate(leaves) if not isinstance(leaf, np.ndarray)]
    there = jax.device_get(_summed([leaves[i] for i in on_device], [rows[i] for i in on_device]))
    sums = dict(zip(on_device, there, strict=True))
    sums |= {i: _host_sums(leaf, rows[i]) for i, leaf in enumerate(leaves) if i not in sums}
    return {
        name: sums[i].tolist() if _stacked(path, leaf) else int(sums[i].sum(dtype=np.uint32))
        for i, (name, path, leaf) in enumerate(zip(names, paths, leaves, strict=True))
    }


def _host_sums(leaf: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """As `_sums`, of an array in host memory: faster there, nothing to compile, and a small part at a time."""
    words = {1: np.uint8, 2: np.uint16}.get(leaf.dtype.itemsize, np.uint32)
    bits_NW = np.ascontiguousarray(leaf).reshape(-1).view(words).reshape(len(rows), -1 if leaf.size else 0)
    width = bits_NW.shape[1]
    weights = np.arange(1, 2 * min(_WORDS, max(width, 1)), 2, dtype=np.uint32)
    sums_N = np.zeros(len(rows), np.uint32)
    count = max(_WORDS // max(width, 1), 1)
    for row in range(0, len(rows), count):
        some = slice(row, row + count)
        for column in range(0, width, _WORDS):
            part = bits_NW[some, column : column + _WORDS].astype(np.uint32)
            first = rows[some] * np.uint32(width % 2**32) + np.uint32(column % 2**32)
            sums_N[some] += np.einsum("nw,w->n", part, weights[: part.shape[1]])
            sums_N[some] += 2 * first * part.sum(1, dtype=np.uint32)
    return sums_N


def _stacked(path: tuple, leaf: Any) -> bool:
    return leaf.ndim == 3 and any(getattr(key, "key", None) == "routed" for key in path)


def check(tree: Any, expected: dict[str, Any], experts: dict[str, np.ndarray] | None = None) -> None:
    """Compares arrays, or some experts of theirs (see `checksums`), with the checksums of their checkpoint.

    Raises:
      DamagedError: naming the first array that differs.
    """
    for name, value in checksums(tree, experts).items():
        wanted = expected.get(name)
        if experts and name in experts and wanted is not None:
            wanted = [wanted[expert] for expert in experts[name]]
        if wanted != value:
            raise DamagedError(f"{name} does not have the checksum it was saved with")


def read_meta(checkpoint: Path | epath.Path) -> dict[str, Any]:
    """What is kept beside the arrays in a checkpoint's folder: format, tokenizer, checksums.

    Raises:
      DamagedError: where it is not what was saved.
    """
    saved = json.loads((checkpoint / "meta" / "metadata").read_text())  # the one file of Orbax's JSON items
    if saved["sha256"] != digest(saved["content"]):
        raise DamagedError("its metadata is not what was saved")
    return saved["content"]


def digest(meta: dict[str, Any]) -> str:
    """Of the metadata itself."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def first_line(error: Exception) -> str:
    """What a library says of a broken file, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def chunks(path: tuple, leaf: jax.Array) -> ocp.SaveArgs:
    """One chunk an expert for stacked expert weights, so that a subset reads only what it keeps."""
    if not apart(path, leaf):
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=leaf.nbytes // leaf.shape[0], shard_axes=(0,))


def apart(path: tuple, leaf: jax.Array | np.ndarray) -> bool:
    """Whether each row of an array, an expert, has a chunk of its own."""
    return _stacked(path, leaf) and leaf.nbytes // leaf.shape[0] >= _MIN_CHUNK_BYTES


def saved_steps(run_dir: Path | epath.Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending; reads nothing but names."""
    folders = [path for path in (epath.Path(run_dir) / "checkpoints").glob("*") if path.name.isdigit()]
    if "://" in str(run_dir):  # nothing is renamed there once it is complete, so Orbax leaves a sign
        folders = [path for path in folders if (path / "commit_success.txt").exists()]
    return sorted(int(path.name) for path in folders)


def same_run(run_dir: Path | epath.Path, config: Config) -> None:
    """Keeps `config.json`, or compares with the one that is there.

    Raises:
      UserError: where a field changed that would make the rest of the run another run.
    """
    file = run_dir / "config.json"
    if not file.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        _write_config(file, config)
        return
    # Through Config: a field that is newer than the run has its default, which is what the run did.
    check_same_run(Config.from_json(file.read_text()), config, max(saved_steps(run_dir), default=0), str(run_dir))
    _write_config(file, config)


def check_same_run(old: Config, new: Config, done: int, name: str, ignored: tuple[str, ...] = ()) -> None:
    """Compares two configs as the first `done` steps of a run saw them: what acts only later may differ.

    So a run may be lengthened by an anneal, and pools may be switched on at a later step.

    Raises:
      UserError: naming the first field by which those steps would have been others, and run `name`.
    """
    before, after = _seen(old, done), _seen(new, done)
    typed_before, typed_after = _fields(old), _fields(new)
    for field in after:
        if before[field] != after[field] and field not in (*_FREE, *ignored) and not field.startswith("mesh."):
            if typed_before[field] == typed_after[field]:  # equal as typed, but not as those steps saw it
                pair = {"train.steps": "optimizer.anneal_steps", "optimizer.anneal_steps": "train.steps"}
                field = pair.get(field, "pool.start_step")
            raise UserError(
                f"{name} was started with {field}={typed_before[field]!r}, now it is {typed_after[field]!r}: "
                "the run would no longer be one run. Set it back, or start another --workdir."
                f"{_what_could_be_done(field, old, new, done)}"
            )


def _what_could_be_done(field: str, old: Config, new: Config, done: int) -> str:
    """A sentence for someone who wanted a change that would be allowed in another form; with a space before it."""
    if field in ("train.steps", "optimizer.anneal_steps"):
        end = _main_steps(old)
        if done > end:
            return (
                f" Its anneal began at step {end}; to anneal otherwise, set train.continue_from to it, in another "
                f"--workdir, and train.continue_step to a checkpoint of step {end} or before."
            )
        more = new.train.steps - end if new.train.steps > end else new.optimizer.anneal_steps or 1000
        return (
            f" To go on after its end with an anneal, as in {more} steps more, set train.steps={end + more} and "
            f"optimizer.anneal_steps={more}."
        )
    if field.startswith("pool.") and done and _unpooled(old, done):
        return f" Pools that come later are possible: set pool.start_step to {done} or more."
    return ""


def _seen(config: Config, done: int) -> dict[str, Any]:
    """Every field, with those that act only after `done` steps as if they were not set."""
    fields, end = _fields(config), _main_steps(config)
    if done <= end + (config.optimizer.anneal_steps > 0):  # an anneal's first step has the rate it starts from
        length = 0 if config.optimizer.schedule == "constant" else end
        fields |= {"train.steps": length, "optimizer.anneal_steps": -1}  # −1: still open, unlike any real length
    if _unpooled(config, done):
        fields |= {f"pool.{name}": value for name, value in dataclasses.asdict(PoolConfig(kind="none")).items()}
    return fields


def _main_steps(config: Config) -> int:
    """Steps before the anneal."""
    return config.train.steps - config.optimizer.anneal_steps


def _unpooled(config: Config, done: int) -> bool:
    """Whether none of the first `done` steps, if there are any, has a pool."""
    return config.pool.kind == "none" or config.pool.start_step >= done > 0


def _fields(config: Config) -> dict[str, Any]:
    """Every field by its dotted name; last the tokenizer in use, which follows from others."""
    fields = config.fields()
    del fields["data.tokenizer"]
    return fields | {"data.tokenizer": config.tokenizer()}


def _write_config(file: Path | epath.Path, config: Config) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(config.to_json())
    temporary.replace(file)


_FREE = {
    "data.cache_dir",
    "model.remat",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.checkpoints_kept",
    "train.wandb_project",
}
"""Fields that may change when a run continues: none of them changes what is computed."""

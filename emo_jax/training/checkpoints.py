"""Checkpoints of a run: parameters, optimizer, data iterator and step, through Orbax."""

import json
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from emo_jax.config import Config
from emo_jax.errors import UserError, require
from emo_jax.model import abstract_parameters
from emo_jax.training.step import TrainState, abstract_state

FORMAT_VERSION = 1

_MIN_CHUNK_BYTES = 2**18
"""Smaller chunks cost more than the reading they save."""


class Checkpoints:
    """The `checkpoints/` of a run directory. Saves are atomic and written in the background."""

    def __init__(self, run_dir: Path, config: Config, tokenizer_hash: str):
        """Opens or creates the folder.

        Args:
          run_dir: of the run.
          config: of the run.
          tokenizer_hash: of the run's tokenizer; a checkpoint made with another one is refused.
        """
        self._config = config
        self._meta = {"format_version": FORMAT_VERSION, "tokenizer_hash": tokenizer_hash}
        options = ocp.CheckpointManagerOptions(max_to_keep=config.train.checkpoints_kept, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(run_dir.absolute() / "checkpoints", options=options)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Starts saving `state` and the iterator that has yielded the batches up to it."""
        tree = state._asdict()
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree, save_args=jax.tree.map_with_path(_chunks, tree)),
            data=grain.checkpoint.CheckpointSave(iterator),
            meta=ocp.args.JsonSave(self._meta),
        )
        self._manager.save(int(state.step), args=items)

    def restore(self, mesh: Mesh, iterator: grain.DatasetIterator) -> TrainState | None:
        """The newest state, placed on `mesh`, and `iterator` moved behind its batches; None without one.

        Raises:
          UserError: where the checkpoint is of another format or another tokenizer.
        """
        step = self.latest_step()
        if step is None:
            return None
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        for name, ours in self._meta.items():
            require(
                meta.get(name) == ours,
                f"The checkpoint of step {step} has {name}={meta.get(name)!r}, this run has {ours!r}; "
                "continue it with the version and tokenizer it was made with, or start another --workdir.",
            )
        abstract = abstract_state(self._config, mesh)._asdict()
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=grain.checkpoint.CheckpointRestore(iterator)
            ),
        )
        return TrainState(**restored.state)

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and releases the folder."""
        self._manager.close()


def _chunks(path: tuple, leaf: jax.Array) -> ocp.SaveArgs:
    """One chunk an expert for stacked expert weights, so that a subset reads only what it keeps."""
    stacked = leaf.ndim == 3 and any(getattr(key, "key", None) == "routed" for key in path)
    expert_bytes = leaf.nbytes // leaf.shape[0] if stacked else 0
    if expert_bytes < _MIN_CHUNK_BYTES:
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=expert_bytes, shard_axes=(0,))


def load_parameters(run_dir: Path) -> tuple[Config, dict[str, Any], int]:
    """Config, parameters and step of a run's newest checkpoint, on the default device.

    Raises:
      UserError: where the folder is no run or has no checkpoint.
    """
    run_dir = Path(run_dir)
    require((run_dir / "config.json").exists(), f"{run_dir} has no config.json: it is not a run directory.")
    config = Config.from_json((run_dir / "config.json").read_text())
    with ocp.CheckpointManager(run_dir.absolute() / "checkpoints") as manager:
        step = manager.latest_step()
        if step is None:
            raise UserError(f"{run_dir} has no checkpoint yet; let the run reach train.checkpoint_every steps.")
        abstract = {"params": abstract_parameters(config.model)}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)
    args = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    # A fresh manager: one that has not saved infers no handler from its registry.
    with ocp.CheckpointManager(run_dir.absolute() / "checkpoints") as manager:
        restored = manager.restore(step, args=ocp.args.Composite(state=args))
    return config, restored.state["params"], step


def same_run(run_dir: Path, config: Config) -> None:
    """Keeps `config.json`, or compares with the one that is there.

    Raises:
      UserError: where a field changed that would make the rest of the run another run.
    """
    file = run_dir / "config.json"
    if not file.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(config.to_json())
        temporary.replace(file)
        return
    old, new = (_flatten(json.loads(text)) for text in (file.read_text(), config.to_json()))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and name not in _FREE and not name.startswith("mesh."):
            raise UserError(
                f"{run_dir} was started with {name}={old.get(name)!r}, now it is {new.get(name)!r}: "
                "the run would no longer be one run. Set it back, or start another --workdir."
            )
    file.write_text(config.to_json())


_FREE = {
    "data.cache_dir",
    "model.remat",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.checkpoints_kept",
}
"""Fields that may change when a run continues: none of them changes what is computed."""


def _flatten(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}

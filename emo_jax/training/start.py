"""Where does a run's first state come from? Random weights, other weights, or another run's state."""

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from emo_jax.config import Config
from emo_jax.data.tokenizer import load_tokenizer
from emo_jax.errors import require
from emo_jax.interop import read_config, read_parameters
from emo_jax.interop.huggingface import CONFIG_FILE, read_json
from emo_jax.model import ModelConfig, abstract_parameters
from emo_jax.training.checkpoints import check_same_run, load_parameters, same_run, saved_steps

_FREE = ("dtype", "remat", "init_std", "num_experts", "experts_per_layer", "num_kv_heads", "d_dense")
"""Fields of a model in which the origin of its weights may differ, or that are compared once resolved."""

_COPIED = ("metrics.jsonl", "data", "checkpoints")
"""What a run takes over from the one it continues; the checkpoints last, since without them nothing resumes."""


def continue_run(config: Config, run_dir: Path, log: Callable[[str], None]) -> None:
    """Makes `run_dir`, where no run is yet, a copy of `train.continue_from` up to a checkpoint.

    The checkpoint and the log are copied, tokens hard-linked; the source is only read.

    Raises:
      UserError: where the source has no such checkpoint, did something else than this run would have done, keeps its
        tokens elsewhere, or loses the checkpoint meanwhile.
    """
    source = Path(config.train.continue_from)
    require((source / CONFIG_FILE).is_file(), f"train.continue_from={str(source)!r} is not a run directory.")
    steps = saved_steps(source)
    step = config.train.continue_step or max(steps, default=0)
    require(
        step in steps,
        f"train.continue_from={str(source)!r} has no checkpoint of step {step}; it has {sorted(steps) or 'none'}.",
    )
    old = Config.from_json((source / CONFIG_FILE).read_text())
    check_same_run(
        old, config, step, str(source), ignored=("train.init_from", "train.continue_from", "train.continue_step")
    )
    require(
        config.data.cache_dir == old.data.cache_dir,
        f"{source} has its tokens in data.cache_dir={old.data.cache_dir!r}, this run asks for "
        f"{config.data.cache_dir!r}; set the same, so that they are the same tokens.",
    )
    incoming = run_dir / ".incoming"  # stays until the config is written: parts beside it are of an interrupted copy
    for name in _COPIED:
        require(
            incoming.exists() or not (run_dir / name).exists(),
            f"{run_dir} holds {name} but no {CONFIG_FILE}; give an empty --workdir to continue {source}.",
        )
    log(f"Continuing {source} from its checkpoint of step {step}.")
    for folder in (run_dir / "checkpoints", run_dir / "data", incoming):  # of a copy that was interrupted
        shutil.rmtree(folder, ignore_errors=True)
    try:
        shutil.copytree(source / "checkpoints" / str(step), incoming / "checkpoints" / str(step))
    except OSError:
        require(
            step in saved_steps(source),
            f"The checkpoint of step {step} vanished from {source} while it was copied: is that run still training? "
            "Run the same command again, or stop that run first.",
        )
        raise
    if (source / "data").is_dir():
        shutil.copytree(source / "data", incoming / "data", copy_function=_link)
    if (source / "metrics.jsonl").is_file():
        shutil.copy2(source / "metrics.jsonl", incoming / "metrics.jsonl")  # the resumed log drops later steps
    for name in _COPIED:
        if (incoming / name).exists():
            (incoming / name).rename(run_dir / name)
    same_run(run_dir, config)
    incoming.rmdir()


def _link(source: str, target: str) -> None:
    """Tokens never change, so one copy on disk serves both runs."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def check_origin(config: Config) -> None:
    """Refuses a `train.init_from` whose model or tokenizer is not the config's, before any long work.

    Raises:
      UserError: naming the first field that differs, with both values.
    """
    if not config.train.init_from:
        return
    folder = Path(config.train.init_from)
    require((folder / CONFIG_FILE).is_file(), f"train.init_from={str(folder)!r} has no {CONFIG_FILE}.")
    if "model_type" in read_json(folder / CONFIG_FILE):
        theirs = read_config(folder)
    else:
        theirs = Config.from_json((folder / CONFIG_FILE).read_text()).model
        require(bool(saved_steps(folder)), f"train.init_from={str(folder)!r} has no checkpoint yet.")
    ours = _resolved(config.model)
    for name, value in _resolved(theirs).items():
        require(
            name in ours and ours[name] == value,
            f"train.init_from={str(folder)!r} holds a model with {name}={value!r}, this run's model has "
            f"{ours.get(name, config.model.layer_experts)!r}: set --config.model.{name}={value!r}.",
        )

    theirs_file = folder / "tokenizer.json"
    require(
        bool(config.data.tokenizer) or theirs_file.is_file(),
        f"train.init_from={str(folder)!r} has no tokenizer.json; name the one its weights were trained with: "
        "--config.data.tokenizer=FILE.",
    )
    used = load_tokenizer(config.tokenizer(), config.data.end_of_text, config.model.vocab_size)
    if config.data.tokenizer and theirs_file.is_file():
        require(
            used.get_vocab() == load_tokenizer(theirs_file, "", config.model.vocab_size).get_vocab(),
            f"data.tokenizer={config.data.tokenizer!r} has another vocabulary than {str(theirs_file)!r}, which the "
            "weights of train.init_from were trained with; leave data.tokenizer empty.",
        )


def _resolved(model: ModelConfig) -> dict[str, Any]:
    """What must be equal for weights to mean the same."""
    fields = {name: value for name, value in dataclasses.asdict(model).items() if name not in _FREE}
    unused = () if model.routed_experts else ("num_shared_experts", "top_k", "d_expert", "normalize_top_k")
    fields = {name: value for name, value in fields.items() if name not in unused}
    equal = len(set(model.layer_experts)) == 1
    fields |= {"num_experts": model.layer_experts[0]} if equal else {"experts_per_layer": model.layer_experts}
    fields |= {"num_kv_heads": model.kv_heads}
    return fields | ({"d_dense": model.d_dense} if 0 in model.layer_experts else {})


def initial_parameters(config: Config, shardings: Any) -> Any:
    """The weights of `train.init_from`, each array where it lives, in the master precision."""
    folder = Path(config.train.init_from)
    if "model_type" in read_json(folder / CONFIG_FILE):
        params = read_parameters(folder, read_config(folder))
    else:
        params = load_parameters(folder, shardings)[1]

    def place(path: Any, abstract: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
        parent = functools.reduce(lambda tree, key: tree[key.key], path[:-1], params)
        leaf = parent.pop(path[-1].key)  # one array at a time is there twice
        if isinstance(leaf, np.ndarray):
            leaf = leaf.astype(abstract.dtype)
        return jax.device_put(leaf, sharding).astype(abstract.dtype)

    return jax.tree.map_with_path(place, abstract_parameters(config.model), shardings)

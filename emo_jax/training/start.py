"""Where does a run's first state come from? Random weights, other weights, or another run's state."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emo_jax.config import Config, expert_lists
from emo_jax.data.tokenizer import load_tokenizer
from emo_jax.errors import require
from emo_jax.interop.huggingface import CONFIG_FILE, read_json
from emo_jax.model import ModelConfig, abstract_parameters, mixture_layers
from emo_jax.model.functional import initial_value, leaf_at, leaf_path
from emo_jax.training.checkpoints import check_same_run, same_run, saved_steps
from emo_jax.training.weights import saved_model, saved_parameters

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


def origin_model(folder: Path) -> ModelConfig:
    """The model in a run directory or a Hugging Face folder.

    Raises:
      UserError: where the folder is neither, or a run without a checkpoint.
    """
    require((folder / CONFIG_FILE).is_file(), f"train.init_from={str(folder)!r} has no {CONFIG_FILE}.")
    of_a_run = "model_type" not in read_json(folder / CONFIG_FILE)
    require(not of_a_run or bool(saved_steps(folder)), f"train.init_from={str(folder)!r} has no checkpoint yet.")
    return saved_model(folder)


def changed_model(model: ModelConfig, keep_experts: Sequence[str], new_experts: int) -> ModelConfig:
    """A model cut to some of its routed experts and extended by fresh ones.

    Args:
      model: as it is.
      keep_experts: see `TrainConfig`.
      new_experts: see `TrainConfig`.

    Raises:
      UserError: where the experts are not the model's, or too few.
    """
    if not (keep_experts or new_experts):
        return model
    routed = model.routed_experts
    require(bool(routed), "train.keep_experts and train.new_experts need a model with experts; this one is dense.")
    kept = expert_lists("train.keep_experts", keep_experts)
    require(
        len(kept) in (0, len(routed)),
        f"train.keep_experts has {len(kept)} entries, the model of train.init_from {len(routed)} mixture layers.",
    )
    for layer, experts in enumerate(kept):
        require(
            len(experts) >= model.num_choices and experts[-1] < routed[layer],
            f"train.keep_experts has {keep_experts[layer]!r} for mixture layer {layer}; name at least "
            f"{model.num_choices} of its routed experts 0..{routed[layer] - 1}.",
        )
    model = model.cut(kept) if kept else model
    return model.with_routed_experts([count + new_experts for count in model.routed_experts])


def check_origin(config: Config) -> None:
    """Refuses a `train.init_from` whose model or tokenizer is not the config's, before any long work.

    Raises:
      UserError: naming the first field that differs, with both values.
    """
    if not config.train.init_from:
        return
    folder = Path(config.train.init_from)
    theirs = changed_model(origin_model(folder), config.train.keep_experts, config.train.new_experts)
    if not theirs.labels:  # a model may become a classifier
        theirs = dataclasses.replace(theirs, labels=config.model.labels)
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
    unused = (
        ()
        if model.routed_experts
        else (
            "num_shared_experts",
            "top_k",
            "d_expert",
            "normalize_top_k",
            "always_active_experts",
        )
    )
    fields = {name: value for name, value in fields.items() if name not in unused}
    equal = len(set(model.layer_experts)) == 1
    fields |= {"num_experts": model.layer_experts[0]} if equal else {"experts_per_layer": model.layer_experts}
    fields |= {"num_kv_heads": model.kv_heads}
    return fields | ({"d_dense": model.d_dense} if 0 in model.layer_experts else {})


def initial_parameters(config: Config, shardings: Any) -> Any:
    """The weights of `train.init_from`, cut and extended as asked, each array where it lives, in the master precision.

    A fresh expert adds nothing at first, since its `down` is 0; its router column is drawn with the mean and the spread
    of its layer's, so that tokens choose it as often as any. What a classifier's head needs beyond the origin's weights
    begins as in a model from nothing.
    """
    kept = expert_lists("train.keep_experts", config.train.keep_experts) or None
    params = saved_parameters(Path(config.train.init_from), shardings, kept, config.model.labels)
    rng = np.random.default_rng(config.train.seed)
    mixtures = mixture_layers(params)
    key = jax.random.key(config.train.seed, impl="threefry2x32")

    def extended(name: str, parameter: str, leaf: jax.Array) -> jax.Array:
        """A router or a stack of experts, with fresh ones behind."""
        layer_key = jax.random.fold_in(key, mixtures.index(name))
        own_key = jax.random.fold_in(layer_key, ("router", "gate", "up", "down").index(parameter))
        fresh = _fresh_experts(parameter, leaf, config.train.new_experts, config.model.init_std, own_key)
        return jnp.concatenate([leaf, fresh.astype(leaf.dtype)], axis=1 if parameter == "router" else 0)

    def place(path: Any, abstract: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
        names = leaf_path(path)
        parent = leaf_at(params, names[:-1])
        if names[-1] not in parent:  # of a head
            return jax.device_put(initial_value(names[-1], abstract, config.model.init_std, rng), sharding)
        leaf = parent.pop(names[-1]).astype(abstract.dtype)  # one array at a time is there twice
        if config.train.new_experts and ("routed" in names or "router" in names):
            leaf = extended(names[1], names[-1], leaf)
        return jax.device_put(leaf, sharding)

    return jax.tree.map_with_path(place, abstract_parameters(config.model), shardings)


def _fresh_experts(parameter: str, leaf: jax.Array, new: int, init_std: float, key: jax.Array) -> jax.Array:
    """The part of `new` experts that belongs behind a router [D, R] or a stack [R, …]."""
    if parameter == "down":
        return jnp.zeros((new, *leaf.shape[1:]))
    if parameter == "router":
        wide = leaf.astype(jnp.float32)
        noise = jax.random.truncated_normal(key, -3, 3, (len(leaf), new))
        return wide.mean(1, keepdims=True) + wide.std(1, keepdims=True) * noise
    return init_std * jax.random.truncated_normal(key, -3, 3, (new, *leaf.shape[1:]))

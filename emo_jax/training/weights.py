"""The weights of a model on disk: of a run's newest checkpoint, all of them or some experts, or saved by themselves."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from tokenizers import Tokenizer

from emo_jax.config import Config
from emo_jax.errors import UserError, require
from emo_jax.interop import read_config, read_parameters, read_routers
from emo_jax.interop.huggingface import CONFIG_FILE, read_json
from emo_jax.model import ModelConfig, abstract_parameters, mixture_layers
from emo_jax.modularity import fingerprint
from emo_jax.training.checkpoints import FORMAT_VERSION, check, checksums, chunks, digest, first_line, read_meta


def load_parameters(
    run_dir: Path, shardings: Any = None, kept: Sequence[Sequence[int]] | None = None
) -> tuple[Config, dict[str, Any], int]:
    """Config, parameters and step of a run's newest checkpoint.

    Args:
      run_dir: of the run.
      shardings: where each parameter goes; None: the default device.
      kept: routed experts of each mixture layer; no other is read, and the config returned is that of the model cut to
        them. Stacks of experts are NumPy arrays then. None: all.

    Raises:
      UserError: where the folder is no run or has no checkpoint, or it is damaged.
    """
    config, step = _newest(Path(run_dir))
    abstract = abstract_parameters(config.model)
    if kept is None:
        return config, _read(Path(run_dir), step, abstract, shardings, None), step
    params = _read(Path(run_dir), step, abstract, shardings, dict(zip(mixture_layers(abstract), kept, strict=True)))
    config.model = config.model.cut(kept)
    return config, params, step


def load_routers(run_dir: Path) -> dict[str, Any]:
    """The routers alone, at their places among the parameters: enough for a model's fingerprint.

    Raises:
      UserError: as `load_parameters`.
    """
    config, step = _newest(Path(run_dir))
    layers = abstract_parameters(config.model)["layers"]
    routers = {name: {"moe": {"router": layer["moe"]["router"]}} for name, layer in layers.items() if "moe" in layer}
    return _read(Path(run_dir), step, {"layers": routers}, None, None)


def saved_model(folder: Path) -> ModelConfig:
    """The model in a run directory or a Hugging Face folder.

    Raises:
      UserError: where what is there cannot be read.
    """
    if "model_type" in read_json(folder / CONFIG_FILE):
        return read_config(folder)
    return Config.from_json((folder / CONFIG_FILE).read_text()).model


def saved_parameters(
    folder: Path, shardings: Any = None, kept: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """The weights in a run directory or a Hugging Face folder; see `load_parameters` and `read_parameters`."""
    if "model_type" in read_json(folder / CONFIG_FILE):
        return read_parameters(folder, read_config(folder), kept)
    return load_parameters(folder, shardings, kept)[1]


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
    folder = Path(folder).absolute()
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"{folder} exists already; give another folder, or delete it.",
    )
    making = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    meta = {"format_version": FORMAT_VERSION, "checksums": checksums({"params": params})}
    tree = {"params": params}
    with ocp.CheckpointManager(making / "checkpoints") as manager:
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree, save_args=jax.tree.map_with_path(chunks, tree)),
            meta=ocp.args.JsonSave({"content": meta, "sha256": digest(meta)}),
        )
        manager.save(0, args=items)
    if tokenizer is not None:
        shutil.copy2(tokenizer, making / "tokenizer.json")
    (making / "config.json").write_text(config.to_json())
    if folder.exists():
        folder.rmdir()
    making.rename(folder)


def _newest(run_dir: Path) -> tuple[Config, int]:
    require((run_dir / "config.json").exists(), f"{run_dir} has no config.json: it is not a run directory.")
    config = Config.from_json((run_dir / "config.json").read_text())
    with ocp.CheckpointManager(run_dir.absolute() / "checkpoints") as manager:
        step = manager.latest_step()
    if step is None:
        raise UserError(f"{run_dir} has no checkpoint yet; let the run reach train.checkpoint_every steps.")
    return config, step


def _read(
    run_dir: Path, step: int, abstract: Any, shardings: Any, kept: dict[str, Sequence[int]] | None
) -> dict[str, Any]:
    """Parameters as in `abstract`, checked; with `kept`, by layer, only those experts of the stacks."""
    checkpoints = run_dir.absolute() / "checkpoints"
    stacks: dict[str, Any] = {}
    if kept is not None:
        layers = dict(abstract["layers"])
        for name in kept:
            moe = dict(layers[name]["moe"])
            stacks[name] = moe.pop("routed")
            layers[name] = layers[name] | {"moe": moe}
        abstract = abstract | {"layers": layers}
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = shardings
        for key in path if shardings is not None else ():
            sharding = sharding[key.key]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=default if sharding is None else sharding)

    item = {"params": jax.tree.map_with_path(place, abstract)}
    args = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    try:
        with ocp.CheckpointManager(checkpoints) as manager:
            meta = read_meta(manager, step)
        version = meta["format_version"]
        require(
            version == FORMAT_VERSION,
            f"{run_dir} has checkpoint format {version}, this version reads {FORMAT_VERSION}.",
        )
        # A fresh manager: one that has restored an item with one handler refuses another.
        with ocp.CheckpointManager(checkpoints) as manager:
            params = manager.restore(step, args=ocp.args.Composite(state=args)).state["params"]
        check({"params": params}, meta["checksums"])
        for name, experts in (kept or {}).items():
            read = {key: _read_experts(checkpoints / str(step), name, key, experts) for key in stacks[name]}
            moe = params["layers"][name]["moe"]
            moe |= {"routed": read, "router": moe["router"].take(np.array(experts), axis=1)}
            tree = {"params": {"layers": {name: {"moe": {"routed": read}}}}}
            places = {f"params/layers/{name}/moe/routed/{key}": np.array(experts) for key in read}
            check(tree, meta["checksums"], places)
    except UserError:
        raise
    except Exception as error:  # whatever a library says of a broken file
        raise UserError(
            f"The checkpoint of step {step} in {run_dir} is damaged ({first_line(error)}). Continue the run, which "
            "moves it aside for the one before, or restore the folder from a copy."
        ) from None
    return params


def _read_experts(checkpoint: Path, layer: str, key: str, experts: Sequence[int]) -> np.ndarray:
    """Some experts of a stack; Orbax itself reads whole arrays, the store below it reads what is asked for."""
    store = tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{checkpoint / 'state'}/"},
                "path": f"params.layers.{layer}.moe.routed.{key}/",
            },
        }
    ).result()
    return store[np.array(experts)].read().result()

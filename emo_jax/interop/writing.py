"""Writing Hugging Face folders that the public loaders read: safetensors in shards, config.json, the small files."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (its import teaches NumPy, and so safetensors, the name "bfloat16")
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from emo_jax.errors import UserError, require
from emo_jax.interop.families import FAMILIES, family_for
from emo_jax.interop.fields import fixed_fields, model_config, published_fields
from emo_jax.interop.huggingface import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, read_json
from emo_jax.interop.tensors import Tensor, joined, tensors
from emo_jax.model import ModelConfig
from emo_jax.model.functional import LeafPath, leaf_shapes

_GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILE = "tokenizer.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
"""How names of files end that are not copied from an origin: weights and what lists them."""
_SMALL_BYTES = 10**8
"""The largest file that is copied from an origin."""


def write_folder(
    folder: Path,
    config: ModelConfig,
    leaf: Callable[[LeafPath], np.ndarray],
    *,
    origin: Path | None = None,
    tokenizer: Path | None = None,
    end_of_text_id: int = -1,
    context_length: int = 4096,
    shard_bytes: int = 10**9,
    progress: Callable[[int, int], None] | None = None,
    unrouted: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes a model as a Hugging Face folder, which appears when it is complete; the inverse of `read_leaves`.

    Beside the parameter in hand, writing takes twice the bytes of a shard.

    Args:
      folder: must not exist, or be empty.
      config: of the model.
      leaf: (path of a parameter) → the parameter, in the layout of `read_leaves`; asked once for each, one at a time.
        Tensors are written in its precision.
      origin: the folder that the weights came from. The result is of its family, with its `config.json`, in which
        only what `config` says otherwise is changed, and the class where it is another, and its other small files
        (tokenizer, generation settings, model code). None: the first family that can hold the model, and the files
        below.
      tokenizer: `tokenizer.json` to put there, instead of the origin's if it has one; None for none.
      end_of_text_id: the token that ends a document; −1 where none is known. Without an origin: the `eos_token_id`
        and `pad_token_id`. Public classifiers of decoders label a text at its last token that is not `pad_token_id`,
        and read one text at a time without; where the origin has none, it is this or else its `eos_token_id`.
      context_length: without an origin: `max_position_embeddings`, unless positions are learned.
      shard_bytes: of tensors in a file, at most, unless one tensor has more.
      progress: called with (parameters written, parameters in all) after each.
      unrouted: router rows of shared experts, see `read_unrouted`; None: zeros.

    Raises:
      UserError: the folder holds something; no published family (or not the origin's) can hold the model; a parameter
        has another shape than `config` makes it.
    """
    folder = Path(folder).absolute()
    require_new(folder)
    values = _config_values(config, origin, end_of_text_id, context_length)
    making = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        _write_weights(making, config, values["model_type"], leaf, shard_bytes, progress, unrouted or {})
        if origin is not None:
            copy_small_files(Path(origin), making)
        elif end_of_text_id >= 0 and config.causal and not config.labels:
            _write_json(making / _GENERATION_FILE, {"eos_token_id": end_of_text_id, "pad_token_id": end_of_text_id})
        if tokenizer is not None:
            shutil.copyfile(tokenizer, making / _TOKENIZER_FILE)
            settings = making / "tokenizer_config.json"
            if not settings.exists():
                _write_json(
                    settings, _tokenizer_values(tokenizer, end_of_text_id, config.max_positions or context_length)
                )
        _write_json(making / CONFIG_FILE, values)
        if folder.exists():
            folder.rmdir()
        making.rename(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def _config_values(
    config: ModelConfig, origin: Path | None, end_of_text_id: int, context_length: int
) -> dict[str, Any]:
    """What config.json holds."""
    end = end_of_text_id if end_of_text_id >= 0 else None
    if origin is None:
        name = family_for(config)
        rotary = {"max_position_embeddings": context_length} if FAMILIES[name].rotary else {}
        ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
        return published_fields(config, name) | fixed_fields(name) | rotary | ids
    path = Path(origin) / CONFIG_FILE
    values = read_json(path)
    try:
        theirs = model_config(values)
        name = family_for(config, values["model_type"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    before, fields = published_fields(theirs, name), published_fields(config, name)
    if fields == before:
        kind = fields["architectures"]
        return values | ({"architectures": kind} if values.get("architectures") not in (None, kind) else {})
    if fields["torch_dtype"] == before["torch_dtype"]:
        del fields["torch_dtype"]  # float16 there reads as float32 and stays
    elif "dtype" in values:
        fields["dtype"] = fields.pop("torch_dtype")
    if values.get("rope_parameters"):
        fields["rope_parameters"] = values["rope_parameters"] | {"rope_theta": fields.pop("rope_theta")}
    if config.labels and config.causal and values.get("pad_token_id") is None:
        fields["pad_token_id"] = values.get("eos_token_id") if end is None else end
    return values | fields


def _write_weights(
    making: Path,
    config: ModelConfig,
    model_type: str,
    leaf: Callable[[LeafPath], np.ndarray],
    shard_bytes: int,
    progress: Callable[[int, int], None] | None,
    unrouted: Mapping[str, np.ndarray],
) -> None:
    """The safetensors files, and the index where they are several."""
    shard: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    held = total = 0

    def flush() -> None:
        save_file(shard, making / str(len(shards)), metadata={"format": "pt"})  # the name needs their number
        shards.append(list(shard))
        shard.clear()

    for name, value in _published(config, model_type, leaf, progress, unrouted):
        if shard and held + value.nbytes > shard_bytes:
            flush()
            held = 0
        shard[name] = value
        held, total = held + value.nbytes, total + value.nbytes
    flush()
    if len(shards) == 1:
        (making / "0").rename(making / WEIGHTS_FILE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (making / str(i)).rename(making / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(making / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _published(
    config: ModelConfig,
    model_type: str,
    leaf: Callable[[LeafPath], np.ndarray],
    progress: Callable[[int, int], None] | None,
    unrouted: Mapping[str, np.ndarray],
) -> Iterator[tuple[str, np.ndarray]]:
    """Every published tensor by name, our parameters asked for one after another."""
    shapes = leaf_shapes(config)
    owners: dict[LeafPath, list[Tensor]] = {}
    for tensor in tensors(config, FAMILIES[model_type]):
        owners.setdefault(tensor.path, []).append(tensor)

    def parts() -> Iterator[tuple[Tensor, np.ndarray]]:
        for done, (path, own) in enumerate(owners.items(), 1):
            value = np.asarray(leaf(path))
            require(
                value.shape == shapes[path],
                f"The parameter {'/'.join(path)} has shape {list(value.shape)}, but the model's config makes it "
                f"{list(shapes[path])}.",
            )
            for tensor in own:
                published = tensor.published(value)
                if tensor.name in unrouted:
                    published[-tensor.unrouted :] = unrouted[tensor.name]
                yield tensor, published
            del value  # before the next is asked for
            if progress is not None:
                progress(done, len(owners))

    yield from joined(parts())


def require_new(folder: Path) -> None:
    """Raises `UserError` where a folder that is to be made holds something."""
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"{folder} exists already; give another folder, or delete it.",
    )


def copy_small_files(origin: Path, folder: Path) -> None:
    """Copies what a Hugging Face folder holds beside weights, `config.json` and the model card (of another model)."""
    for path in sorted(origin.iterdir()):
        left = path.name.endswith(_WEIGHTS) or path.name.startswith(".") or path.name in (CONFIG_FILE, "README.md")
        if path.is_file() and not left and path.stat().st_size <= _SMALL_BYTES:
            shutil.copyfile(path, folder / path.name)


def _tokenizer_values(tokenizer: Path, end_of_text_id: int, context_length: int) -> dict[str, Any]:
    """What tokenizer_config.json holds so that transformers takes tokenizer.json as it is."""
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
    }
    end = Tokenizer.from_file(str(tokenizer)).id_to_token(end_of_text_id) if end_of_text_id >= 0 else None
    return values | ({"eos_token": end, "pad_token": end} if end else {})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

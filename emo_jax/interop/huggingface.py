"""Reading Hugging Face folders: config.json and safetensors, one of our parameters at a time, nothing ever unpickled.

What the files hold and what it means is in `families`.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (its import teaches NumPy, and so safetensors, the name "bfloat16")
import numpy as np
import safetensors

from emo_jax.errors import UserError, require
from emo_jax.interop.families import (
    FAMILIES,
    Tensor,
    family_for,
    family_of,
    is_tied,
    model_config,
    scaled,
    tensors,
)
from emo_jax.model import ModelConfig, abstract_parameters

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
"""Dtypes in files, and what they are read as."""

PIECE_BYTES = 2**25
"""Read before a file is opened anew: its pages count as this process's memory as long as it is open."""


class _Stored(NamedTuple):
    """Where a published tensor is, and what its file says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class _Piece(NamedTuple):
    """Some rows of a published tensor; pieces of the same window are read without opening the file anew."""

    file: Path
    window: int
    tensor: Tensor
    rows: slice


def read_config(folder: str | Path) -> ModelConfig:
    """The model that a Hugging Face folder holds; see `families.model_config`.

    Raises:
      UserError: not a folder of a supported family, or one with something that is not supported; names the field and
        its value.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_json(path)
    try:
        return model_config(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_leaves(
    folder: str | Path,
    config: ModelConfig,
    kept: Sequence[Sequence[int]] | None = None,
    skip: Collection[tuple[str, ...]] = (),
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """The folder's weights as (path of our parameter, such as ("layers", "00", "moe", "router"); the parameter).

    One at a time, the largest first; each is a C-contiguous array in the precision that it is stored in: bfloat16,
    float16 or float32. What is stored as float64 comes as float32, since JAX has no float64 unless asked for it; a
    parameter stored in several precisions comes in one that holds them all. Beside the parameter in hand, reading
    takes some 128 MB.

    Args:
      folder: with `model.safetensors`, or `model.safetensors.index.json` and the files it names.
      config: from `read_config`.
      kept: routed experts of each mixture layer: the parameters are those of the model cut to them, and no other
        expert is read. None: all.
      skip: paths of parameters that are not read.

    Raises:
      UserError: no safetensors file, an unreadable one, or a tensor that is missing, too many, of another shape or
        not floating-point: before anything is read. While reading: a tensor with a value that is not finite, or with
        unequal router rows of shared experts.
    """
    folder = Path(folder)
    stored, parts, leaves = _checked(folder, config, kept)

    def read() -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        for path, leaf in leaves.items():
            if path not in skip:
                yield path, _read_leaf(folder, parts[path], np.empty(leaf.shape, leaf.dtype), stored)

    return read()


def abstract_leaves(
    folder: str | Path, config: ModelConfig, kept: Sequence[Sequence[int]] | None = None
) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Shape and dtype of what `read_leaves` gives, by path and in its order; reads no tensor.

    Args, Raises: as `read_leaves`.
    """
    return _checked(Path(folder), config, kept)[2]


def read_unrouted(folder: str | Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """The rows of shared experts [s, D] in published routers, by the router's name: our parameters do not have them.

    Raises:
      UserError: as `read_leaves`.
    """
    stored, parts, _ = _checked(Path(folder), config, None)
    rows = {}
    for tensor in itertools.chain.from_iterable(parts.values()):
        if tensor.unrouted:
            with safetensors.safe_open(stored[tensor.name].file, framework="numpy") as file:
                rows[tensor.name] = file.get_tensor(tensor.name)[-tensor.unrouted :].copy()
    return rows


def read_parameters(
    folder: str | Path, config: ModelConfig, kept: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """The folder's weights in our layout: a nested dict of the arrays of `read_leaves`, in the stored precision.

    Args, Raises: as `read_leaves`.
    """
    return _nested(read_leaves(folder, config, kept))


def read_routers(folder: str | Path, config: ModelConfig) -> dict[str, Any]:
    """The routers alone, at their places among the parameters: enough for a model's fingerprint.

    Raises:
      UserError: as `read_leaves`.
    """
    others = [path for path in leaf_shapes(config) if path[-1] != "router"]
    return _nested(read_leaves(folder, config, skip=others))


def to_public_names(params: dict[str, Any], config: ModelConfig, *, gradients: bool = False) -> dict[str, np.ndarray]:
    """The inverse of `read_parameters`: contiguous arrays by published name, in the published layout.

    Names are those of the first family that can hold the model. Router rows of shared experts, which we do not have,
    are zeros. With s > 1 shared experts their `down` is scaled as `families` says.

    Args:
      params: nested dict of arrays in our layout; theirs is the result's precision.
      config: of the model.
      gradients: `params` holds derivatives by our parameters; the result holds those by the published ones.

    Raises:
      UserError: no published family can hold the model.
    """
    params = jax.tree.map(np.asarray, params)
    public = {}
    for tensor in tensors(config, FAMILIES[family_for(config)]):
        leaf: Any = params
        for key in tensor.path:
            leaf = leaf[key]
        public[tensor.name] = tensor.published(leaf, gradients=gradients)
    return public


def leaf_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of each of a model's parameters, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_parameters(config))
    return {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: there is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    require(isinstance(values, dict), f"{path} must hold a JSON object, not a {type(values).__name__}.")
    return values


def _nested(leaves: Iterator[tuple[tuple[str, ...], np.ndarray]]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for path, leaf in leaves:
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return params


def _checked(
    folder: Path, config: ModelConfig, kept: Sequence[Sequence[int]] | None
) -> tuple[dict[str, _Stored], dict[tuple[str, ...], list[Tensor]], dict[tuple[str, ...], jax.ShapeDtypeStruct]]:
    """What the files hold, the tensors of each of our parameters, and its shape and dtype, the largest first."""
    values = read_json(folder / CONFIG_FILE)
    family, tied = family_of(values), is_tied(values)
    stored = _stored(folder)
    _check_names(folder, {tensor.name for tensor in tensors(config, family, tied=tied)}, set(stored))
    parts: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in tensors(config, family, kept, tied):
        parts.setdefault(tensor.path, []).append(tensor)
    shapes = leaf_shapes(config if kept is None else config.cut(kept))
    leaves = {
        path: jax.ShapeDtypeStruct(shapes[path], _check_parts(folder, own, shapes[path], stored))
        for path, own in parts.items()
    }
    largest_first = sorted(leaves.items(), key=lambda item: item[1].size * item[1].dtype.itemsize, reverse=True)
    return stored, parts, dict(largest_first)


def _check_parts(folder: Path, parts: Sequence[Tensor], shape: tuple[int, ...], stored: dict[str, _Stored]) -> np.dtype:
    """The precision of a parameter whose tensors have the shapes and dtypes that they must."""
    leaf = np.empty(shape, np.float32)  # never touched: it takes no memory
    found = []
    for tensor in parts:
        view, (_, shape, dtype) = tensor.view(leaf), stored[tensor.name]
        expected = (tensor.rows or view.shape[0], *view.shape[1:])
        require(
            shape == expected,
            f"{folder}: tensor {tensor.name} has shape {list(shape)}, but {CONFIG_FILE} makes it {list(expected)}.",
        )
        require(
            dtype in FLOATS, f"{folder}: tensor {tensor.name} has dtype {dtype}; it must be one of {', '.join(FLOATS)}."
        )
        found.append(np.dtype(FLOATS[dtype]))
    return found[0] if len(set(found)) == 1 else np.dtype(jnp.result_type(*found))


def _read_leaf(folder: Path, parts: Sequence[Tensor], leaf: np.ndarray, stored: dict[str, _Stored]) -> np.ndarray:
    """Fills in one of our parameters."""
    pieces = itertools.groupby(_pieces(parts, leaf, stored), key=lambda piece: piece[:2])
    for (path, _), group in pieces:
        with safetensors.safe_open(path, framework="numpy") as file:
            for _, _, tensor, rows in group:
                with np.errstate(over="ignore"):  # float64 that float32 cannot hold becomes infinite, and is refused
                    value = file.get_slice(tensor.name)[rows].astype(leaf.dtype, copy=False)
                require(
                    bool(np.isfinite(value).all()),
                    f"{folder}: tensor {tensor.name} has values that are not finite (NaN or infinity), a sign of "
                    "damage; copy or download the folder again.",
                )
                if tensor.unrouted:
                    value = _without_shared_rows(folder, tensor, value)
                if tensor.chosen is not None:
                    value = value[list(tensor.chosen)]
                tensor.view(leaf)[rows] = scaled(value, over=tensor.divisor)
    return leaf


def _pieces(parts: Sequence[Tensor], leaf: np.ndarray, stored: dict[str, _Stored]) -> Iterator[_Piece]:
    """What to read of a parameter, in bites."""
    done = 0
    for tensor in parts:
        file, shape, _ = stored[tensor.name]
        step = max(1, PIECE_BYTES // (math.prod(shape[1:]) * leaf.itemsize))
        starts = range(0, shape[0], step) if not tensor.rows else (0,)  # a router is small, and its rows are not ours
        for start in starts:
            rows = slice(None) if tensor.rows else slice(start, min(start + step, shape[0]))
            yield _Piece(file, done // PIECE_BYTES, tensor, rows)
            done += min(step, shape[0]) * math.prod(shape[1:]) * leaf.itemsize


def _without_shared_rows(folder: Path, tensor: Tensor, value: np.ndarray) -> np.ndarray:
    """The rows of routed experts of a published router."""
    shared = value[-tensor.unrouted :]
    require(
        bool((shared == shared[:1]).all()),
        f"{folder}: the last {tensor.unrouted} rows of {tensor.name} differ, which makes the weights of the shared "
        "experts depend on the token; that is not supported. Set those rows to zero to give each shared expert the "
        f"weight 1/{tensor.unrouted}.",
    )
    return value[: -tensor.unrouted]


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        names = sorted(set(read_json(folder / INDEX_FILE).get("weight_map", {}).values()))
        for name in names:
            require(
                Path(name).name == name and (folder / name).is_file(),
                f"{folder / INDEX_FILE} names the file {name!r}, which is not in the folder.",
            )
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    require(
        not pickles,
        f"{folder} has its weights only as {', '.join(pickles)}. Such pickled files can run any code when read, so "
        "they are not; convert to safetensors first (in transformers: model.save_pretrained(folder)).",
    )
    raise UserError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}.")


def _stored(folder: Path) -> dict[str, _Stored]:
    """Every published tensor in the folder's files, by name."""
    found: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
                headers = {name: _Stored(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
                del slices  # they keep the file open
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({_cut_off(path) or error}); copy or download it again."
            ) from error
        for name in headers:
            require(name not in found, f"{folder}: tensor {name} is in two files, {path.name} the second.")
        found |= headers
    return found


def _cut_off(path: Path) -> str:
    """What says that a file ends before the data that its header promises; empty where it cannot be read so."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > size:
            return ""
        ends = {name: end["data_offsets"][1] for name, end in json.loads(file.read(length)).items() if name[:2] != "__"}
        beyond = [(end, name) for name, end in ends.items() if 8 + length + end > size]
        if beyond:
            return f"it has {size} bytes of {8 + length + max(ends.values())}, and tensor {min(beyond)[1]} is cut off"
    return ""


def _check_names(folder: Path, expected: set[str], found: set[str]) -> None:
    """Raises `UserError` on the first names that are missing or not ours."""
    for what, names in (("is missing", expected - found), ("is not part of such a model", found - expected)):
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        require(not names, f"{folder}: tensor {min(names, default='')} {what}{others}, by its {CONFIG_FILE}.")

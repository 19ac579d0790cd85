"""Reading Hugging Face folders: config.json and safetensors, one of our parameters at a time, nothing ever unpickled.

What config.json means is in `fields`, where published tensors lie in our parameters in `tensors`.
"""

import contextlib
import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (its import teaches NumPy, and so safetensors, the name "bfloat16")
import numpy as np
import safetensors

from emo_jax.errors import UserError, require
from emo_jax.interop.families import FAMILIES, Names, family_for, family_of
from emo_jax.interop.fields import is_classifier, model_config
from emo_jax.interop.tensors import Tensor, joined, scaled, tensors
from emo_jax.model import ModelConfig
from emo_jax.model.functional import LeafPath, leaf_path, leaf_shapes

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
"""Dtypes in files, and what they are read as."""

_BEHIND_TRUNK = ("head", "classifier", "classifier_bias", "pooler", "pooler_bias")

PIECE_BYTES = 2**25
"""Read before a file is opened anew: its pages count as this process's memory as long as it is open."""


class _Stored(NamedTuple):
    """Where a published tensor is, and what its file says of it."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str


class _Part(NamedTuple):
    """Some of one of our parameters, and where a folder has it."""

    tensor: Tensor
    stored: _Stored


class _Piece(NamedTuple):
    """Some rows of a part; pieces of the same file and window are read without opening the file anew."""

    file: Path
    window: int
    part: _Part
    rows: slice


def read_config(folder: str | Path) -> ModelConfig:
    """The model that a Hugging Face folder holds; see `fields.model_config`.

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
    skip: Collection[LeafPath] = (),
) -> Iterator[tuple[LeafPath, np.ndarray]]:
    """The folder's weights as (path of our parameter, such as ("layers", "00", "moe", "router"); the parameter).

    One at a time, the largest first; each is a C-contiguous array in the precision that it is stored in: bfloat16,
    float16 or float32. What is stored as float64 comes as float32, since JAX has no float64 unless asked for it; a
    parameter stored in several precisions comes in one that holds them all. Beside the parameter in hand, reading
    takes some 128 MB.

    Args:
      folder: with `model.safetensors`, or `model.safetensors.index.json` and the files it names.
      config: from `read_config`; or that with other labels, where `skip` has `missing_leaves`.
      kept: routed experts of each mixture layer: the parameters are those of the model cut to them, and no other
        expert is read. None: all.
      skip: paths of parameters that are not read, and need not be there.

    Raises:
      UserError: no safetensors file, an unreadable one, or a tensor that is missing, too many, of another shape or
        not floating-point: before anything is read. While reading: a tensor with a value that is not finite, or with
        unequal router rows of shared experts.
    """
    folder = Path(folder)
    parts, leaves = _checked(folder, config, kept, frozenset(skip))

    def read() -> Iterator[tuple[LeafPath, np.ndarray]]:
        for path, leaf in leaves.items():
            yield path, _read_leaf(folder, parts[path], np.empty(leaf.shape, leaf.dtype))

    return read()


def abstract_leaves(
    folder: str | Path, config: ModelConfig, kept: Sequence[Sequence[int]] | None = None
) -> dict[LeafPath, jax.ShapeDtypeStruct]:
    """Shape and dtype of what `read_leaves` gives, by path and in its order; reads no tensor.

    Args, Raises: as `read_leaves`.
    """
    return _checked(Path(folder), config, kept)[1]


def missing_leaves(folder: str | Path, config: ModelConfig) -> set[LeafPath]:
    """Those parameters behind the trunk (head, classifier, pooler) that a folder has not, or in another shape.

    With them as `skip`, `read_leaves` gives all that the folder has of a model that differs from its own in `labels`
    alone, so that a classifier can be started from any model of its trunk: from a BERT, with the pooler that it has.
    Whether labels of equal number mean the same is not looked at.

    Args:
      folder: as in `read_leaves`.
      config: of the model that is to be read.

    Raises:
      UserError: no safetensors file, or an unreadable one.
    """
    folder = Path(folder)
    family = family_of(read_json(folder / CONFIG_FILE))
    stored, shapes = _stored(folder, family.names), leaf_shapes(config)
    behind = {path for path in shapes if path[0] in _BEHIND_TRUNK}
    for tensor in tensors(config, family):
        found = stored.get(family.names.canonical(tensor.name))
        if found is not None and found.shape == tensor.shape(_never_touched(shapes[tensor.path])):
            behind.discard(tensor.path)
    return behind


def read_unrouted(folder: str | Path, config: ModelConfig) -> dict[str, np.ndarray]:
    """The rows of shared experts [s, D] in published routers, by the router's name: our parameters do not have them.

    Raises:
      UserError: as `read_leaves`.
    """
    parts, _ = _checked(Path(folder), config, None)
    rows = {}
    for tensor, stored in itertools.chain.from_iterable(parts.values()):
        if tensor.unrouted:
            with safetensors.safe_open(stored.file, framework="numpy") as file:
                rows[tensor.name] = file.get_tensor(stored.name)[-tensor.unrouted :].copy()
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
    are zeros. With s > 1 shared experts their `down` is scaled as `tensors` says.

    Args:
      params: nested dict of arrays in our layout; theirs is the result's precision.
      config: of the model.
      gradients: `params` holds derivatives by our parameters; the result holds those by the published ones.

    Raises:
      UserError: no published family can hold the model.
    """
    leaves = {leaf_path(keys): np.asarray(leaf) for keys, leaf in jax.tree.leaves_with_path(params)}
    parts = (
        (tensor, tensor.published(leaves[tensor.path], gradients=gradients))
        for tensor in tensors(config, FAMILIES[family_for(config)])
    )
    return dict(joined(parts))


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


def _nested(leaves: Iterator[tuple[LeafPath, np.ndarray]]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for path, leaf in leaves:
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return params


def _checked(
    folder: Path, config: ModelConfig, kept: Sequence[Sequence[int]] | None, skip: Collection[LeafPath] = ()
) -> tuple[dict[LeafPath, list[_Part]], dict[LeafPath, jax.ShapeDtypeStruct]]:
    """The parts of each of our parameters in the files, and its shape and dtype, the largest first."""
    values = read_json(folder / CONFIG_FILE)
    family = family_of(values)
    stored = _stored(folder, family.names)
    _check_names(folder, config, values, stored, skip)
    parts: dict[LeafPath, list[_Part]] = {}
    for tensor in tensors(config, family, kept):
        if tensor.path not in skip:
            part = _Part(tensor, stored[family.names.canonical(tensor.name)])
            parts.setdefault(tensor.path, []).append(part)
    shapes = leaf_shapes(config if kept is None else config.cut(kept))
    leaves = {
        path: jax.ShapeDtypeStruct(shapes[path], _check_parts(folder, own, shapes[path])) for path, own in parts.items()
    }
    largest_first = sorted(leaves.items(), key=lambda item: item[1].size * item[1].dtype.itemsize, reverse=True)
    return parts, dict(largest_first)


def _check_parts(folder: Path, parts: Sequence[_Part], shape: tuple[int, ...]) -> np.dtype:
    """The precision of a parameter whose tensors have the shapes and dtypes that they must."""
    leaf = _never_touched(shape)
    found = []
    for tensor, stored in parts:
        expected, dtype = tensor.shape(leaf), stored.dtype
        require(
            stored.shape == expected,
            f"{folder}: tensor {stored.name} has shape {list(stored.shape)}, but {CONFIG_FILE} makes it "
            f"{list(expected)}.",
        )
        require(
            dtype in FLOATS, f"{folder}: tensor {stored.name} has dtype {dtype}; it must be one of {', '.join(FLOATS)}."
        )
        found.append(np.dtype(FLOATS[dtype]))
    return found[0] if len(set(found)) == 1 else np.dtype(jnp.result_type(*found))


def _never_touched(shape: tuple[int, ...]) -> np.ndarray:
    """An array that only its shape is asked of: it takes no memory."""
    return np.empty(shape, np.float32)


def _read_leaf(folder: Path, parts: Sequence[_Part], leaf: np.ndarray) -> np.ndarray:
    """Fills in one of our parameters."""
    pieces = itertools.groupby(_pieces(parts, leaf), key=lambda piece: piece[:2])
    for (path, _), group in pieces:
        with safetensors.safe_open(path, framework="numpy") as file:
            for _, _, (tensor, stored), rows in group:
                view = tensor.view(leaf)
                with np.errstate(over="ignore"):  # float64 that float32 cannot hold becomes infinite, and is refused
                    where = tensor.where(rows, view.shape)
                    value = file.get_slice(stored.name)[where].astype(leaf.dtype, copy=False)
                require(
                    bool(np.isfinite(value).all()),
                    f"{folder}: tensor {stored.name} has values that are not finite (NaN or infinity), a sign of "
                    "damage; copy or download the folder again.",
                )
                if tensor.unrouted:
                    value = _without_shared_rows(folder, tensor, value)
                if tensor.chosen is not None:
                    value = value[list(tensor.chosen)]
                view[rows] = scaled(value, over=tensor.divisor)
    return leaf


def _pieces(parts: Sequence[_Part], leaf: np.ndarray) -> Iterator[_Piece]:
    """What to read of a parameter, in bites."""
    done = 0
    for part in parts:
        shape = part.tensor.view(leaf).shape
        row_bytes = math.prod(shape[1:]) * leaf.itemsize
        step = max(1, PIECE_BYTES // row_bytes)
        whole = bool(part.tensor.rows)  # a router is small, and its rows are not ours
        for start in (0,) if whole else range(0, shape[0], step):
            rows = slice(None) if whole else slice(start, min(start + step, shape[0]))
            yield _Piece(part.stored.file, done // PIECE_BYTES, part, rows)
            done += min(step, shape[0]) * row_bytes


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


def _stored(folder: Path, names: Names) -> dict[str, _Stored]:
    """Every tensor in the folder's files, by its name in canonical form."""
    found: dict[str, _Stored] = {}
    for path in _weight_files(folder):
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
                headers = [_Stored(name, path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
                del slices  # they keep the file open
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({_cut_off(path) or error}); copy or download it again."
            ) from error
        for header in headers:
            name = names.canonical(header.name)
            require(
                name not in found, f"{folder}: tensor {header.name} is there twice, in {path.name} the second time."
            )
            found[name] = header
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


def _check_names(
    folder: Path,
    config: ModelConfig,
    values: dict[str, Any],
    stored: dict[str, _Stored],
    skip: Collection[LeafPath],
) -> None:
    """Raises `UserError` on the first names that are missing or not ours; `values` are in the folder's config.json."""
    family = family_of(values)
    names, other_class = family.names, bool(config.labels) != is_classifier(values)  # whose head is not looked at
    ours = [(names.canonical(tensor.name), tensor) for tensor in tensors(config, family)]
    missing = sorted({tensor.name for name, tensor in ours if name not in stored and tensor.path not in skip})
    expected = {name for name, _ in ours}
    extra = [
        own.name
        for name, own in stored.items()
        if not (name in expected or re.fullmatch(names.ignored, name))
        and not (other_class and name.rpartition(".")[0] in names.heads)
    ]
    for what, wrong in (("is missing", missing), ("is not part of such a model", extra)):
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        require(not wrong, f"{folder}: tensor {min(wrong, default='')} {what}{others}, by its {CONFIG_FILE}.")
    beside = leaf_shapes(config).keys() - {tensor.path for _, tensor in ours} - set(skip)
    require(not beside, f"{folder}: its family has no tensor for the parameter {'/'.join(min(beside, default=()))}.")

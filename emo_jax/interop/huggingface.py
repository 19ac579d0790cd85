"""Hugging Face folders of `model_type` "emo": their config, their tensors, and where each lies in our parameters.

Published linear weights are [out, in] and experts are separate tensors, the shared ones last in each layer's stack.
Ours are [in, out], experts stacked, shared experts one feed-forward of width s·F beside them, without router columns.

The published inference code weights a token's s shared experts by a softmax over their own s router logits; training,
and this project, use 1 for each. With one shared expert the two agree. With more, the sum is 1 instead of s: reading
divides `down` of the shared experts by s and writing multiplies it, which is exact where their router rows are equal
(we write zeros) and impossible where they are not: such a folder is refused.

Letters: V vocabulary, D model, H query heads, K key/value heads, N head width, E experts, R routed experts,
s shared experts, F expert hidden.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  (its import teaches NumPy, and so safetensors, the name "bfloat16")
import numpy as np
import safetensors

from emo_jax.errors import UserError, require
from emo_jax.model import ModelConfig, abstract_parameters

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = ("BF16", "F16", "F32", "F64")

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "rms_norm_eps",
)
UNSUPPORTED_UNLESS_EMPTY = (
    "attention_bias",
    "tie_word_embeddings",
    "dense_mlp_bias",
    "always_active_experts",
    "always_active_experts_per_layer",
    "ghost_extend_eval",
    "quantization_config",
)

ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
NORMS = {"pre_attention_layernorm": "attention_norm", "pre_feedforward_layernorm": "ffn_norm"}
FEED_FORWARD = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


class _Tensor(NamedTuple):
    """A published tensor and where it lies in our parameters.

    Attributes:
      name: published.
      path: of our parameter.
      view: of our parameter (a view, so that it can be written to), in the published layout.
      rows: that the published tensor has, where they are not those of `view`: a router's.
      unrouted: the last so many of them, of the shared experts, which ours has not.
      chosen: which of the others are ours; None: all.
      divisor: ours is the published value divided by it.
    """

    name: str
    path: tuple[str, ...]
    view: Callable[[np.ndarray], np.ndarray]
    rows: int = 0
    unrouted: int = 0
    chosen: tuple[int, ...] | None = None
    divisor: int = 1


def read_config(folder: str | Path) -> ModelConfig:
    """The model that a Hugging Face folder holds; `dtype` is float32, whatever the tensors are stored in.

    Raises:
      UserError: not an EMO folder, or one with something that is not supported; names the field and its value.
    """
    path = Path(folder) / CONFIG_FILE
    values = read_json(path)
    kind = values.get("model_type")
    require(kind == "emo", f"{path}: model_type={kind!r} is not supported yet; only 'emo' is.")
    for field in REQUIRED:
        require(values.get(field) is not None, f"{path}: the field {field!r} is missing.")

    def refuse(field: str, value: Any) -> None:
        raise UserError(f"{path}: {field}={value!r} is not supported yet.")

    for field in UNSUPPORTED_UNLESS_EMPTY:
        if values.get(field):
            refuse(field, values[field])
    if (activation := values.get("hidden_act", "silu")) != "silu":
        refuse("hidden_act", activation)
    rope_field = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = values.get(rope_field) or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        refuse(rope_field, rope)
    theta = values.get("rope_theta") or rope.get("rope_theta")
    if theta is None:
        raise UserError(f"{path}: the field 'rope_theta' is missing.")
    head_dim = values["hidden_size"] // values["num_attention_heads"]
    if values.get("head_dim", head_dim) not in (None, head_dim):
        refuse("head_dim", values["head_dim"])

    shared = values["num_shared_experts"]
    per_layer = values.get("num_experts_per_layer")
    shared_per_layer = values.get("num_shared_experts_per_layer")
    if per_layer and shared_per_layer:
        counts = {s for e, s in zip(per_layer, shared_per_layer, strict=False) if e} or {0}
        if len(counts) > 1:
            refuse("num_shared_experts_per_layer", shared_per_layer)
        (shared,) = counts
    if values.get("norm_topk_prob") and shared:
        refuse("norm_topk_prob", True)

    config = ModelConfig(
        vocab_size=values["vocab_size"],
        d_model=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values.get("num_key_value_heads") or values["num_attention_heads"],
        rope_theta=float(theta),
        norm_epsilon=values["rms_norm_eps"],
        num_experts=values["num_experts"],
        num_shared_experts=shared,
        top_k=values["num_experts_per_tok"],
        d_expert=values["intermediate_size"],
        experts_per_layer=tuple(per_layer or ()),
        d_dense=values.get("dense_intermediate_size") or 0,
        normalize_top_k=bool(values.get("norm_topk_prob")),
        init_std=values.get("initializer_range") or ModelConfig.init_std,
        dtype="float32",
    )
    try:
        config.validate()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def read_parameters(
    folder: str | Path, config: ModelConfig, kept: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """The folder's weights in our layout: a nested dict of NumPy arrays in the precision of master weights.

    Args:
      folder: with `model.safetensors`, or `model.safetensors.index.json` and the files it names.
      config: from `read_config`.
      kept: routed experts of each mixture layer: the parameters are those of the model cut to them, and no other
        expert is read. None: all.

    Raises:
      UserError: no safetensors file, an unreadable one, or a tensor that is missing, too many, of another shape or
        not floating-point.
    """
    held = config if kept is None else config.cut(kept)
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract_parameters(held))
    _fill(Path(folder), config, params, _tensors(config, kept))
    return params


def read_routers(folder: str | Path, config: ModelConfig) -> dict[str, Any]:
    """The routers alone, at their places among the parameters: enough for a model's fingerprint.

    Raises:
      UserError: as `read_parameters`.
    """
    layers = abstract_parameters(config)["layers"]
    shapes = {name: {"moe": {"router": layer["moe"]["router"]}} for name, layer in layers.items() if "moe" in layer}
    params = {"layers": jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)}
    _fill(Path(folder), config, params, (tensor for tensor in _tensors(config) if tensor.path[-1] == "router"))
    return params


def _fill(folder: Path, config: ModelConfig, params: dict[str, Any], tensors: Iterable[_Tensor]) -> None:
    """Reads some of the folder's tensors into arrays that are there."""
    views = [(tensor, tensor.view(_leaf(params, tensor.path))) for tensor in tensors]
    with contextlib.ExitStack() as stack:
        holder = _open(folder, stack)
        _check_names(folder, {tensor.name for tensor in _tensors(config)}, holder.keys())
        for tensor, view in views:  # all of them before any is read: reading a large model takes minutes
            stored = holder[tensor.name].get_slice(tensor.name)
            expected = (tensor.rows or view.shape[0], *view.shape[1:])
            found = tuple(stored.get_shape())
            require(
                found == expected,
                f"{folder}: tensor {tensor.name} has shape {list(found)}, but config.json makes it {list(expected)}.",
            )
            kind = stored.get_dtype()
            require(kind in FLOATS, f"{folder}: tensor {tensor.name} has dtype {kind}; it must be one of {FLOATS}.")
        for tensor, view in views:
            value = holder[tensor.name].get_tensor(tensor.name)
            if tensor.unrouted:
                value, shared = value[: -tensor.unrouted], value[-tensor.unrouted :]
                require(
                    bool((shared == shared[:1]).all()),
                    f"{folder}: the last {tensor.unrouted} rows of {tensor.name} differ, which makes the weights of "
                    f"the shared experts depend on the token; that is not supported. Set those rows to zero to give "
                    f"each shared expert the weight 1/{tensor.unrouted}.",
                )
            view[...] = value if tensor.chosen is None else value[list(tensor.chosen)]
            if tensor.divisor != 1:
                view /= tensor.divisor


def to_public_names(params: dict[str, Any], config: ModelConfig, *, gradients: bool = False) -> dict[str, np.ndarray]:
    """The inverse of `read_parameters`: contiguous arrays by published name, in the published layout.

    Router rows of shared experts, which we do not have, are zeros. With s > 1 shared experts their `down` is scaled
    as the module's docstring says.

    Args:
      params: nested dict of arrays in our layout.
      config: of the model.
      gradients: `params` holds derivatives by our parameters; the result holds those by the published ones.
    """
    params = jax.tree.map(np.asarray, params)
    public = {}
    for tensor in _tensors(config):
        value = tensor.view(_leaf(params, tensor.path))
        if tensor.unrouted:
            value = np.concatenate([value, np.zeros((tensor.unrouted, value.shape[1]), value.dtype)])
        if tensor.divisor != 1:
            value = value / tensor.divisor if gradients else value * tensor.divisor
        public[tensor.name] = np.array(value, order="C")  # never a view of `params`
    return public


def _tensors(config: ModelConfig, kept: Sequence[Sequence[int]] | None = None) -> Iterator[_Tensor]:
    """Every published tensor of such a model; with `kept`, those of it cut to these experts, ours renumbered."""
    chosen = iter(kept or ())
    yield _Tensor("model.embed_tokens.weight", ("embedding",), _same)
    for i, experts in enumerate(config.layer_experts):
        here, ours = f"model.layers.{i}", ("layers", f"{i:02d}")
        for public, own in NORMS.items():
            yield _Tensor(f"{here}.{public}.weight", (*ours, own), _same)
        for public, own in ATTENTION.items():
            view = _heads_in if own == "out" else _heads_out
            yield _Tensor(f"{here}.self_attn.{public}.weight", (*ours, "attention", own), view)
        if experts:
            experts_kept = None if kept is None else tuple(next(chosen))
            yield from _mixture(f"{here}.mlp", (*ours, "moe"), experts, config, experts_kept)
        else:
            for public, own in FEED_FORWARD.items():
                yield _Tensor(f"{here}.mlp.{public}.weight", (*ours, "ffn", own), np.transpose)
    yield _Tensor("model.norm.weight", ("final_norm",), _same)
    yield _Tensor("lm_head.weight", ("head",), np.transpose)


def _mixture(
    here: str, ours: tuple[str, ...], experts: int, config: ModelConfig, kept: tuple[int, ...] | None
) -> Iterator[_Tensor]:
    """The tensors of one mixture layer of E experts, or of those that are kept."""
    shared, hidden = config.num_shared_experts, config.d_expert
    routed = experts - shared
    yield _Tensor(f"{here}.gate.weight", (*ours, "router"), np.transpose, routed + shared, shared, kept)
    for public, own in FEED_FORWARD.items():
        for place, e in enumerate(range(routed) if kept is None else kept):
            yield _Tensor(f"{here}.experts.{e}.{public}.weight", (*ours, "routed", own), _transposed(place))
        for j in range(shared):
            name = f"{here}.experts.{routed + j}.{public}.weight"
            part = slice(j * hidden, (j + 1) * hidden)
            if own == "down":
                yield _Tensor(name, (*ours, "shared", own), _transposed(part), divisor=shared)
            else:
                yield _Tensor(name, (*ours, "shared", own), _transposed(slice(None), part))


def _transposed(*index: int | slice) -> Callable[[np.ndarray], np.ndarray]:
    return lambda w: w[index].T


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _heads_out(w_DHN: np.ndarray) -> np.ndarray:
    """[H·N, D]: the published layout of a projection to heads."""
    return w_DHN.reshape(w_DHN.shape[0], -1).T


def _heads_in(w_HND: np.ndarray) -> np.ndarray:
    """[D, H·N]: the published layout of the projection from heads."""
    return w_HND.reshape(-1, w_HND.shape[-1]).T


def _leaf(params: dict[str, Any], path: tuple[str, ...]) -> np.ndarray:
    node: Any = params
    for key in path:
        node = node[key]
    return node


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


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """The open file that holds each tensor."""
    holder: dict[str, Any] = {}
    for path in _weight_files(folder):
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({error}); copy or download it again."
            ) from error
        for name in file.keys():  # noqa: SIM118  (not a dict)
            require(name not in holder, f"{folder}: tensor {name} is in two files, {path.name} the second.")
            holder[name] = file
    return holder


def _check_names(folder: Path, expected: set[str], found: Any) -> None:
    """Raises `UserError` on the first names that are missing or not ours."""
    for what, names in (("is missing", expected - found), ("is not part of such a model", found - expected)):
        others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        require(not names, f"{folder}: tensor {min(names, default='')} {what}{others}, by its {CONFIG_FILE}.")

"""NNX modules seen as functions of a plain nested dict of parameters; the module graph is static."""

import dataclasses
import functools
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emo_jax.model.config import ModelConfig
from emo_jax.model.emergent import COSINE_SCALE
from emo_jax.model.transformer import Transformer

Parameters = dict[str, Any]
"""Nested dict of arrays, such as params["layers"]["00"]["moe"]["router"]."""
LeafPath = tuple[str, ...]
"""Of a parameter, such as ("layers", "00", "moe", "router")."""


@functools.cache
def _split(config_json: str, x64: bool) -> tuple[nnx.GraphDef, nnx.State]:
    del x64  # abstract float64 leaves exist only where it is enabled
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(config_json).items()}
    config = ModelConfig(**values)
    return nnx.split(nnx.eval_shape(lambda: Transformer(config)))


def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return _split(
        json.dumps(dataclasses.asdict(config)), jax.config.jax_enable_x64
    )  # configs are mutable, so not hashable themselves


def bind(config: ModelConfig, params: Parameters) -> Transformer:
    """The module with these parameters; free, so it belongs inside a jitted function."""
    return nnx.merge(_abstract(config)[0], params)


def abstract_parameters(config: ModelConfig) -> Parameters:
    """Shapes and dtypes of the parameters, without making any."""
    return nnx.to_pure_dict(_abstract(config)[1])


def leaf_path(keys: Sequence[Any]) -> LeafPath:
    """The path that JAX's tree functions give as keys of dictionaries."""
    return tuple(key.key for key in keys)


def leaf_at(tree: Any, path: LeafPath) -> Any:
    """What a nested dict holds at a path."""
    return functools.reduce(operator.getitem, path, tree)


def leaf_shapes(config: ModelConfig) -> dict[LeafPath, tuple[int, ...]]:
    """The shape of each of a model's parameters, by its path."""
    return {leaf_path(keys): leaf.shape for keys, leaf in jax.tree.leaves_with_path(abstract_parameters(config))}


def mixture_layers(params: Parameters) -> list[str]:
    """Names of the layers that are mixtures, in order."""
    return [name for name in sorted(params["layers"]) if "moe" in params["layers"][name]]


def logical_axes(config: ModelConfig) -> Parameters:
    """A `PartitionSpec` of logical axis names for each parameter."""
    return nnx.to_pure_dict(nnx.get_partition_spec(_abstract(config)[1]))


def init_parameters(config: ModelConfig, seed: int, shardings: Parameters | None = None) -> Parameters:
    """Random initial parameters, each made where it lives: no device ever holds one whole that it only shares.

    Matrices are normal with `init_std`, cut at three of it (public recipe: no scaling by depth or width); vectors, the
    norms' scales, are ones; biases are zeros. Neurons of a split layer stand in their order.

    Args:
      config: of the model.
      seed: of one threefry key, folded with each parameter's place in the tree.
      shardings: a `Sharding` for each; None: the default device.
    """
    key = jax.random.key(seed, impl="threefry2x32")
    leaves, tree = jax.tree.flatten_with_path(abstract_parameters(config))
    places = jax.tree.leaves(shardings) if shardings else [None] * len(leaves)
    values = []
    for i, ((path, leaf), place) in enumerate(zip(leaves, places, strict=True)):
        kind = initial_kind(path[-1].key, leaf.ndim)
        std = config.init_std if kind == "normal" else 0.0
        values.append(_initializer(leaf.shape, leaf.dtype, kind, std, place)(jax.random.fold_in(key, i)))
    return jax.tree.unflatten(tree, values)


def initial_value(name: str, leaf: jax.ShapeDtypeStruct, init_std: float, rng: np.random.Generator) -> np.ndarray:
    """One fresh parameter of such a name, shape and dtype, to go with others that are there already."""
    kind = initial_kind(name, len(leaf.shape))
    if kind == "normal":
        return (init_std * np.clip(rng.standard_normal(leaf.shape), -3, 3)).astype(leaf.dtype)
    return np.full(leaf.shape, _CONSTANTS[kind], leaf.dtype)


_CONSTANTS = {"ones": 1.0, "zeros": 0.0, "scale": COSINE_SCALE[0]}


def initial_kind(name: str, dimensions: int) -> str:
    """How a parameter of this name begins: `normal`, `ones`, `zeros`, `range`, or `scale` of a cosine gate."""
    if name.endswith("_bias"):
        return "zeros"
    named = {"order": "range", "gate_scale": "scale"}
    return named.get(name, "normal" if dimensions > 1 else "ones")


@functools.cache
def _initializer(shape: tuple[int, ...], dtype: Any, kind: str, std: float, sharding: Any) -> Callable[..., jax.Array]:
    """Compiled once a shape: a threefry draw costs XLA's CPU backend a second, and layers repeat shapes."""

    def init(key: jax.Array) -> jax.Array:
        if kind == "normal":
            return jax.random.truncated_normal(key, -3, 3, shape, dtype) * jnp.asarray(std, dtype)
        if kind == "range":
            return jnp.arange(shape[0], dtype=dtype)
        return jnp.full(shape, _CONSTANTS[kind], dtype)

    return jax.jit(init, out_shardings=sharding)

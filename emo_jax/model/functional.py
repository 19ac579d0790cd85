"""NNX modules seen as functions of a plain nested dict of parameters; the module graph is static."""

import dataclasses
import functools
import json
from typing import Any

import jax
from flax import nnx

from emo_jax.model.config import ModelConfig
from emo_jax.model.transformer import Transformer

Parameters = dict[str, Any]
"""Nested dict of arrays, such as params["layers"]["00"]["moe"]["router"]."""


@functools.cache
def _split(config_json: str) -> tuple[nnx.GraphDef, nnx.State]:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(config_json).items()}
    config = ModelConfig(**values)
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))


def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return _split(json.dumps(dataclasses.asdict(config)))  # configs are mutable, so not hashable themselves


def bind(config: ModelConfig, params: Parameters) -> Transformer:
    """The module with these parameters; free, so it belongs inside a jitted function."""
    return nnx.merge(_abstract(config)[0], params)


def abstract_parameters(config: ModelConfig) -> Parameters:
    """Shapes and dtypes of the parameters, without making any."""
    return nnx.to_pure_dict(_abstract(config)[1])


def logical_axes(config: ModelConfig) -> Parameters:
    """A `PartitionSpec` of logical axis names for each parameter."""
    return nnx.to_pure_dict(nnx.get_partition_spec(_abstract(config)[1]))


def init_parameters(config: ModelConfig, seed: int, shardings: Parameters | None = None) -> Parameters:
    """Random initial parameters, made where they live.

    Args:
      config: of the model.
      seed: one threefry key for all of them, split by NNX in the order of definition.
      shardings: a `Sharding` for each; None: the default device.
    """

    def init(key: jax.Array) -> Parameters:
        return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(params=key)), nnx.Param))

    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed, impl="threefry2x32"))

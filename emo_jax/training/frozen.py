"""What is trained while all else stays as it is: the chosen experts of each mixture layer, and their router columns.

They are cut out before the gradient and the optimizer see them, so that neither has room for anything else.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from emo_jax.config import OptimizerConfig, expert_lists
from emo_jax.model import mixture_layers


def trained(config: OptimizerConfig, params: Any) -> Any:
    """The part of the parameters that is trained: all of them, unless the config names experts.

    Args:
      config: its `trainable_experts` is read.
      params: nested dict of arrays.

    Returns:
      `params` itself, or the chosen experts alone at the same places of a smaller nested dict.
    """
    return _chosen(config, params, lambda leaf, experts, axis: leaf.take(experts, axis=axis))


def with_trained(config: OptimizerConfig, params: Any, part: Any) -> Any:
    """The parameters with `part`, which `trained` cut out, put back at its place."""
    if not config.trainable_experts:
        return part
    layers = dict(params["layers"])
    for (name, new), experts in zip(part["layers"].items(), _experts(config), strict=True):
        moe = layers[name]["moe"]
        router = moe["router"].at[:, experts].set(new["moe"]["router"])
        routed = {key: leaf.at[experts].set(new["moe"]["routed"][key]) for key, leaf in moe["routed"].items()}
        layers[name] = layers[name] | {"moe": moe | {"router": router, "routed": routed}}
    return params | {"layers": layers}


def trained_shardings(config: OptimizerConfig, shardings: Any) -> Any:
    """Where each array of `trained` lives, given where the parameters do: a few experts are not split by expert."""

    def unsplit(sharding: NamedSharding, experts: np.ndarray, axis: int) -> NamedSharding:
        axes = list(sharding.spec) + [None] * (axis + 1 - len(sharding.spec))
        axes[axis] = None
        return NamedSharding(sharding.mesh, PartitionSpec(*axes))

    return _chosen(config, shardings, unsplit)


def _chosen(config: OptimizerConfig, tree: Any, pick: Callable[[Any, np.ndarray, int], Any]) -> Any:
    if not config.trainable_experts:
        return tree
    layers = {}
    for name, experts in zip(mixture_layers(tree), _experts(config), strict=True):
        moe = tree["layers"][name]["moe"]
        routed = {key: pick(leaf, experts, 0) for key, leaf in moe["routed"].items()}
        layers[name] = {"moe": {"router": pick(moe["router"], experts, 1), "routed": routed}}
    return {"layers": layers}


def _experts(config: OptimizerConfig) -> list[np.ndarray]:
    lists = expert_lists("optimizer.trainable_experts", config.trainable_experts)
    return [np.array(experts, np.int32) for experts in lists]

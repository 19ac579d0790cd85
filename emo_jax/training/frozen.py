"""What is trained while all else stays as it is: all, the chosen experts of mixture layers, or what LoRA may change.

It is cut out before the gradient and the optimizer see it, so that neither has room for anything else.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from emo_jax.config import LORA_TARGETS, OptimizerConfig, expert_lists
from emo_jax.model import mixture_layers

_NUMBERS = ("order",)
"""Parameters that are whole numbers (where neurons of a split layer were), so without a gradient."""

_WITH_LORA = ("classifier", "classifier_bias", "pooler", "pooler_bias")
_GATE_WITH_LORA = ("gate_projection", "gate_experts", "gate_scale")
"""What LoRA trains as a whole, at the top and in a split layer: small, and fresh for most tasks."""


def trained(config: OptimizerConfig, params: Any) -> Any:
    """The part of the parameters that is trained: all that are not whole numbers, unless the config wants less.

    Args:
      config: its `trainable_experts`, `lora_rank` and `lora_targets` are read.
      params: nested dict of arrays, or of anything else where no experts are named.

    Returns:
      `params` itself where that is all of them, or else a smaller nested dict: of the chosen experts and their router
      columns, or of what LoRA changes.
    """
    if config.trainable_experts:
        return _chosen(config, params, lambda leaf, experts, axis: leaf.take(experts, axis=axis))
    return select(params, lambda path: _is_trained(config, path))


def with_trained(config: OptimizerConfig, params: Any, part: Any) -> Any:
    """The parameters with `part`, which `trained` cut out, put back at its place."""
    if not config.trainable_experts:
        return overlay(params, part)
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

    return _chosen(config, shardings, unsplit) if config.trainable_experts else trained(config, shardings)


def is_factored(config: OptimizerConfig, path: tuple[str, ...]) -> bool:
    """Whether LoRA trains factors of the parameter at this path, as in ("layers", "00", "attention", "query")."""
    if not config.lora_rank or len(path) != 4 or path[-1] not in config.lora_targets:
        return False
    return path[-1] in LORA_TARGETS.get(path[2], ())


def select(tree: Any, keep: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()) -> Any:
    """A nested dict with those leaves alone whose path `keep` wants; itself where it wants all."""
    kept = {}
    for name, node in tree.items():
        here = (*path, name)
        if isinstance(node, dict):
            node = select(node, keep, here)
            wanted = bool(node)
        else:
            wanted = keep(here)
        if wanted:
            kept[name] = node
    whole = len(kept) == len(tree) and all(kept[name] is tree[name] for name in kept)
    return tree if whole else kept


def overlay(tree: Any, part: Any) -> Any:
    """A nested dict with the leaves of a smaller one in place of its own."""
    if not (isinstance(tree, dict) and isinstance(part, dict)):
        return part
    return tree | {name: overlay(tree[name], node) for name, node in part.items()}


def _is_trained(config: OptimizerConfig, path: tuple[str, ...]) -> bool:
    if not config.lora_rank:
        return path[-1] not in _NUMBERS
    whole = path[0] in _WITH_LORA or (path[-2:-1] == ("ffn",) and path[-1] in _GATE_WITH_LORA)
    return whole or is_factored(config, path)


def _chosen(config: OptimizerConfig, tree: Any, pick: Callable[[Any, np.ndarray, int], Any]) -> Any:
    layers = {}
    for name, experts in zip(mixture_layers(tree), _experts(config), strict=True):
        moe = tree["layers"][name]["moe"]
        routed = {key: pick(leaf, experts, 0) for key, leaf in moe["routed"].items()}
        layers[name] = {"moe": {"router": pick(moe["router"], experts, 1), "routed": routed}}
    return {"layers": layers}


def _experts(config: OptimizerConfig) -> list[np.ndarray]:
    lists = expert_lists("optimizer.trainable_experts", config.trainable_experts)
    return [np.array(experts, np.int32) for experts in lists]

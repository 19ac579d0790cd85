"""Dense layers split into emergent experts, and merged back (EMoE, arXiv 2310.10908), a parameter at a time.

A split lays the neurons of a layer down expert by expert and changes no value; a merge puts them back where they were.

Letters: D model, F hidden, N experts.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from emo_jax.errors import require
from emo_jax.model import ModelConfig, abstract_parameters
from emo_jax.model.functional import LeafPath, initial_value, leaf_at, leaf_path
from emo_jax.modularity.clustering import Coactivation, cohesion, neuron_order

Orders = dict[int, np.ndarray]
"""Of each split layer: which neuron of the dense layer stands at each place, int32 [F]."""

_NEURON_AXIS = {"gate": 1, "up": 1, "down": 0, "gate_bias": 0, "up_bias": 0}
"""Of a feed-forward's parameters, the axis that its neurons lie along."""


def split_config(
    config: ModelConfig,
    *,
    layers: Sequence[int],
    experts: int,
    top_k: int,
    gate: str = "average_key",
    copies: bool = False,
) -> ModelConfig:
    """The config of a dense model with some of its layers split.

    Args:
      config: of the dense model.
      layers: which.
      experts: N.
      top_k: experts that a token uses.
      gate, copies: see `ModelConfig.split_gate` and `ModelConfig.split_copies`.

    Raises:
      UserError: the model is not dense or split already, or a field cannot work.
    """
    require(
        not config.split_layers,
        f"The model is split already (model.split_layers={config.split_layers}); merge it first.",
    )
    require(bool(layers), "--layers names no layer to split.")
    split = dataclasses.replace(
        config,
        split_layers=tuple(sorted(set(layers))),
        split_experts=experts,
        split_top_k=top_k,
        split_gate=gate,
        split_copies=copies,
    )
    split.validate()
    return split


def merged_config(config: ModelConfig) -> ModelConfig:
    """The config of the dense model that a split one is made of.

    Raises:
      UserError: the model is not split, or its experts are copies.
    """
    require(bool(config.split_layers), "The model has no split layers (model.split_layers=()): nothing to merge.")
    require(
        not config.split_copies,
        "The experts are whole copies of a feed-forward (model.split_copies=True), which have gone different ways: no "
        "dense layer of the old width computes what they do.",
    )
    names = (f.name for f in dataclasses.fields(ModelConfig) if f.name.startswith("split_"))
    return dataclasses.replace(config, **{name: getattr(ModelConfig, name) for name in names})


def key_path(config: ModelConfig, layer: int) -> LeafPath:
    """The parameter whose columns are the keys of a layer's neurons."""
    return ("layers", f"{layer:02d}", "ffn", "gate" if config.feed_forward == "swiglu" else "up")


def neuron_orders(
    config: ModelConfig,
    read: Callable[[LeafPath], np.ndarray],
    method: str,
    *,
    seed: int = 0,
    firing: dict[int, Coactivation] | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> Orders:
    """Which neurons make up which expert, in each split layer.

    Args:
      config: from `split_config`, not of copies.
      read: a parameter of the dense model by its path.
      method: see `clustering.neuron_order`.
      seed: of clustering and of `random`.
      firing: of each layer, for `coactivation`.
      log: receives what is found in each layer.
    """
    orders = {}
    for layer in config.split_layers:
        keys_FD = read(key_path(config, layer)).astype(np.float32).T
        own_seed = seed + layer if method == "random" else seed  # layers do not share a permutation
        together = None if firing is None else firing[layer]
        order_F = neuron_order(method, keys_FD, config.split_experts, firing=together, seed=own_seed)
        ours, any_two = (cohesion(keys_FD, order_F, groups) for groups in (config.split_experts, 1))
        log(f"layer {layer}: mean cosine of two keys of an expert {ours:.3f}, of any two {any_two:.3f}")
        orders[layer] = order_F
    return orders


def split_leaf(config: ModelConfig, path: LeafPath, leaf: np.ndarray, orders: Orders) -> np.ndarray:
    """A parameter of the dense model as the split one has it.

    Args:
      config: from `split_config`.
      path: of the parameter.
      leaf: the parameter.
      orders: from `neuron_orders`; unused with copies.
    """
    axis = _neurons(config, path)
    if axis is None:
        return leaf
    if config.split_copies:
        return np.concatenate([leaf] * config.split_experts, axis)
    return leaf.take(orders[int(path[1])], axis)


def added_leaves(config: ModelConfig, orders: Orders, seed: int = 0) -> Iterator[tuple[LeafPath, np.ndarray]]:
    """The parameters that a split model has beside those of the dense one: orders, and learned gates as they begin."""
    rng = np.random.default_rng(seed)
    abstract = abstract_parameters(config)
    for layer in config.split_layers:
        here = ("layers", f"{layer:02d}", "ffn")
        if not config.split_copies:
            yield (*here, "order"), orders[layer].astype(np.int32)
        for name, leaf in abstract["layers"][here[1]]["ffn"].items():
            if name.startswith("gate_") and name != "gate_bias":
                yield (*here, name), initial_value(name, leaf, config.init_std, rng)


def merge_leaf(config: ModelConfig, path: LeafPath, leaf: np.ndarray, orders: Orders) -> np.ndarray:
    """A parameter of a split model as the dense one has it: the inverse of `split_leaf`.

    Args:
      config: of the split model.
      path: of the parameter, one that the dense model has.
      leaf: the parameter.
      orders: the `order` of each split layer.
    """
    axis = _neurons(config, path)
    return leaf if axis is None else leaf.take(np.argsort(orders[int(path[1])]), axis)


def split(config: ModelConfig, params: Any, orders: Orders, seed: int = 0) -> Any:
    """The parameters of a split model, from those of the dense one.

    Args:
      config: from `split_config`.
      params: nested dict of arrays.
      orders: from `neuron_orders`.
      seed: of a learned gate.
    """
    made = jax.tree.map_with_path(
        lambda keys, leaf: split_leaf(config, leaf_path(keys), np.asarray(leaf), orders), params
    )
    for path, leaf in added_leaves(config, orders, seed):
        made["layers"][path[1]]["ffn"][path[-1]] = leaf
    return made


def merge(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """Config and parameters of the dense model whose parts the split one's experts are.

    Each neuron has the weights that it has there; without fine-tuning those of the model that was split, bit for bit.

    Raises:
      UserError: as `merged_config`.
    """
    dense = merged_config(config)
    orders = {i: np.asarray(params["layers"][f"{i:02d}"]["ffn"]["order"]) for i in config.split_layers}

    def put_back(keys: Any, abstract: Any) -> np.ndarray:
        path = leaf_path(keys)
        return merge_leaf(config, path, np.asarray(leaf_at(params, path)), orders)

    return dense, jax.tree.map_with_path(put_back, abstract_parameters(dense))


def _neurons(config: ModelConfig, path: LeafPath) -> int | None:
    """The axis that the neurons of a split layer lie along in a parameter; None where it has none."""
    if len(path) != 4 or path[2] != "ffn" or int(path[1]) not in config.split_layers:
        return None
    return _NEURON_AXIS.get(path[3])

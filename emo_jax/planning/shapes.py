"""The sizes that the formulas of a step's cost are made of, from a config and a mesh: nothing is traced or compiled.

Letters: T tokens of a device in a microbatch, D width, E experts, R routed, C choices, F expert hidden, H heads, N head
width, V vocabulary, L layers, X ranks of the expert axis, M rows of experts' inputs in a chunk.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from emo_jax.config import Config
from emo_jax.parallel.config import AXES
from emo_jax.parallel.exchange import best_exchange, buffer_size, expert_slots
from emo_jax.training.step import abstract_state

LANES = 128
"""Of a TPU's vectors: arrays whose last axis is shorter are filled up to it."""


class _Leaf(NamedTuple):
    """Parameters alike: the first part of their name, whether they are routed experts, shape, place, and how many."""

    name: str
    routed: bool
    shape: tuple[int, ...]
    spec: PartitionSpec
    elements: int
    number: int


class _State(NamedTuple):
    """Of a device: bytes of all state and of the parameters in it, the parameters, and how many the model has."""

    held: float
    parameters: float
    leaves: list[_Leaf]
    total: int


@functools.lru_cache(maxsize=512)
def _state(run: str, sizes: tuple[int, ...]) -> _State:
    config = Config.from_json(run)
    mesh: Any = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    state = abstract_state(config, mesh)
    leaves = collections.Counter[_Leaf]()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        elements = math.prod(leaf.sharding.shard_shape(leaf.shape))
        name, routed = path[0].key, any(key.key == "routed" for key in path)
        leaves[_Leaf(name, routed, leaf.shape, leaf.sharding.spec, elements, 1)] += 1
    return _State(
        sum(map(_shard_bytes, jax.tree.leaves(state))),
        sum(map(_shard_bytes, jax.tree.leaves(state.params))),
        [leaf._replace(number=number) for leaf, number in leaves.items()],
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)),
    )


class Shapes:
    """The sizes that formulas are made of; byte counts are of one device, and of one microbatch where tokens matter."""

    def __init__(self, run: Config, sizes: Mapping[str, int]):
        self.run, self.model, self.sizes = run, run.model, dict(sizes)
        model, mesh = run.model, run.mesh
        plain = dataclasses.replace(run, model=dataclasses.replace(model, remat="none"))
        placed = dataclasses.replace(Config(), model=plain.model, optimizer=run.optimizer).to_json()
        self.state = _state(placed, tuple(sizes[axis] for axis in AXES))
        self.microbatches = run.train.microbatches
        self.rows = run.data.batch_size // self.microbatches // (sizes["data"] * sizes["fsdp"] * sizes["expert"])
        self.tokens = self.rows * run.data.sequence_length // sizes["context"]
        self.width = {"bfloat16": 2, "float32": 4, "float64": 8}[model.dtype]
        self.wide = max(self.width, 4)
        self.ranks, self.shards = sizes["expert"], sizes["fsdp"] * sizes["expert"] * sizes["context"]
        self.spread = math.prod(sizes.values()) > 1
        # A microbatch more than one goes through the whole forward pass first, for the loss of the whole step.
        self.twice = self.microbatches > 1 and run.balance.scope == "global"
        remat = model.remat
        self.recomputed = remat in ("exchange", "full")  # dense products
        self.experts_recomputed = remat != "none" or mesh.chunks > 1
        self.exchanged_again = self.ranks > 1 and remat in ("dots", "full")
        self.chunks = mesh.chunks
        self.choices = self.tokens * model.num_choices // self.chunks if model.routed_experts else 0
        self.kind = "here"
        self.buffer = self.choices
        if self.ranks > 1 and model.routed_experts:
            self.buffer = buffer_size(self.choices, self.ranks, mesh.buffer)
            auto = best_exchange(self.ranks, model.num_choices)
            self.kind = auto if mesh.exchange == "auto" else mesh.exchange
        self.hidden = self.tokens * model.d_model * self.width  # a residual stream
        self.heads = (2 * model.num_heads + 2 * model.kv_heads) * model.head_dim  # queries, keys, values and results

    def ffn_width(self, experts: int) -> int:
        """Hidden width of what every token uses of a layer's feed-forward."""
        return self.model.num_shared_experts * self.model.d_expert if experts else self.model.d_dense

    def expert_weights(self, experts: int) -> float:
        """Bytes of the routed experts that this rank computes, in the dtype of products."""
        routed = experts - self.model.num_shared_experts
        slots = expert_slots(routed, self.ranks, self.shards) if self.spread else routed
        return slots // self.ranks * 3 * self.model.d_model * self.model.d_expert * self.width

    def expert_rows(self) -> float:
        """Bytes of a chunk's rows in expert order."""
        return self.buffer * self.model.d_model * self.width

    def ring_rows(self) -> float:
        """Bytes of a chunk's tokens of all ranks."""
        return self.ranks * self.tokens // self.chunks * self.model.d_model * self.width

    @property
    def attention_weights(self) -> int:
        """Parameters of one layer's attention."""
        return 2 * self.model.d_model * (self.model.num_heads + self.model.kv_heads) * self.model.head_dim


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

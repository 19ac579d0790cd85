"""The sizes that the formulas of a step's cost are made of, from a config and a mesh: nothing is traced or compiled.

Letters: T tokens of a device in a microbatch, D width, E experts, R routed, C choices, F hidden of an expert or a dense
layer, H heads, N head width, V vocabulary (of a classifier its labels), L layers, X ranks of the expert axis, M rows of
experts' inputs in a chunk.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from emo_jax.config import Config
from emo_jax.model import ModelConfig
from emo_jax.model.emergent import COSINE_WIDTH
from emo_jax.model.functional import leaf_path
from emo_jax.parallel.config import AXES
from emo_jax.parallel.exchange import best_exchange, buffer_size, expert_slots
from emo_jax.training.frozen import trained, trained_shardings
from emo_jax.training.step import abstract_state

LANES = 128
"""Of a TPU's vectors: arrays whose last axis is shorter are filled up to it."""
TABLES = ("embedding", "position_embedding", "token_type_embedding")
"""Parameters whose rows are looked up."""

Path = tuple[str, ...]
"""Of a parameter, such as ("layers", "00", "attention", "query")."""


class _Leaf(NamedTuple):
    """Parameters alike.

    Attributes:
      name: the first part of theirs.
      routed, learned: whether they are routed experts, and trained.
      reached: whether there is a backward pass through their layer.
      shape, spec: of the whole array, and how it rests.
      elements: that a device has of it.
      number: of such arrays.
    """

    name: str
    routed: bool
    learned: bool
    reached: bool
    shape: tuple[int, ...]
    spec: PartitionSpec
    elements: int
    number: int


class _State(NamedTuple):
    """Of a device and a run.

    Attributes:
      held: bytes of all state.
      parameters: bytes of the parameters in it.
      gradients: bytes of those that are trained, by the first part of their name.
      leaves: the parameters.
      learned: paths of those that are trained.
      first: of these in `_order`; no backward pass goes further back.
    """

    held: float
    parameters: float
    gradients: dict[str, float]
    leaves: list[_Leaf]
    learned: frozenset[Path]
    first: tuple[int, int]


def _order(path: Path) -> tuple[int, int]:
    """When a token meets a parameter: its layer, and within it attention's inputs, its output, what follows, `down`."""
    if path[0] != "layers":
        return (-1, 0) if path[0] in TABLES else (10**6, int(path[0] in ("head", "classifier")))
    if "attention" in path[2]:
        return int(path[1]), int(path[-1] == "out")
    return int(path[1]), 3 if path[-1] in ("down", "gate_experts") and "shared" not in path else 2


@functools.lru_cache(maxsize=512)
def _state(run: str, sizes: tuple[int, ...]) -> _State:
    config = Config.from_json(run)
    mesh: Any = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    state = abstract_state(config, mesh)
    part = jax.eval_shape(functools.partial(trained, config.optimizer), state.params)
    shardings = trained_shardings(config.optimizer, jax.tree.map(lambda leaf: leaf.sharding, state.params))
    gradients = collections.Counter[str]()
    for (path, leaf), sharding in zip(jax.tree.leaves_with_path(part), jax.tree.leaves(shardings), strict=True):
        gradients[path[0].key] += _bytes(leaf, sharding)
    learned = frozenset(leaf_path(keys) for keys, _ in jax.tree.leaves_with_path(part))
    first = min(map(_order, learned))
    leaves = collections.Counter[_Leaf]()
    for keys, leaf in jax.tree.leaves_with_path(state.params):
        path = leaf_path(keys)
        elements = math.prod(leaf.sharding.shard_shape(leaf.shape))
        kind = (path[0], "routed" in path, path in learned, first[0] <= _order(path)[0])
        leaves[_Leaf(*kind, leaf.shape, leaf.sharding.spec, elements, 1)] += 1
    return _State(
        sum(_bytes(leaf, leaf.sharding) for leaf in jax.tree.leaves(state)),
        sum(_bytes(leaf, leaf.sharding) for leaf in jax.tree.leaves(state.params)),
        dict(gradients),
        [leaf._replace(number=number) for leaf, number in leaves.items()],
        learned,
        first,
    )


class Product(NamedTuple):
    """Of a token with a weight.

    Attributes:
      part: of the model.
      layer: its place; −1 for what lies outside.
      elements: of the weight.
      needed: products of this size a step: forward, its input's gradient, the weight's.
      passes: these and what is computed again.
    """

    part: str
    layer: int
    elements: int
    needed: int
    passes: int


def dispatches(model: ModelConfig) -> bool:
    """Whether tokens go to experts of their own: to those of mixtures, while those of a split layer stay in place."""
    return any(model.layer_experts)


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
        self.dispatches = dispatches(model)
        # A microbatch more than one goes through the whole forward pass first, for the loss of the whole step.
        self.twice = self.microbatches > 1 and run.balance.scope == "global"
        remat = model.remat
        self.recomputed = remat in ("exchange", "full")  # dense products
        self.experts_recomputed = remat != "none" or mesh.chunks > 1
        self.exchanged_again = self.ranks > 1 and remat in ("dots", "full")
        self.chunks = mesh.chunks
        self.choices = self.tokens * model.num_choices // self.chunks if self.dispatches else 0
        self.kind = "here"
        self.buffer = self.choices
        if self.ranks > 1 and self.dispatches:
            self.buffer = buffer_size(self.choices, self.ranks, mesh.buffer)
            auto = best_exchange(self.ranks, model.num_choices)
            self.kind = auto if mesh.exchange == "auto" else mesh.exchange
        self.hidden = self.tokens * model.d_model * self.width  # a residual stream
        self.heads = (2 * model.num_heads + 2 * model.kv_heads) * model.head_dim  # queries, keys, values and results
        self.outputs = len(model.labels) or model.vocab_size
        self.matrices = 3 if model.feed_forward == "swiglu" else 2
        self.tables = model.d_model * (model.vocab_size + model.max_positions + model.token_types)  # looked up
        learned, tied = self.state.gradients, model.tied_embeddings and not model.labels
        self.learns_tables = "embedding" in learned
        self.learns_head = "classifier" in learned if model.labels else ("embedding" if tied else "head") in learned
        self.learns_all = not (run.optimizer.lora_rank or run.optimizer.trainable_experts)
        self.products = list(self._products())

    def _products(self) -> Iterator[Product]:
        """Every product with a weight: those of routed experts for a row of theirs, all others for a token."""
        model, d, learned, first = self.model, self.model.d_model, self.state.learned, self.state.first

        def product(part: str, path: Path, elements: int, again: bool = False, weight: Path | None = None) -> Product:
            """`again`: whether a layer that keeps only its input computes it again; `weight`: its name elsewhere."""
            order, layer = _order(path), int(path[1]) if path[0] == "layers" else -1
            onward = first < order or "routed" in path  # whose gradients are computed together
            again = again and (onward if "shared" in path else first[0] <= order[0])
            needed = 1 + onward + ((weight or path) in learned)
            return Product(part, layer, elements, needed, needed + self.twice + again)

        for i, experts in enumerate(model.layer_experts):
            attention, ffn, moe = (("layers", f"{i:02d}", name) for name in ("attention", "ffn", "moe"))
            for name in ("query", "key", "value", "out"):
                heads = model.kv_heads if name in ("key", "value") else model.num_heads
                yield product("attention", (*attention, name), d * heads * model.head_dim, self.recomputed)
            width, own = d * self.ffn_width(i), (*moe, "shared") if experts else ffn
            # A norm of what `down` returns needs it; else only what comes before is computed again.
            down = self.recomputed and model.norm_placement != "pre"
            for name in ("gate", "up", "down") if self.matrices == 3 else ("up", "down"):
                again = down if name == "down" else self.recomputed
                yield product("dense feed-forward", (*own, name), width, again)
            if experts:
                router = d * (experts - model.num_shared_experts)
                yield product("router", (*moe, "router"), router, model.remat == "full")
                for name in ("gate", "up", "down"):
                    again = self.experts_recomputed and name != "down"
                    yield product("experts' products", (*moe, "routed", name), d * model.d_expert, again)
            elif i in model.split_layers:
                columns = min(COSINE_WIDTH, d) if model.split_gate == "cosine" else model.split_experts
                yield product("router", (*ffn, "gate_projection"), d * columns, self.recomputed)
                if model.split_gate == "cosine":
                    yield product("router", (*ffn, "gate_experts"), columns * model.split_experts, self.recomputed)
        if model.labels:
            if not model.causal:
                yield product("loss", ("pooler",), d * d)
            yield product("loss", ("classifier",), d * self.outputs)
        else:
            tied = ("embedding",) if model.tied_embeddings else None
            yield product("loss", ("head",), d * self.outputs, weight=tied)

    def learns_down(self, layer: int) -> bool:
        """Whether the last product of what every token uses of a feed-forward has a weight that is trained."""
        own = ("moe", "shared") if self.model.layer_experts[layer] else ("ffn",)
        return ("layers", f"{layer:02d}", *own, "down") in self.state.learned

    def learns_factors(self, layer: int) -> bool:
        """Whether hidden neurons have a factor with a gradient: those of a split layer with a learned gate."""
        return layer in self.model.split_layers and self.model.split_gate == "cosine"

    def attends_back(self, layer: int) -> bool:
        """Whether there is a backward pass through a layer's attention."""
        return self.state.first <= (layer, 0)

    def ffn_width(self, layer: int) -> int:
        """Hidden width of what every token computes of a layer's feed-forward."""
        if self.model.layer_experts[layer]:
            return self.model.num_shared_experts * self.model.d_expert
        return self.model.feed_forward_width(layer)

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


def _bytes(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

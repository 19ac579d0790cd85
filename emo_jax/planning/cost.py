"""What a training step costs each device, by formulas over shapes: nothing is traced or compiled.

The formulas follow the program: which products a remat policy computes again, which arrays live at once in each phase
of the backward pass, what each exchange sends. How many arrays of a kind a compiler holds at once was counted in
compiled programs (`benchmarks/planning.py points` compares).

Letters: T tokens of a device in a microbatch, D width, E experts, R routed, C choices, F expert hidden, H heads, N head
width, V vocabulary, L layers, X ranks of the expert axis, M rows of experts' inputs in a chunk.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from emo_jax.config import Config
from emo_jax.model import flops_per_token
from emo_jax.model.cross_entropy import CHUNK
from emo_jax.parallel.config import AXES
from emo_jax.parallel.exchange import UNROLL, best_exchange, buffer_size, expert_slots
from emo_jax.parallel.sharding import mesh_axes
from emo_jax.training.step import abstract_state

LANES = 128
"""Of a TPU's vectors: arrays whose last axis is shorter are filled up to it."""


class Flops(NamedTuple):
    """Of one device and step.

    Attributes:
      model: forward and backward pass without recomputation, as `flops_per_token` counts them.
      dense: products with weights that every token uses, those computed again among them; the router's once.
      router: those of `dense` that are float32, at six bfloat16 products each on a TPU.
      grouped: products of routed experts over the rows of their buffers, full or not.
      filled: the part of `grouped` that has tokens.
      attention: scores and their sums, in whole blocks of the kernel.
    """

    model: float
    dense: float
    router: float
    grouped: float
    filled: float
    attention: float


class Memory(NamedTuple):
    """Bytes of one device.

    Attributes:
      arguments: parameters, moments and batch; a step's results replace them.
      temporaries: what else lives at the fullest moment.
      phase: which moment that is.
      parts: of the temporaries then, by name.
    """

    arguments: float
    temporaries: float
    phase: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Arguments and temporaries."""
        return self.arguments + self.temporaries


class Work(NamedTuple):
    """FLOPs of a part of the model, and bytes that it moves to and from HBM."""

    flops: float
    traffic: float


class Cost(NamedTuple):
    """Of one device and step.

    Attributes:
      tokens: that the device is given.
      flops, memory: see there.
      work: by part of the model, as a TPU computes it: a float32 product is six of bfloat16.
      sent: bytes out of the device by (kind of collective, mesh axes).
    """

    tokens: int
    flops: Flops
    memory: Memory
    work: dict[str, Work]
    sent: dict[tuple[str, tuple[str, ...]], float]


def estimate(run: Config, sizes: Mapping[str, int]) -> Cost:
    """The cost of a step of `run` on a mesh of these axis sizes, for TPUs and GPUs alike."""
    shapes = _Shapes(run, sizes)
    tokens = shapes.tokens * run.train.microbatches
    flops = _flops(shapes)
    return Cost(tokens, flops, _memory(shapes), _work(shapes, flops), _sent(shapes))


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


class _Shapes:
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


def _flops(s: _Shapes) -> Flops:
    model, tokens = s.model, s.tokens * s.microbatches
    d = model.d_model
    again, extra = 2 * s.recomputed, 2 * s.twice
    dense = (6 + extra) * d * model.vocab_size
    router = grouped = attention = 0.0
    for experts in model.layer_experts:
        ffn = s.ffn_width(experts) * d
        dense += (6 + again + extra) * (s.attention_weights + 2 * ffn) + (6 + extra) * ffn
        if experts:
            router += (6 + 2 * (model.remat == "full") + extra) * d * (experts - model.num_shared_experts)
            grouped += (18 + 4 * s.experts_recomputed + 3 * extra) * d * model.d_expert
        # Two products forward, five backward; a row's queries meet the keys of whole blocks.
        length = s.run.data.sequence_length
        met = (length + min(length, 1024)) / 2
        attention += (7 + 2 * (model.remat != "none") + extra) * 2 * met * model.num_heads * model.head_dim
    rows = s.buffer * s.chunks * s.microbatches
    return Flops(
        flops_per_token(model, s.run.data.sequence_length) * tokens,
        (dense + router) * tokens,
        router * tokens,
        grouped * rows,
        grouped * tokens * model.num_choices if model.routed_experts else 0.0,
        attention * tokens,
    )


def _memory(s: _Shapes) -> Memory:
    model, wide = s.model, s.wide
    gradients = s.state.parameters
    batch = s.rows * s.microbatches * s.run.data.sequence_length // s.sizes["context"] * (4 * 4 + 1)

    layers = model.num_layers
    kept = [_kept(s, experts) for experts in model.layer_experts]
    saved = sum(kept) + s.hidden
    head = model.d_model * model.vocab_size
    logits = min(CHUNK, s.tokens) * model.vocab_size * wide
    always = {}
    if s.microbatches > 1:
        # Sums of gradients, and parameters cast once before the loop over microbatches.
        always = {"summed gradients": gradients, "cast parameters": gradients * s.width / wide}
    loss = {
        "kept for the backward pass": saved,
        "head and its gradient": head * (s.width + wide),
        "logits": logits,
        "residual streams": 2 * s.hidden,
    }
    last, first = (_layer(s, model.layer_experts[i]) for i in (-1, 0))
    share = head / s.state.total
    forward = {
        "kept for the backward pass": saved,
        "head and its gradient": head * (s.width + wide),
        **_experts_forward(s, model.layer_experts[-1]),
    }
    end = {
        "kept for the backward pass": kept[0] + s.hidden,
        "gradients": gradients * (1 - share - (1 - 2 * share) / layers),
        **first,
    }
    if s.microbatches > 1:
        end["gradient of the embedding"] = head * wide
    phases = {
        "the last layer's forward pass": forward,
        "the loss": loss,
        "the last layer's backward pass": {"kept for the backward pass": saved, **last},
        "the first layer's backward pass": end,
        "the embedding's gradient": {
            "gradients": gradients,
            "gradient of the embedding": head * wide,
            "residual streams": s.hidden,
        },
    }
    # What an allocator cannot fill between arrays of many sizes: about half of the largest one.
    always["gaps"] = head * wide / 2
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = always | phases[phase]
    return Memory(s.state.held + batch, sum(parts.values()), phase, parts)


def _kept(s: _Shapes, experts: int) -> float:
    """Bytes of one layer that the backward pass finds."""
    model, t, d = s.model, s.tokens, s.model.d_model
    kept: float = s.hidden
    if model.remat == "none":
        # Queries, keys, values, what attention returns, norms in float32 and gated hidden layers.
        heads = (2 * model.num_heads + 2 * model.kv_heads) * model.head_dim
        kept += t * (heads * s.width + model.num_heads * LANES * 4 + 4 * d * s.wide + 2 * d * s.width)
        kept += 5 * t * s.ffn_width(experts) * s.width
    elif model.remat == "dots":
        heads = (model.num_heads + 2 * model.kv_heads) * model.head_dim
        kept += t * (heads + d + 2 * s.ffn_width(experts) + d) * s.width
    if not experts:
        return kept
    routed = experts - model.num_shared_experts
    if model.remat == "none":
        kept += t * (4 + model.num_choices) * max(routed, LANES) * 4
        if s.chunks == 1:  # several chunks compute their products again
            kept += s.buffer * (3 * model.d_expert + (d if s.ranks == 1 else 0)) * s.width
    elif model.remat == "dots":
        kept += t * max(routed, LANES) * 4
    if s.ranks > 1 and model.remat in ("none", "exchange"):
        arrived = s.tokens * s.ranks * d if s.kind == "ring" else s.chunks * s.buffer * d
        kept += arrived * s.width
        kept += s.hidden if model.remat == "none" else 0
    return kept + 2 * t * model.num_choices * 4


def _layer(s: _Shapes, experts: int) -> dict[str, float]:
    """Bytes that live at once in one layer's backward pass, beside what was kept for it."""
    model, t, d = s.model, s.tokens, s.model.d_model
    parts: dict[str, float] = {
        "residual streams": (4 if s.recomputed else 2) * s.hidden,
        "dense weights": (s.attention_weights + 3 * d * s.ffn_width(experts)) * s.width,
    }
    if s.recomputed:
        heads = (2 * model.num_heads + 2 * model.kv_heads) * model.head_dim * s.width
        parts["attention"] = t * (heads + model.num_heads * LANES * 4)
        parts["dense feed-forward"] = 3 * t * s.ffn_width(experts) * s.width
    if not experts:
        return parts
    parts["router"] = 2 * t * max(experts - model.num_shared_experts, LANES) * 4
    rows, hidden, weights = s.expert_rows(), s.buffer * model.d_expert * s.width, s.expert_weights(experts)
    if s.chunks > 1:
        count = 3.5 if s.kind == "all_to_all" else 2.5 if s.kind == "ring" else 2
        parts["rows of experts"] = UNROLL * (count * rows + (2 if s.kind == "here" else 3) * hidden)
        parts["weights of experts and their gradients"] = (10 if s.kind == "here" else 9) / 3 * weights
        if s.kind == "all_to_all":
            parts["rows on their way"] = s.choices * d * s.width
        elif s.kind == "ring":
            parts["rows on their way"] = (model.num_choices + 1) * s.ring_rows()
    elif s.kind == "here":
        parts["rows of experts"] = 2 * rows + hidden
        parts["weights of experts and their gradients"] = 5 / 3 * weights
    else:
        parts["rows of experts"] = 3 * (rows + hidden)
        parts["weights of experts and their gradients"] = 2 * weights
        if s.kind == "ring":
            parts["rows on their way"] = (model.num_choices + 1) * s.ring_rows()
    return parts


def _experts_forward(s: _Shapes, experts: int) -> dict[str, float]:
    """Bytes that live at once while a layer's experts compute, going forward."""
    if not experts:
        return {}
    at_once = UNROLL if s.chunks > 1 else 1
    rows = s.expert_rows() + s.buffer * s.model.d_expert * s.width
    parts: dict[str, float] = {"weights of experts": s.expert_weights(experts), "rows of experts": rows}
    if s.kind == "ring":
        parts["rows on their way"] = at_once * (s.model.num_choices + 1) * s.ring_rows()
    return parts


def _work(s: _Shapes, flops: Flops) -> dict[str, Work]:
    """What each part of the model multiplies and moves; how often arrays pass through HBM was counted as memory was."""
    model, d, w, v = s.model, s.model.d_model, s.width, s.model.vocab_size
    t, steps = s.tokens, s.microbatches
    passes, again = 3 + s.recomputed + s.twice, 3 + s.experts_recomputed + s.twice
    slabs = -(-t // CHUNK)
    heads = (2 * model.num_heads + 2 * model.kv_heads) * model.head_dim
    moved: dict[str, float] = collections.defaultdict(float)
    moved["loss"] = slabs * d * v * (2 * w + 2 * s.wide) + t * v * 4 * s.wide
    moved["embedding"] = 5 * d * v * s.wide
    compute: dict[str, float] = collections.defaultdict(float)
    extra = 2 * s.twice
    compute["loss"] = (6 + extra) * d * v * t * steps
    compute["attention"] = flops.attention
    for experts in model.layer_experts:
        ffn = s.ffn_width(experts)
        moved["attention"] += passes * (t * (6 * d + 4 * heads) + s.attention_weights) * w
        moved["dense feed-forward"] += passes * (4 * t * (d + ffn) + 3 * d * ffn) * w
        moved["norms and copies"] += passes * 11 * t * d * w
        compute["attention"] += (6 + 2 * s.recomputed + extra) * s.attention_weights * t * steps
        compute["dense feed-forward"] += (18 + 4 * s.recomputed + 3 * extra) * d * ffn * t * steps
        if experts:
            rows, f, weights = s.buffer * s.chunks, model.d_expert, s.expert_weights(experts)
            filled = s.choices * s.chunks
            moved["router"] += passes * t * (d * w + 6 * max(experts, LANES) * 4)
            moved["experts' products"] += again * (filled * 3 * (d + f) * w + s.chunks * weights)
            there = (10 * d + 6 * f) if s.ranks > 1 else (5 * d + 3 * f)
            moved["experts' rows"] += again * rows * there * w + 6 * weights
    compute["router"] = 6 * flops.router
    compute["experts' products"] = flops.filled
    work = {name: Work(compute[name], size * steps) for name, size in moved.items()}
    return work | {"optimizer": Work(0.0, 7 * s.state.parameters)}


def _sent(s: _Shapes) -> dict[tuple[str, tuple[str, ...]], float]:
    model, sizes = s.model, s.sizes
    found: dict[tuple[str, tuple[str, ...]], float] = collections.defaultdict(float)

    def send(kind: str, axes: tuple[str, ...], size: float) -> None:
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        if axes and size:
            found[kind, axes] += size * s.microbatches

    for leaf in s.state.leaves:
        outside = leaf.name in ("embedding", "head")
        gathers, width = (1, s.wide) if outside else (2 + s.twice, s.width)
        elements = float(leaf.elements * leaf.number)
        if leaf.routed:
            if s.spread:
                elements *= expert_slots(leaf.shape[0], s.ranks, s.shards) / leaf.shape[0]
            _send_experts(send, s, mesh_axes(leaf.spec), elements, gathers)
        elif len(leaf.shape) > 1:
            elements = _send_weights(send, s, leaf.spec, elements, gathers, width)
        copies = sizes["data"]
        send("all-reduce", ("data",), 2 * (copies - 1) / copies * elements * width)
    mixtures, x = len(model.routed_experts), s.ranks
    times = 4 + s.exchanged_again + 2 * s.twice
    if s.kind == "all_to_all":
        send(
            "ragged-all-to-all",
            ("expert",),
            mixtures * times * s.chunks * s.choices * (x - 1) / x * model.d_model * s.width,
        )
    elif s.kind == "ring":
        there = mixtures * s.tokens * (x - 1) * model.d_model * s.width
        send("all-gather", ("expert",), there * (2 + s.exchanged_again + s.twice))
        send("reduce-scatter", ("expert",), there * (2 + s.twice))
    parts = sizes["context"]
    keys = model.num_layers * (parts - 1) * 2 * s.tokens * model.kv_heads * model.head_dim * s.width
    send("all-gather", ("context",), keys * (1 + (model.remat != "none") + s.twice))
    send("reduce-scatter", ("context",), keys)
    return dict(found)


Send = Callable[[str, tuple[str, ...], float], None]


def _send_weights(send: Send, s: _Shapes, spec: PartitionSpec, elements: float, gathers: int, width: int) -> float:
    """A weight that rests in pieces to every device, and its gradient back, one array axis after another."""
    axes = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    whole = elements
    for along in axes:
        members = math.prod(s.sizes[axis] for axis in along)
        send("all-gather", along, gathers * (members - 1) * whole * s.width)
        whole *= members
    for along in reversed(axes):
        members = math.prod(s.sizes[axis] for axis in along)
        whole /= members
        send("reduce-scatter", along, (members - 1) * whole * width)
    return elements


def _send_experts(send: Send, s: _Shapes, axes: tuple[str, ...], elements: float, gathers: int) -> None:
    """A stack of routed experts to the ranks that compute them, and its gradient back."""
    sizes, ranks, size = s.sizes, s.ranks, elements * s.width
    times = gathers + 1  # the gradient's way is the same, turned round
    if ranks > 1 and "expert" in axes:
        send("all-to-all", ("expert",), times * (ranks - 1) / ranks * size)
    pieces = tuple(axis for axis in axes if axis != "expert") if ranks > 1 else axes
    members = math.prod(sizes[axis] for axis in pieces)
    if members > 1:
        send("all-to-all", pieces, times * (members - 1) / members * size)
        send("all-gather", pieces, gathers * (members - 1) * size)
        send("reduce-scatter", pieces, (members - 1) * size)


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

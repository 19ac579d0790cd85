"""What a training step costs each device, by formulas over shapes: nothing is traced or compiled.

The formulas follow the program: which products a remat policy computes again, what each exchange sends, which arrays a
phase needs (`memory`). How often arrays pass through HBM was counted in compiled programs.

Letters: T tokens of a device in a microbatch, D width, E experts, R routed, C choices, F expert hidden, H heads, N head
width, V vocabulary, L layers, X ranks of the expert axis, M rows of experts' inputs in a chunk.
"""

import collections
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from jax.sharding import PartitionSpec

from emo_jax.config import Config
from emo_jax.model import flops_per_token
from emo_jax.model.cross_entropy import CHUNK
from emo_jax.parallel.exchange import expert_slots
from emo_jax.parallel.sharding import mesh_axes
from emo_jax.planning.memory import Memory, memory
from emo_jax.planning.shapes import LANES, Shapes


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
    shapes = Shapes(run, sizes)
    tokens = shapes.tokens * run.train.microbatches
    flops = _flops(shapes)
    return Cost(tokens, flops, memory(shapes), _work(shapes, flops), _sent(shapes))


def _flops(s: Shapes) -> Flops:
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


def _work(s: Shapes, flops: Flops) -> dict[str, Work]:
    """What each part of the model multiplies and moves; how often arrays pass through HBM was counted as memory was."""
    model, d, w, v = s.model, s.model.d_model, s.width, s.model.vocab_size
    t, steps = s.tokens, s.microbatches
    passes, again = 3 + s.recomputed + s.twice, 3 + s.experts_recomputed + s.twice
    slabs = -(-t // CHUNK)
    moved: dict[str, float] = collections.defaultdict(float)
    moved["loss"] = slabs * d * v * (2 * w + 2 * s.wide) + t * v * 4 * s.wide
    moved["embedding"] = 5 * d * v * s.wide
    compute: dict[str, float] = collections.defaultdict(float)
    extra = 2 * s.twice
    compute["loss"] = (6 + extra) * d * v * t * steps
    compute["attention"] = flops.attention
    for experts in model.layer_experts:
        ffn = s.ffn_width(experts)
        moved["attention"] += passes * (t * (6 * d + 4 * s.heads) + s.attention_weights) * w
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


def _sent(s: Shapes) -> dict[tuple[str, tuple[str, ...]], float]:
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


def _send_weights(send: Send, s: Shapes, spec: PartitionSpec, elements: float, gathers: int, width: int) -> float:
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


def _send_experts(send: Send, s: Shapes, axes: tuple[str, ...], elements: float, gathers: int) -> None:
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

"""What a training step costs each device, by formulas over shapes: nothing is traced or compiled.

The formulas follow the program: which products a remat policy computes again, what each exchange sends, which arrays a
phase needs (`memory`). How often arrays pass through HBM was counted in compiled programs.

Letters: T tokens of a device in a microbatch, D width, E experts, R routed, C choices, F hidden of an expert or a dense
layer, H heads, N head width, V vocabulary (of a classifier its labels), L layers, X ranks of the expert axis, M rows of
experts' inputs in a chunk.
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
      model: forward and backward pass without recomputation, as `flops_per_token` counts them; where not all is
        trained, only the products that are needed.
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
    flops: dict[str, float] = collections.defaultdict(float)
    for one in s.products:
        flops[one.part] += 2 * one.elements * one.passes
    grouped, router, attention = flops.pop("experts' products", 0.0), flops["router"], 0.0
    # A row's queries meet the keys of whole blocks, those up to themselves or all.
    length = s.run.data.sequence_length
    met = (length + min(length, 1024)) / 2 if model.causal else length
    for layer in range(model.num_layers):
        # Two products forward, five backward.
        back = 5 + 2 * (model.remat != "none") if s.attends_back(layer) else 0
        attention += (2 + 2 * s.twice + back) * 2 * met * model.num_heads * model.head_dim
    rows = s.buffer * s.chunks * s.microbatches
    return Flops(
        _model_flops(s) * tokens,
        sum(flops.values()) * tokens,
        router * tokens,
        grouped * rows,
        grouped * tokens * model.num_choices if s.dispatches else 0.0,
        attention * tokens,
    )


def _model_flops(s: Shapes) -> float:
    """Of a token."""
    model, length = s.model, s.run.data.sequence_length
    if s.learns_all:
        return flops_per_token(model, length)
    choices = collections.defaultdict(lambda: 1, {"experts' products": model.num_choices})
    products = sum(2 * one.elements * one.needed * choices[one.part] for one in s.products)
    attention = length * model.num_heads * model.head_dim * (1 if model.causal else 2)
    return products + sum((2 + 4 * s.attends_back(layer)) * attention for layer in range(model.num_layers))


def _work(s: Shapes, flops: Flops) -> dict[str, Work]:
    """What each part of the model multiplies and moves; how often arrays pass through HBM was counted as memory was."""
    model, d, w, v = s.model, s.model.d_model, s.width, s.outputs
    t, steps = s.tokens, s.microbatches
    slabs = -(-t // CHUNK)
    passes: dict[tuple[str, int], int] = collections.defaultdict(int)
    weights: dict[tuple[str, int], int] = collections.defaultdict(int)
    compute: dict[str, float] = collections.defaultdict(float)
    moved: dict[str, float] = collections.defaultdict(float)
    for one in s.products:
        passes[one.part, one.layer] = max(passes[one.part, one.layer], one.passes)
        weights[one.part, one.layer] += one.elements
        compute[one.part] += 2 * one.elements * one.passes * t * steps
    moved["loss"] = slabs * d * v * (2 * w + 2 * s.wide * s.learns_head) + t * v * 4 * s.wide
    moved["embedding"] = s.tables * (5 * s.wide if s.learns_tables else w)
    compute["attention"] += flops.attention
    for i, experts in enumerate(model.layer_experts):
        ffn, attends, feeds = s.ffn_width(i), passes["attention", i], passes["dense feed-forward", i]
        moved["attention"] += attends * (t * (6 * d + 4 * s.heads) + weights["attention", i]) * w
        moved["dense feed-forward"] += feeds * (t * (s.matrices + 1) * (d + ffn) + weights["dense feed-forward", i]) * w
        moved["norms and copies"] += max(attends, feeds) * 11 * t * d * w
        routes = passes["router", i]
        if experts:
            rows, f, stacks = s.buffer * s.chunks, model.d_expert, s.expert_weights(experts)
            filled, again = s.choices * s.chunks, passes["experts' products", i]
            moved["router"] += feeds * t * (d * w + 6 * max(experts, LANES) * 4)
            moved["experts' products"] += again * (filled * 3 * (d + f) * w + s.chunks * stacks)
            there = (10 * d + 6 * f) if s.ranks > 1 else (5 * d + 3 * f)
            moved["experts' rows"] += again * rows * there * w + 6 * stacks
        elif routes:
            moved["router"] += routes * t * (d * w + 6 * max(model.split_experts, LANES) * 4)
            if model.split_gate == "average_key":  # of weights as they rest
                moved["router"] += 3 * (routes - 1) * d * ffn / s.shards * s.wide
            # Hidden neurons as [N, F/N] for a factor an expert, and back.
            moved["emergent experts"] += feeds * 3.5 * t * ffn * w
    compute["router"] = 6 * flops.router
    compute["experts' products"] = flops.filled
    work = {name: Work(compute[name], size * steps) for name, size in moved.items()}
    learned = sum(s.state.gradients.values())
    return work | {"optimizer": Work(0.0, (7 if s.learns_all else 3) * learned)}


def _sent(s: Shapes) -> dict[tuple[str, tuple[str, ...]], float]:
    model, sizes = s.model, s.sizes
    found: dict[tuple[str, tuple[str, ...]], float] = collections.defaultdict(float)

    def send(kind: str, axes: tuple[str, ...], size: float) -> None:
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        if axes and size:
            found[kind, axes] += size * s.microbatches

    for leaf in s.state.leaves:
        gathers, width = (1 + leaf.reached + s.twice, s.width) if leaf.name == "layers" else (1, s.wide)
        if leaf.name == "embedding" and model.tied_embeddings and not model.labels:
            gathers += 1  # as the head, whose gradient goes back by itself
        elements = float(leaf.elements * leaf.number)
        if leaf.routed:
            if s.spread:
                elements *= expert_slots(leaf.shape[0], s.ranks, s.shards) / leaf.shape[0]
            _send_experts(send, s, mesh_axes(leaf.spec), elements, gathers, leaf.learned)
        elif len(leaf.shape) > 1:
            back = leaf.learned * (gathers if leaf.name != "layers" else 1)
            _send_weights(send, s, leaf.spec, elements, gathers, back * width)
        copies = sizes["data"]
        send("all-reduce", ("data",), leaf.learned * 2 * (copies - 1) / copies * elements * width)
    mixtures, x = len(model.routed_experts) if s.dispatches else 0, s.ranks
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
    keys = (parts - 1) * 2 * s.tokens * model.kv_heads * model.head_dim * s.width
    for layer in range(model.num_layers):
        back = s.attends_back(layer)
        send("all-gather", ("context",), keys * (1 + (back and model.remat != "none") + s.twice))
        send("reduce-scatter", ("context",), back * keys)
    return dict(found)


Send = Callable[[str, tuple[str, ...], float], None]


def _send_weights(send: Send, s: Shapes, spec: PartitionSpec, elements: float, gathers: int, width: int) -> None:
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


def _send_experts(send: Send, s: Shapes, axes: tuple[str, ...], elements: float, gathers: int, learned: bool) -> None:
    """A stack of routed experts to the ranks that compute them, and its gradient back."""
    sizes, ranks, size = s.sizes, s.ranks, elements * s.width
    times = gathers + learned  # the gradient's way is the same, turned round
    if ranks > 1 and "expert" in axes:
        send("all-to-all", ("expert",), times * (ranks - 1) / ranks * size)
    pieces = tuple(axis for axis in axes if axis != "expert") if ranks > 1 else axes
    members = math.prod(sizes[axis] for axis in pieces)
    if members > 1:
        send("all-to-all", pieces, times * (members - 1) / members * size)
        send("all-gather", pieces, gathers * (members - 1) * size)
        send("reduce-scatter", pieces, learned * (members - 1) * size)

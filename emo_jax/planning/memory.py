"""What a device holds while it computes a step, by formulas over shapes.

Which arrays each phase needs follows from the program; how many of a kind a compiler holds at once was counted in
compiled programs (`benchmarks/planning.py points` compares). Of temporaries of LoRA compilers hold up to a third less.

Letters: T tokens of a device in a microbatch, D width, E experts, R routed, C choices, F hidden of an expert or a dense
layer, H heads, N head width, V vocabulary (of a classifier its labels), L layers, X ranks of the expert axis, M rows of
experts' inputs in a chunk.
"""

from typing import NamedTuple

from emo_jax.model.cross_entropy import CHUNK
from emo_jax.parallel.exchange import UNROLL
from emo_jax.planning.shapes import LANES, TABLES, Shapes

HIDDEN = {"swiglu": 5, "gelu": 4, "gelu_tanh": 5, "relu": 1.5}
"""Arrays [T, F] that a dense feed-forward keeps, by activation, where it keeps everything; one less where `down` is not
trained. Counted in compiled programs."""


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


def memory(s: Shapes) -> Memory:
    """What a device holds at the fullest moment of a step."""
    model, wide, own = s.model, s.wide, s.state.gradients
    gradients, of_layers = sum(own.values()), own.get("layers", 0.0)
    batch = s.rows * s.microbatches * s.run.data.sequence_length // s.sizes["context"] * (4 * 4 + 1)

    layers = model.num_layers
    kept = [_kept(s, layer) for layer in range(layers)]
    saved = sum(kept) + s.hidden
    whole_head = model.d_model * s.outputs
    head = whole_head * (s.width + wide * s.learns_head)
    logits = min(CHUNK, s.tokens) * max(s.outputs, LANES) * wide
    always = {}
    if s.microbatches > 1:
        # Sums of gradients, and parameters cast once before the loop over microbatches.
        always = {"summed gradients": gradients, "cast parameters": s.state.parameters * s.width / wide}
    loss = {
        "kept for the backward pass": saved,
        "head and its gradient": head,
        "logits": logits,
        "residual streams": 2 * s.hidden,
    }
    forward = {
        "kept for the backward pass": saved,
        "head and its gradient": head,
        **_experts_forward(s, model.layer_experts[-1]),
    }
    tables = s.tables * wide * s.learns_tables
    # Of a tied head, the table's gradient is there in part already.
    missing = 0.0 if model.tied_embeddings and not model.labels else sum(own.get(name, 0.0) for name in TABLES)
    end = {
        "kept for the backward pass": kept[0] + s.hidden,
        "gradients": gradients - missing - of_layers / layers,
        **_layer(s, 0),
    }
    if s.microbatches > 1:
        end["gradient of the embedding"] = tables
    phases = {
        "the last layer's forward pass": forward,
        "the loss": loss,
        "the last layer's backward pass": {"kept for the backward pass": saved, **_layer(s, layers - 1)},
        "the first layer's backward pass": end,
        "the embedding's gradient": {
            "gradients": gradients,
            "gradient of the embedding": tables,
            "residual streams": s.hidden,
        },
    }
    # What an allocator cannot fill between arrays of many sizes: about half of the largest one.
    always["gaps"] = max(whole_head * (wide if s.learns_head else s.width), tables, s.tables * s.width) / 2
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    parts = always | phases[phase]
    return Memory(s.state.held + batch, sum(parts.values()), phase, parts)


def _kept(s: Shapes, layer: int) -> float:
    """Bytes of one layer that the backward pass finds."""
    model, t, d, experts, ffn = s.model, s.tokens, s.model.d_model, s.model.layer_experts[layer], s.ffn_width(layer)
    kept: float = s.hidden
    if model.remat == "none":
        # Queries, keys, values, what attention returns, norms in float32 and hidden layers.
        kept += t * (_heads(s, 2) * s.width + model.num_heads * LANES * 4 + 4 * d * s.wide + 2 * d * s.width)
        kept += (HIDDEN[model.feed_forward] - (not s.learns_down(layer))) * t * ffn * s.width
    elif model.remat == "dots":
        kept += t * (_heads(s, 1) + d + (s.matrices - 1) * ffn + d) * s.width
    if s.learns_factors(layer) and model.remat == "none":
        # For the gradients of the factors: hidden layers before them, and which experts were chosen.
        kept += t * (ffn * s.width + 2 * model.num_choices * max(model.split_experts, LANES) * 4)
    if not experts:
        return kept
    routed = experts - model.num_shared_experts
    if model.remat == "none":
        kept += t * (4 + model.num_choices) * max(routed, LANES) * 4
        if s.chunks == 1:  # several chunks compute their products again
            kept += s.buffer * (2 * model.d_expert + (d if s.ranks == 1 else 0)) * s.width
    elif model.remat == "dots":
        kept += t * max(routed, LANES) * 4
    if s.ranks > 1 and model.remat in ("none", "exchange"):
        arrived = s.tokens * s.ranks * d if s.kind == "ring" else s.chunks * s.buffer * d
        kept += arrived * s.width
        kept += s.hidden if model.remat == "none" else 0
    return kept + 2 * t * model.num_choices * 4


def _heads(s: Shapes, of_queries: int) -> int:
    """Numbers of a token's keys, values and so many arrays like queries, each head filled up to a vector."""
    width = -(-s.model.head_dim // LANES) * LANES
    return (of_queries * s.model.num_heads + 2 * s.model.kv_heads) * width


def _layer(s: Shapes, layer: int) -> dict[str, float]:
    """Bytes that live at once in one layer's backward pass, beside what was kept for it."""
    model, t, d, experts, ffn = s.model, s.tokens, s.model.d_model, s.model.layer_experts[layer], s.ffn_width(layer)
    parts: dict[str, float] = {
        "residual streams": (4 if s.recomputed else 2) * s.hidden,
        "dense weights": (s.attention_weights + s.matrices * d * ffn) * s.width,
    }
    if s.recomputed:
        parts["attention"] = t * (_heads(s, 2) * s.width + model.num_heads * LANES * 4)
        parts["dense feed-forward"] = (3 + s.learns_factors(layer)) * t * ffn * s.width
    if not experts:
        return parts
    parts["router"] = 2 * t * max(experts - model.num_shared_experts, LANES) * 4
    rows, hidden, weights = s.expert_rows(), s.buffer * model.d_expert * s.width, s.expert_weights(experts)
    if s.chunks > 1:
        count = 3.5 if s.kind == "all_to_all" else 2.5 if s.kind == "ring" else 2
        parts["rows of experts"] = UNROLL * (count * rows + (3 if s.kind == "all_to_all" else 2) * hidden)
        parts["weights of experts and their gradients"] = (13 if s.kind == "here" else 9) / 3 * weights
        if s.kind == "all_to_all":
            parts["rows on their way"] = s.choices * d * s.width
    elif s.kind == "here":
        parts["rows of experts"] = 2 * rows + hidden
        parts["weights of experts and their gradients"] = 5 / 3 * weights
    else:
        parts["rows of experts"] = 3.5 * rows + 3 * hidden if s.kind == "all_to_all" else 2.5 * rows + 2 * hidden
        parts["weights of experts and their gradients"] = 2 * weights
    if s.kind == "ring":
        parts["rows on their way"] = s.ring_rows()
    return parts


def _experts_forward(s: Shapes, experts: int) -> dict[str, float]:
    """Bytes that live at once while a layer's experts compute, going forward."""
    if not experts:
        return {}
    at_once = UNROLL if s.chunks > 1 else 1
    rows = s.expert_rows() + s.buffer * s.model.d_expert * s.width
    parts: dict[str, float] = {"weights of experts": s.expert_weights(experts), "rows of experts": rows}
    if s.kind == "ring":
        parts["rows on their way"] = at_once * s.ring_rows()
    return parts

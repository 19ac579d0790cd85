"""What a model's routers do with some text: one walk through the layers, every layer's input kept between them.

Letters: B rows, S sequence, D model, R routed experts, C choices, T tokens.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emo_jax.errors import require
from emo_jax.model import Kept, ModelConfig, bind
from emo_jax.model.transformer import Block
from emo_jax.modularity.clustering import Coactivation, coactivation


class Statistics(NamedTuple):
    """Sums over the asked-for tokens t of a mixture layer, float64 [R] each, and how many tokens those are.

    Attributes:
      tokens: their number.
      probability_R: Σ p, the softmax over all experts (over the kept ones, where some were cut before).
      count_R: tokens that chose the expert.
      gate_R: Σ g over them, g the weight the expert's output has.
      gated_norm_R: Σ g · ‖e‖₂, e the expert's output.
      easy_ep_R: Σ g · ‖e‖₂ · s with s = 1 − cos(h, h + Σ g e), h the residual stream that the layer adds to
        (arXiv 2504.06792).
      easy_ep_normed_R: the same with the layer's normalised input as h and the shared experts' output added to it, at
        least 0 (the public EMO code).
    """

    tokens: float
    probability_R: np.ndarray
    count_R: np.ndarray
    gate_R: np.ndarray
    gated_norm_R: np.ndarray
    easy_ep_R: np.ndarray
    easy_ep_normed_R: np.ndarray


def calibrate(
    config: ModelConfig,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    choose: Callable[[int, Statistics], np.ndarray] | None = None,
) -> list[Statistics]:
    """Statistics of every mixture layer over `batches`, each layer computed once.

    Args:
      config: of the model.
      params: its parameters.
      batches: of one shape, by the contract of `emo_jax.data`; `asked`, bool [B, S], marks the tokens to count, and
        where it is absent all tokens of documents count.
      choose: (place among the mixture layers, its statistics) → bool [R], the experts that the layer goes on with;
        the layers behind it see their output (greedy selection). None: all.

    Returns:
      One `Statistics` a mixture layer.

    Raises:
      UserError: where the batches hold no asked-for token.
    """
    batches = list(batches)
    inputs = [
        (batch["document_ids"], batch["positions"], batch.get("asked", batch["document_ids"] > 0)) for batch in batches
    ]
    require(any(asked.any() for *_, asked in inputs), "The calibration set is empty: no token is asked for.")
    key = json.dumps(dataclasses.asdict(config))
    embed = _embedding_function(key)
    streams = [embed(params, batch["tokens"], batch["positions"], batch.get("token_types")) for batch in batches]
    result: list[Statistics] = []
    alike: dict[Any, int] = {}
    for layer, name in enumerate(sorted(params["layers"])):
        state = params["layers"][name]
        experts, split = config.layer_experts[layer], layer in config.split_layers
        always = config.always_active(len(result)) if experts else ()
        measure, advance = _layer_functions(key, alike.setdefault((experts, split, always), layer))
        kept = None
        if experts or split:
            sums = [measure(state, x, *given) for x, given in zip(streams, inputs, strict=True)]
            total = [
                np.asarray(np.sum(parts, axis=0, dtype=np.float64)) for parts in zip(*jax.device_get(sums), strict=True)
            ]
            result.append(Statistics(float(total[0]), *total[1:]))
            if choose is not None:
                kept = Kept(jnp.asarray(choose(len(result) - 1, result[-1])), jnp.array(True))
        streams = [advance(state, x, *given[:2], kept) for x, given in zip(streams, inputs, strict=True)]
    return result


def coactivations(
    config: ModelConfig, params: Any, batches: Iterable[dict[str, np.ndarray]], layers: Iterable[int]
) -> dict[int, Coactivation]:
    """How often each two neurons of dense layers fire together, over the tokens of documents.

    Args:
      config: of a dense model.
      params: its parameters.
      batches: of one shape, by the contract of `emo_jax.data`.
      layers: places of the layers.

    Returns:
      The counts of each.

    Raises:
      UserError: where the batches hold no token.
    """
    batches, layers = list(batches), set(layers)
    require(any((batch["document_ids"] > 0).any() for batch in batches), "The calibration texts hold no token.")
    key = json.dumps(dataclasses.asdict(config))
    embed, activate = _embedding_function(key), _activation_function(key)
    _, advance = _layer_functions(key, 0)
    streams = [embed(params, batch["tokens"], batch["positions"], batch.get("token_types")) for batch in batches]
    given = [(batch["document_ids"], batch["positions"]) for batch in batches]
    found: dict[int, Coactivation] = {}
    for layer in range(max(layers) + 1):
        state = params["layers"][f"{layer:02d}"]
        if layer in layers:
            for x, (ids, positions) in zip(streams, given, strict=True):
                own = coactivation(np.asarray(activate(state, x, ids, positions))[ids > 0])
                found[layer] = found[layer] + own if layer in found else own
        streams = [advance(state, x, *some, None) for x, some in zip(streams, given, strict=True)]
    return found


def _config(config_json: str) -> ModelConfig:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(config_json).items()}
    return ModelConfig(**values)


@functools.cache
def _embedding_function(config_json: str) -> Callable[..., jax.Array]:
    """(parameters, tokens, positions, token types) → what the first layer reads."""
    config = _config(config_json)

    def embed(params: Any, tokens_BS: jax.Array, positions_BS: jax.Array, types_BS: jax.Array | None) -> jax.Array:
        return bind(config, params).embedded(tokens_BS, positions_BS, types_BS)

    return jax.jit(embed)


@functools.cache
def _layer_functions(config_json: str, layer: int) -> tuple[Callable, Callable]:
    """Jitted `_measure` and `_advance` of a layer; compiled once for all layers (and models) that are alike."""
    config = _config(config_json)
    graph = nnx.split(nnx.eval_shape(lambda: Block(config, layer)))[0]
    return jax.jit(functools.partial(_measure, graph)), jax.jit(functools.partial(_advance, graph))


@functools.cache
def _activation_function(config_json: str) -> Callable[..., jax.Array]:
    """(a dense layer's parameters, its input, document ids, positions) → its neurons' activations."""
    config = _config(config_json)
    graph = nnx.split(nnx.eval_shape(lambda: Block(config, 0)))[0]

    def activate(state: Any, x_BSD: jax.Array, ids_BS: jax.Array, positions_BS: jax.Array) -> jax.Array:
        block = nnx.merge(graph, state)
        return block.ffn.activated(block.attend(x_BSD, ids_BS, positions_BS)[1])

    return jax.jit(activate)


def _advance(
    graph: Any, state: Any, x_BSD: jax.Array, ids_BS: jax.Array, positions_BS: jax.Array, kept: Any
) -> jax.Array:
    block = nnx.merge(graph, state)
    routing = {"kept": kept} if block.routes else {}
    return block(x_BSD, ids_BS, positions_BS, **routing)[0]


def _measure(
    graph: Any, state: Any, x_BSD: jax.Array, ids_BS: jax.Array, positions_BS: jax.Array, asked_BS: jax.Array
) -> tuple[jax.Array, ...]:
    block = nnx.merge(graph, state)
    h_BSD, normal_BSD, _ = block.attend(x_BSD, ids_BS, positions_BS)
    output_BSD, routing = block.routed(normal_BSD, ids_BS)
    experts, wide = routing.logits_BSR.shape[-1], routing.logits_BSR.dtype
    norms_BSC = block.routed.expert_norms(normal_BSD, routing.indices_BSC)
    output_BSD = output_BSD.astype(wide)
    routed_BSD = output_BSD
    if hasattr(block.routed, "shared"):
        routed_BSD = output_BSD - jnp.where(ids_BS[..., None] > 0, block.routed.shared(normal_BSD), 0).astype(wide)
    h_BSD, normal_BSD = h_BSD.astype(wide), normal_BSD.astype(wide)
    change_BS = 1 - _cosine(h_BSD, h_BSD + routed_BSD)
    normed_change_BS = jnp.maximum(1 - _cosine(normal_BSD, normal_BSD + output_BSD), 0)

    mask_BS = (asked_BS & (ids_BS > 0)).astype(wide)
    chosen_BSCR = jax.nn.one_hot(routing.indices_BSC, experts, dtype=wide) * mask_BS[..., None, None]
    weights_BSC = block.routed.choice_weights(routing)
    gated_BSC = weights_BSC * norms_BSC

    def per_expert(value_BSC: jax.Array) -> jax.Array:
        return jnp.einsum("bsc,bscr->r", value_BSC.astype(wide), chosen_BSCR, precision="highest")

    return (
        mask_BS.sum(),
        (jax.nn.softmax(routing.logits_BSR) * mask_BS[..., None]).sum((0, 1)),
        chosen_BSCR.sum((0, 1, 2)),
        per_expert(weights_BSC),
        per_expert(gated_BSC),
        per_expert(gated_BSC * change_BS[..., None]),
        per_expert(gated_BSC * normed_change_BS[..., None]),
    )


def _cosine(a_BSD: jax.Array, b_BSD: jax.Array) -> jax.Array:
    norms_BS = jnp.linalg.norm(a_BSD, axis=-1) * jnp.linalg.norm(b_BSD, axis=-1)
    return (a_BSD * b_BSD).sum(-1) / jnp.maximum(norms_BS, 1e-12)

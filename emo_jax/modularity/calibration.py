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
from emo_jax.kernels.experts import expert_norms
from emo_jax.model import Kept, ModelConfig
from emo_jax.model.routing import route
from emo_jax.model.transformer import Block


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
    embedding_VD = jnp.asarray(params["embedding"]).astype(config.dtype)
    streams = [embedding_VD[batch["tokens"]] for batch in batches]
    result: list[Statistics] = []
    for name, experts in zip(sorted(params["layers"]), config.layer_experts, strict=True):
        state = params["layers"][name]
        always = config.always_active(len(result)) if experts else ()
        measure, advance = _layer_functions(json.dumps(dataclasses.asdict(config)), experts, always)
        kept = None
        if experts:
            sums = [measure(state, x, *given) for x, given in zip(streams, inputs, strict=True)]
            total = [
                np.asarray(np.sum(parts, axis=0, dtype=np.float64)) for parts in zip(*jax.device_get(sums), strict=True)
            ]
            result.append(Statistics(float(total[0]), *total[1:]))
            if choose is not None:
                kept = Kept(jnp.asarray(choose(len(result) - 1, result[-1])), jnp.array(True))
        streams = [advance(state, x, *given[:2], kept) for x, given in zip(streams, inputs, strict=True)]
    return result


@functools.cache
def _layer_functions(config_json: str, experts: int, always: tuple[int, ...]) -> tuple[Callable, Callable]:
    """Jitted `_measure` and `_advance` of a layer; compiled once for all layers (and models) that are alike."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(config_json).items()}
    config = ModelConfig(**values)
    graph = nnx.split(nnx.eval_shape(lambda: Block(config, experts, always)))[0]
    return jax.jit(functools.partial(_measure, graph)), jax.jit(functools.partial(_advance, graph))


def _advance(
    graph: Any, state: Any, x_BSD: jax.Array, ids_BS: jax.Array, positions_BS: jax.Array, kept: Any
) -> jax.Array:
    block = nnx.merge(graph, state)
    routing = {"kept": kept} if hasattr(block, "moe") else {}
    return block(x_BSD, ids_BS, positions_BS, **routing)[0]


def _measure(
    graph: Any, state: Any, x_BSD: jax.Array, ids_BS: jax.Array, positions_BS: jax.Array, asked_BS: jax.Array
) -> tuple[jax.Array, ...]:
    block = nnx.merge(graph, state)
    moe = block.moe
    h_BSD, normal_BSD, _ = block.attend(x_BSD, ids_BS, positions_BS)
    logits_BSR = moe.router_logits(normal_BSD)
    experts, wide = logits_BSR.shape[-1], logits_BSR.dtype
    config = moe.config
    routing = route(
        logits_BSR,
        ids_BS,
        choices=config.num_choices,
        normalize=config.normalize_top_k,
        always_active=moe.always_active,
    )
    weights = [w[...].astype(normal_BSD.dtype) for w in (moe.routed.gate, moe.routed.up, moe.routed.down)]
    flat = normal_BSD.reshape(-1, normal_BSD.shape[-1])
    norms_BSC = expert_norms(flat, routing.indices_BSC.reshape(len(flat), -1), *weights).reshape(
        routing.indices_BSC.shape
    )
    output_BSD = moe(normal_BSD, ids_BS)[0].astype(wide)
    routed_BSD = output_BSD
    if config.num_shared_experts:
        routed_BSD = output_BSD - jnp.where(ids_BS[..., None] > 0, moe.shared(normal_BSD), 0).astype(wide)
    h_BSD, normal_BSD = h_BSD.astype(wide), normal_BSD.astype(wide)
    change_BS = 1 - _cosine(h_BSD, h_BSD + routed_BSD)
    normed_change_BS = jnp.maximum(1 - _cosine(normal_BSD, normal_BSD + output_BSD), 0)

    mask_BS = (asked_BS & (ids_BS > 0)).astype(wide)
    chosen_BSCR = jax.nn.one_hot(routing.indices_BSC, experts, dtype=wide) * mask_BS[..., None, None]
    gated_BSC = routing.weights_BSC * norms_BSC

    def per_expert(value_BSC: jax.Array) -> jax.Array:
        return jnp.einsum("bsc,bscr->r", value_BSC.astype(wide), chosen_BSCR, precision="highest")

    return (
        mask_BS.sum(),
        (jax.nn.softmax(logits_BSR) * mask_BS[..., None]).sum((0, 1)),
        chosen_BSCR.sum((0, 1, 2)),
        per_expert(routing.weights_BSC),
        per_expert(gated_BSC),
        per_expert(gated_BSC * change_BS[..., None]),
        per_expert(gated_BSC * normed_change_BS[..., None]),
    )


def _cosine(a_BSD: jax.Array, b_BSD: jax.Array) -> jax.Array:
    norms_BS = jnp.linalg.norm(a_BSD, axis=-1) * jnp.linalg.norm(b_BSD, axis=-1)
    return (a_BSD * b_BSD).sum(-1) / jnp.maximum(norms_BS, 1e-12)

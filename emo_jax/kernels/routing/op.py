"""`fused_routing`: a router's logits to pools, choices, weights and sums, read once.

Letters: B rows, S sequence, R routed experts, G documents a row, C choices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from emo_jax.kernels.routing import pallas_tpu

IMPLEMENTATIONS = ("xla", "pallas_tpu")
MOST, MOST_PAIRS = 1024, 2**17
"""Most experts, or documents a row, and most of both multiplied: fast memory holds several numbers for each pair."""


class FusedRouting(NamedTuple):
    """Decisions of a router and the sums over tokens that losses and metrics are made of, all float32 but for two.

    Attributes:
      indices_BSC: int32 chosen experts by falling weight; R for a token of document 0.
      weights_BSC: their weights; 0 for a token of document 0. Differentiable.
      in_pool_BGR: bool, the experts that each document may use.
      sum_p_BGR: each document's sum of p, the unmasked softmax.
      chosen_BGR: how many of its tokens chose each expert.
      weights_BR: sum of w, the softmax inside the pool, over tokens of documents. Differentiable.
      z_BS: logsumexp inside the pool. Differentiable.
      entropy_BS: of p, in nats.
    """

    indices_BSC: jax.Array
    weights_BSC: jax.Array
    in_pool_BGR: jax.Array
    sum_p_BGR: jax.Array
    chosen_BGR: jax.Array
    weights_BR: jax.Array
    z_BS: jax.Array
    entropy_BS: jax.Array


def default_implementation(platform: str) -> str:
    """Which formulation of `model.routing.route` is the fastest on a "cpu", "gpu" or "tpu"."""
    return "pallas_tpu" if platform == "tpu" else "xla"


def fits(logits_BSR: jax.Array, documents: int) -> bool:
    """Whether `fused_routing` takes such logits and so many documents a row."""
    _, length, experts = logits_BSR.shape
    few = max(experts, documents) <= MOST and experts * documents <= MOST_PAIRS
    # With a token being decoded, all lanes but one would be idle.
    return logits_BSR.dtype == jnp.float32 and few and length >= pallas_tpu.LANES


def fused_routing(
    logits_BSR: jax.Array,
    document_ids_BS: jax.Array,
    *,
    choices: int,
    documents: int,
    normalize: bool = False,
    size_BG: jax.Array | None = None,
    score_BGR: jax.Array | None = None,
    forced: int = 0,
    name: str = "",
    block: int | None = None,
) -> FusedRouting:
    """Pools, top-C and sums of whole rows, by a kernel for TPU that reads the logits once, forward and backward.

    The specification, and the oracle, is `model.routing.route`. On several devices call it within a map over rows.

    Args:
      logits_BSR: float32, as `fits` has them; none infinite.
      document_ids_BS: int32, 0..G.
      choices: C.
      documents: G.
      normalize: scale the chosen weights to sum to 1.
      size_BG: int32, sizes of the pools, C or more; None: no pools.
      score_BGR: float32, not negative: the pools are the experts of largest score; None: of largest `sum_p_BGR`.
      forced: the last so many experts are in every pool and count towards its size.
      name: of what is decided (pools, choices, weights and z), for remat policies.
      block: most tokens that are fetched at once, a multiple of 128; None: by the number of experts.
    """
    kind = "none" if size_BG is None else "document" if score_BGR is None else "random"
    plan = pallas_tpu.Plan(choices, normalize, kind, forced, name, block)
    if size_BG is None:
        size_BG = jnp.zeros((len(logits_BSR), documents), jnp.int32)
    routed = pallas_tpu.route_rows(
        plan,
        logits_BSR.swapaxes(1, 2),
        document_ids_BS[:, None],
        size_BG[:, None],
        None if score_BGR is None else score_BGR.swapaxes(1, 2),
    )
    return FusedRouting(
        routed.indices_BCS.swapaxes(1, 2),
        routed.weights_BCS.swapaxes(1, 2),
        routed.in_pool_BRG.swapaxes(1, 2) > 0.5,
        routed.sum_p_BRG.swapaxes(1, 2),
        routed.chosen_BRG.swapaxes(1, 2),
        routed.weights_BRL.sum(-1),
        routed.z_B1S[:, 0],
        routed.entropy_B1S[:, 0],
    )

"""Which experts does a token use? Document pools, top-k, and the losses that keep the router healthy.

The paper's method (arXiv 2605.06663, section 3), without meshes, and to be read without kernels. Letters: B rows,
S sequence, G documents a row, R routed experts, C choices a token, L mixture layers. Document ids run 1..G; id 0 is a
token that no router counts and no expert sees.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from emo_jax.errors import require_choice
from emo_jax.kernels.routing import IMPLEMENTATIONS, fits, fused_routing
from emo_jax.model.config import PoolConfig

DECISIONS = "decisions"
"""Name of pools and chosen experts for remat policies."""
FEW_CHOICES = 4
"""Up to here, looking for the maximum again and again is faster than `lax.top_k` (on CPU twice)."""


class Kept(NamedTuple):
    """A subset of a layer's experts; the others are never chosen.

    Attributes:
      mask_R: bool, the experts that are kept, C or more; or [B, 1, R], a choice of each row's own.
      renormalized: bool scalar; true: weights are the softmax over the kept experts, as the papers have it (and as in a
        model that holds no others); false: they keep the probabilities that the whole router gives them.
    """

    mask_R: jax.Array
    renormalized: jax.Array


class PoolDraws(NamedTuple):
    """A step's random draws, made once for all its rows; microbatches slice them.

    Attributes:
      size_BLG: int32, experts in the pool of each row's document, for every mixture layer; None: no pools.
      seed_BLG: uint32 [B, L, G, 2], key data of the expert order in `random` pools.
      noise_BL2: uint32, key data of the noise on the gates of split layers; None: no noise.
      noise_scale_B: its standard deviation, the same for all rows.
    """

    size_BLG: Any
    seed_BLG: Any
    noise_BL2: Any = None
    noise_scale_B: Any = None

    def pools(self, layer: int) -> dict[str, Any]:
        """Those of one mixture layer that `route` takes; none, where documents have no pools."""
        if self.size_BLG is None:
            return {}
        return {"size_BG": self.size_BLG[:, layer], "seed_BG2": self.seed_BLG[:, layer]}


class RoutingTotals(NamedTuple):
    """Sums over the routed tokens (or documents) of each row; a loss or a metric is made of nothing else.

    Attributes:
      tokens_B: routed tokens.
      documents_B: documents.
      counts_BR: tokens that chose each expert.
      weights_BR: sum of w, the softmax inside the pool. Carries the balance loss's gradient.
      z_B: sum of logsumexp(z')². Carries the router z-loss's gradient.
      token_entropy_B: sum over tokens of the entropy of the unmasked softmax, in nats.
      document_entropy_B: sum over documents of the entropy of their mean unmasked softmax, in nats.
      pool_mass_B: sum over tokens of the unmasked probability inside their pool.
      pool_size_B: sum over documents of the pool's size, at most R.
      pool_min_B: smallest pool of the row; R where it has no document.
      pool_max_B: largest pool of the row; 0 where it has no document.
      unique_B: sum over documents of the number of different experts their tokens chose.
    """

    tokens_B: jax.Array
    documents_B: jax.Array
    counts_BR: jax.Array
    weights_BR: jax.Array
    z_B: jax.Array
    token_entropy_B: jax.Array
    document_entropy_B: jax.Array
    pool_mass_B: jax.Array
    pool_size_B: jax.Array
    pool_min_B: jax.Array
    pool_max_B: jax.Array
    unique_B: jax.Array


class Routing(NamedTuple):
    """What a layer's router decided.

    Attributes:
      indices_BSC: int32 chosen experts, always active ones first, by falling weight; R for a token of document 0, and
        with `partial` where there was no further expert to choose.
      weights_BSC: their weights, in the logits' precision; 0 for a token of document 0.
      logits_BSR: router logits z, unmasked.
      in_pool_BGR: bool, the experts that each document may use.
      totals: sums for losses and metrics.
      load_NC: int32 [devices, chunks], choices that arrived on each device that computes experts for others; else None.
    """

    indices_BSC: jax.Array
    weights_BSC: jax.Array
    logits_BSR: jax.Array
    in_pool_BGR: jax.Array
    totals: RoutingTotals
    load_NC: jax.Array | None = None


def draw_pools(
    pool: PoolConfig, seed: int, step: jax.Array, *, rows: int, layers: int, documents: int, experts: int
) -> PoolDraws:
    """Draws n[l,b,g] uniformly from pool.min..pool.max, independently per layer and document.

    A row's draws depend on (seed, step, the row's place in the step) alone, so neither microbatches, remat,
    the mesh nor added rows change them.

    Args:
      pool: its `start_step` makes every pool whole before that step, its `narrowing_steps` widen the range after;
        with its `whole_fraction`, from its `whole_step` on, some documents have no pool in any layer.
      seed: of the run.
      step: int32 scalar.
      rows, layers, documents: B, L, G.
      experts: the largest R, the size that means "no pool".
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))

    low, high = jnp.int32(pool.min), jnp.int32(pool.max)
    if pool.narrowing_steps:
        done = jnp.clip((step - pool.start_step) / pool.narrowing_steps, 0, 1)
        low, high = (jnp.round(experts + done * (end - experts)).astype(jnp.int32) for end in (low, high))

    def draw(row_key: jax.Array) -> PoolDraws:
        size_key, order_key = jax.random.split(row_key)
        shape = (layers, documents)
        size = jax.random.randint(size_key, shape, low, high + 1, dtype=jnp.int32)
        if pool.whole_fraction:
            whole_key = jax.random.fold_in(row_key, 2)  # the other draws stay as they are without it
            whole_G = jax.random.bernoulli(whole_key, pool.whole_fraction, (documents,)) & (step >= pool.whole_step)
            size = jnp.where(whole_G, experts, size)
        return PoolDraws(size, jax.random.bits(order_key, (*shape, 2), jnp.uint32))

    draws = jax.vmap(draw)(row_keys)
    return draws._replace(size_BLG=jnp.where(step >= pool.start_step, draws.size_BLG, experts))


def draw_noise(
    draws: PoolDraws | None, seed: int, step: jax.Array, scale: float, *, rows: int, layers: int
) -> PoolDraws:
    """A step's draws with those of the gates' noise too; they depend on what those of `draw_pools` do."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step), 2**31)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))
    noise_BL2 = jax.vmap(lambda key: jax.random.bits(key, (layers, 2), jnp.uint32))(keys_B)
    draws = draws or PoolDraws(None, None)
    return draws._replace(noise_BL2=noise_BL2, noise_scale_B=jnp.full(rows, scale, jnp.float32))


def choose_pool(score_BGR: jax.Array, size_BG: jax.Array, forced: int = 0) -> jax.Array:
    """The n experts with the largest score, ties to the lower index: bool [B, G, R].

    Args:
      score_BGR: P[doc], the document's summed router probabilities (or a random order).
      size_BG: n; at R or more, all experts.
      forced: the last so many experts are in every pool and count towards n.
    """
    experts = score_BGR.shape[-1]
    index_11R = jnp.arange(experts).reshape(1, 1, experts)
    score_BGR = jnp.where(index_11R >= experts - forced, jnp.inf, score_BGR)
    mine, other = score_BGR[..., :, None], score_BGR[..., None, :]
    # Counting who is ahead needs no sort: R² comparisons fuse into one pass, and ties are explicit.
    ahead = (other > mine) | ((other == mine) & (index_11R[..., None, :] < index_11R[..., :, None]))
    return ahead.sum(-1) < size_BG[..., None]


def random_scores(seed_BG2: jax.Array, experts: int) -> jax.Array:
    """A uniform score for each expert of each document [B, G, R], from key data [B, G, 2]."""
    keys_BG = jax.random.wrap_key_data(seed_BG2, impl="threefry2x32")
    draw = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (experts,), jnp.float32)))
    return draw(keys_BG)


def route(
    logits_BSR: jax.Array,
    document_ids_BS: jax.Array,
    *,
    choices: int,
    normalize: bool = False,
    pool: PoolConfig | None = None,
    size_BG: jax.Array | None = None,
    seed_BG2: jax.Array | None = None,
    voters_BS: jax.Array | None = None,
    documents: int = 1,
    kept: Kept | None = None,
    always_active: tuple[int, ...] = (),
    partial: bool = False,
    implementation: str = "xla",
) -> Routing:
    """Pools, top-C and the sums that losses and metrics need, of one layer.

    Args:
      logits_BSR: z, float32 or wider.
      document_ids_BS: int32, 0..G.
      choices: C.
      normalize: scale the chosen weights to sum to 1.
      pool: None or kind "none": no pool.
      size_BG, seed_BG2: this layer's `PoolDraws`; a pool needs its size, a random one its seed too.
      voters_BS: bool, the tokens whose probabilities choose a document's pool, such as its prompt's; None: all of them.
      documents: G, needed without a pool (for the statistics of documents).
      kept: a subset of the experts; None: all.
      always_active: experts that every token chooses, at the weight that the router gives them.
      partial: a pool or a subset may leave a token fewer than C experts; it then chooses those.
      implementation: `xla`: the lines below. `pallas_tpu`: a kernel that does as they do and reads the logits once; it
        takes whole rows of float32 without voters, subsets or always active experts, and leaves others to the lines.
    """
    require_choice("implementation", implementation, IMPLEMENTATIONS)
    experts = logits_BSR.shape[-1]
    always_R = jnp.isin(jnp.arange(experts), jnp.array(always_active, jnp.int32))
    documents = documents if size_BG is None else size_BG.shape[-1]
    whole = voters_BS is None and kept is None and not always_active and not partial
    if implementation == "pallas_tpu" and whole and fits(logits_BSR, documents):
        return _fused(logits_BSR, document_ids_BS, choices, normalize, pool, size_BG, seed_BG2, documents)
    dtype = logits_BSR.dtype
    routed_BS = document_ids_BS > 0
    document_BSG = jax.nn.one_hot(document_ids_BS - 1, documents, dtype=dtype)  # id 0: a row of zeros
    length_BG = document_BSG.sum(1)
    exists_BG = length_BG > 0

    log_p_BSR = jax.nn.log_softmax(jax.lax.stop_gradient(logits_BSR))
    p_BSR = jnp.exp(log_p_BSR)
    sum_p_BGR = jnp.einsum("bsg,bsr->bgr", document_BSG, p_BSR, precision="highest")
    in_pool_BGR = jnp.ones(sum_p_BGR.shape, bool)
    if pool is None or pool.kind == "none":
        masked_BSR, pool_mass_BS, size_BG = logits_BSR, p_BSR.sum(-1), jnp.full_like(length_BG, experts)
    else:
        assert size_BG is not None, "a pool needs its size"
        score_BGR = sum_p_BGR
        if voters_BS is not None or kept is not None:
            voted_BSR = p_BSR
            if kept is not None:  # as in a model that holds no others; they come last where a pool is larger
                voted_BSR = jax.nn.softmax(jnp.where(kept.mask_R, jax.lax.stop_gradient(logits_BSR), -jnp.inf))
            voter_BSG = document_BSG if voters_BS is None else document_BSG * voters_BS[..., None]
            score_BGR = jnp.einsum("bsg,bsr->bgr", voter_BSG, voted_BSR, precision="highest")
        if pool.kind == "random":
            assert seed_BG2 is not None, "a random pool needs its seed"
            score_BGR = random_scores(seed_BG2, experts)
        score_BGR = jnp.where(always_R, jnp.inf, score_BGR) if always_active else score_BGR
        in_pool_BGR = checkpoint_name(choose_pool(score_BGR, size_BG, pool.forced), DECISIONS)
        # Exact in any precision: each token has one document. Tokens of document 0 keep every logit finite.
        in_pool_BSR = jnp.einsum("bsg,bgr->bsr", document_BSG, in_pool_BGR.astype(dtype)) > 0.5
        in_pool_BSR |= ~routed_BS[..., None]
        masked_BSR = jnp.where(in_pool_BSR, logits_BSR, -jnp.inf)
        pool_mass_BS = jnp.where(in_pool_BSR, p_BSR, 0).sum(-1)
        size_BG = jnp.minimum(size_BG, experts)

    if kept is not None:
        masked_BSR = jnp.where(kept.mask_R, masked_BSR, -jnp.inf)
        in_pool_BGR = jnp.where(kept.mask_R, in_pool_BGR, False)
    z_BS = jax.nn.logsumexp(masked_BSR, axis=-1)
    w_BSR = jnp.exp(masked_BSR - z_BS[..., None])
    if kept is not None:
        w_BSR = jnp.where(kept.renormalized, w_BSR, jnp.where(masked_BSR > -jnp.inf, p_BSR, 0))
    # By logits, not by w: equal order, but no ties where exp underflows, so a masked expert is never chosen.
    wanted_BSR = jnp.where(always_R, jnp.inf, masked_BSR) if always_active else masked_BSR
    wanted_BSR = jax.lax.stop_gradient(wanted_BSR)
    indices_BSC = _largest(wanted_BSR, choices)
    if partial:
        there_BSC = jnp.take_along_axis(wanted_BSR, indices_BSC, axis=-1) > -jnp.inf
        indices_BSC = jnp.where(there_BSC, indices_BSC, experts)
    indices_BSC = checkpoint_name(indices_BSC, DECISIONS)
    chosen_BSCR = jax.nn.one_hot(indices_BSC, experts, dtype=dtype)
    weights_BSC = (w_BSR[:, :, None, :] * chosen_BSCR).sum(-1)  # a gather whose transpose is not a scatter
    if normalize:
        weights_BSC /= weights_BSC.sum(-1, keepdims=True)

    mask_BS = routed_BS.astype(dtype)
    chosen_BSR = chosen_BSCR.sum(2) * mask_BS[..., None]
    chosen_BGR = jnp.einsum("bsg,bsr->bgr", document_BSG, chosen_BSR)
    mean_p_BGR = sum_p_BGR / jnp.maximum(length_BG, 1)[..., None]
    totals = RoutingTotals(
        tokens_B=mask_BS.sum(1),
        documents_B=exists_BG.astype(dtype).sum(1),
        counts_BR=chosen_BSR.sum(1),
        weights_BR=(w_BSR * mask_BS[..., None]).sum(1),
        z_B=jnp.where(routed_BS, jnp.square(z_BS), 0).sum(1),
        token_entropy_B=(-(p_BSR * log_p_BSR).sum(-1) * mask_BS).sum(1),
        document_entropy_B=jax.scipy.special.entr(mean_p_BGR).sum((1, 2)),
        pool_mass_B=(pool_mass_BS * mask_BS).sum(1),
        pool_size_B=jnp.where(exists_BG, size_BG, 0).astype(dtype).sum(1),
        pool_min_B=jnp.where(exists_BG, size_BG, experts).astype(dtype).min(1),
        pool_max_B=jnp.where(exists_BG, size_BG, 0).astype(dtype).max(1),
        unique_B=(chosen_BGR > 0).astype(dtype).sum((1, 2)),
    )
    return Routing(
        jnp.where(routed_BS[..., None], indices_BSC, experts).astype(jnp.int32),
        weights_BSC * mask_BS[..., None],
        logits_BSR,
        in_pool_BGR,
        totals,
    )


def _fused(
    logits_BSR: jax.Array,
    document_ids_BS: jax.Array,
    choices: int,
    normalize: bool,
    pool: PoolConfig | None,
    size_BG: jax.Array | None,
    seed_BG2: jax.Array | None,
    documents: int,
) -> Routing:
    """`route`, by a kernel; what is one number a document is added up here."""
    experts, dtype, score_BGR = logits_BSR.shape[-1], logits_BSR.dtype, None
    if pool is None or pool.kind == "none":
        pool, size_BG = None, None
    elif pool.kind == "random":
        assert seed_BG2 is not None, "a random pool needs its seed"
        score_BGR = random_scores(seed_BG2, experts)
    fused = fused_routing(
        logits_BSR,
        document_ids_BS,
        choices=choices,
        documents=documents,
        normalize=normalize,
        size_BG=size_BG,
        score_BGR=score_BGR,
        forced=pool.forced if pool else 0,
        name=DECISIONS,
    )
    routed_BS = document_ids_BS > 0
    length_BG = (document_ids_BS[..., None] == jnp.arange(1, documents + 1).reshape(1, 1, -1)).astype(dtype).sum(1)
    exists_BG = length_BG > 0
    size_BG = jnp.full_like(length_BG, experts) if size_BG is None else jnp.minimum(size_BG, experts)
    mean_p_BGR = fused.sum_p_BGR / jnp.maximum(length_BG, 1)[..., None]
    totals = RoutingTotals(
        tokens_B=routed_BS.astype(dtype).sum(1),
        documents_B=exists_BG.astype(dtype).sum(1),
        counts_BR=fused.chosen_BGR.sum(1),
        weights_BR=fused.weights_BR,
        z_B=jnp.where(routed_BS, jnp.square(fused.z_BS), 0).sum(1),
        token_entropy_B=jnp.where(routed_BS, fused.entropy_BS, 0).sum(1),
        document_entropy_B=jax.scipy.special.entr(mean_p_BGR).sum((1, 2)),
        pool_mass_B=jnp.where(fused.in_pool_BGR, fused.sum_p_BGR, 0).sum((1, 2)),
        pool_size_B=jnp.where(exists_BG, size_BG, 0).astype(dtype).sum(1),
        pool_min_B=jnp.where(exists_BG, size_BG, experts).astype(dtype).min(1),
        pool_max_B=jnp.where(exists_BG, size_BG, 0).astype(dtype).max(1),
        unique_B=(fused.chosen_BGR > 0).astype(dtype).sum((1, 2)),
    )
    return Routing(fused.indices_BSC, fused.weights_BSC, logits_BSR, fused.in_pool_BGR, totals)


def _largest(logits_BSR: jax.Array, choices: int) -> jax.Array:
    """Indices of the C largest, by falling value, ties to the lower index: int32 [B, S, C]."""
    experts = logits_BSR.shape[-1]
    if choices > FEW_CHOICES:
        return jax.lax.top_k(logits_BSR, choices)[1]
    index_11R = jnp.arange(experts, dtype=jnp.int32).reshape(1, 1, -1)
    found = []
    for _ in range(choices):
        largest_BS1 = logits_BSR.max(-1, keepdims=True)
        found.append(jnp.where(logits_BSR == largest_BS1, index_11R, experts - 1).min(-1))
        logits_BSR = jnp.where(index_11R == found[-1][..., None], -jnp.inf, logits_BSR)
    return jnp.stack(found, axis=-1)


def balance_loss(
    counts_R: jax.Array,
    weights_R: jax.Array,
    tokens: jax.Array,
    choices: int,
    counted_tokens: jax.Array | None = None,
) -> jax.Array:
    """(R / C) Σ_e f_e p̄_e (paper, L_LB): 1 at perfect balance, 0 without tokens; no gradient through f.

    Args:
      counts_R: tokens that chose each expert. Leading axes, if any, are separate scopes, here and below.
      weights_R: sum of w over the scope's tokens.
      tokens: how many tokens that is.
      choices: C.
      counted_tokens: tokens that `counts_R` covers where they are not the same (the running buffer of
        arXiv 2501.11873, algorithm 1).
    """
    counted_tokens = tokens if counted_tokens is None else counted_tokens
    f_R = jax.lax.stop_gradient(counts_R) / jnp.maximum(counted_tokens, 1)[..., None]
    mean_w_R = weights_R / jnp.maximum(tokens, 1)[..., None]
    return counts_R.shape[-1] / choices * (f_R * mean_w_R).sum(-1)


def importance_loss(weights_R: jax.Array) -> jax.Array:
    """CV(Σ_tokens w)², the squared coefficient of variation over experts (arXiv 1701.06538, equation 7): 0 when even.

    Args:
      weights_R: sum of w over the scope's tokens; leading axes, if any, are separate scopes.
    """
    return weights_R.var(-1) / jnp.maximum(jnp.square(weights_R.mean(-1)), 1e-20)

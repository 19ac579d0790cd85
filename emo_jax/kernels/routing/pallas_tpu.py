"""The kernels of `fused_routing` for TPU: one pass over a row's logits forward, one backward.

Tokens lie on lanes and experts on sublanes: a sum over experts adds whole registers, and what has one value a token is
compact. Letters: B rows, S sequence, R experts (in a kernel padded to whole sublanes), G documents (padded to whole
lanes), C choices, W tokens that are worked on at once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
BLOCK_BYTES = 2**19
"""Logits of a block, which are fetched at once, unless 128 tokens have more."""
PART_BYTES = 2**18
"""Logits that are worked on at once, unless 128 tokens have more: in the compiler's schedules for 127 experts a tenth
faster than 2^17, which registers could hold."""
ROW_BYTES = 2**22
"""Largest row whose logits stay in fast memory until its pools are known; longer ones are read twice."""
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Logit of what is no expert of the pool: its exponential is 0, and 0 times it, unlike −inf, is not NaN."""
INFINITY = 0x7F800000
"""Bits of float32's infinity."""


class Plan(NamedTuple):
    """What is known when a kernel is compiled; fields as the arguments of `fused_routing`."""

    choices: int
    normalize: bool
    kind: str
    forced: int
    name: str
    block: int | None


class Routed(NamedTuple):
    """Results of the forward kernel; float32 throughout, but for the indices.

    Attributes:
      indices_BCS, weights_BCS, z_B1S, entropy_B1S: of tokens.
      in_pool_BRG: 1 for the experts of a document's pool, else 0.
      sum_p_BRG: a document's summed router probabilities.
      chosen_BRG: how many of a document's tokens chose each expert.
      weights_BRL: sums of w over the tokens of routed documents, those of each lane apart.
    """

    indices_BCS: Any
    weights_BCS: Any
    z_B1S: Any
    entropy_B1S: Any
    in_pool_BRG: Any
    sum_p_BRG: Any
    chosen_BRG: Any
    weights_BRL: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def route_rows(
    plan: Plan, logits_BRS: jax.Array, ids_B1S: jax.Array, size_B1G: jax.Array, score_BRG: jax.Array | None
) -> Routed:
    """Pools, choices, weights and sums; differentiable in the weights, their sums and z.

    Args:
      plan: see there.
      logits_BRS: float32.
      ids_B1S: int32, 0..G.
      size_B1G: int32, sizes of pools.
      score_BRG: float32, not negative: what chooses `random` pools; else None.
    """
    rows, experts, length = logits_BRS.shape
    documents = size_B1G.shape[-1]
    padded = _up(experts, SUBLANES)
    block, blocks = _blocks(plan, padded, length)
    # Phase 0 sums probabilities, phase 1 needs the pools made of them. Pools that are not, or none, need no two phases.
    phases = 2 if plan.kind == "document" else 1
    kept = phases == 2 and padded * block * blocks * 4 <= ROW_BYTES

    def once(of: int, phase: int) -> pl.BlockSpec:
        """Blocks that only this phase visits: in the other one, the index rests where nothing is moved."""
        return _tokens(of, block, lambda f, t: jnp.where(f == phase, t, 0 if phase else blocks - 1))

    by_document = _row(padded, _up(documents, LANES))
    chosen = [once(plan.choices, phases - 1)] * 2 + [once(1, phases - 1)]
    shapes = [(plan.choices, length)] * 2 + [(1, length)] * 2 + [(experts, documents)] * 3 + [(experts, LANES)]
    out_shape = [
        jax.ShapeDtypeStruct((rows, *shape), jnp.float32 if place else jnp.int32) for place, shape in enumerate(shapes)
    ]
    given = [logits_BRS, ids_B1S, size_B1G, *([] if score_BRG is None else [score_BRG])]
    again = [] if kept or phases == 1 else [logits_BRS]
    results = pl.pallas_call(
        functools.partial(_forward_kernel, plan, experts, length, kept),
        grid=(rows, phases, blocks),
        in_specs=[
            once(padded, 0) if kept else _tokens(padded, block),
            _tokens(1, block),
            _row(1, _up(documents, LANES)),
            *([] if score_BRG is None else [by_document]),
        ],
        out_specs=[*chosen, once(1, 0), *[by_document] * 3, _row(padded, LANES)],
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((padded, block * blocks), jnp.float32)] if kept else [],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(logits_BRS, documents, 5 if plan.kind != "none" else 4, [*given, *again, *out_shape]),
        name="routing",
    )(*given)
    return Routed(*results)


def _forward_kernel(
    plan: Plan, experts: int, length: int, kept: bool, logits_ref: Any, ids_ref: Any, size_ref: Any, *refs: Any
) -> None:
    score_ref, *results = refs if plan.kind == "random" else (None, *refs)
    out, row_ref = Routed(*results[: len(Routed._fields)]), results[-1]
    phase, t = pl.program_id(1), pl.program_id(2)

    @pl.when((phase == 0) & (t == 0))
    def begin() -> None:
        for ref in (out.sum_p_BRG, out.chosen_BRG, out.weights_BRL):
            ref[...] = jnp.zeros_like(ref)
        if plan.kind == "random":
            out.in_pool_BRG[0] = _pools(score_ref[0], size_ref[0], experts, plan.forced)
        elif plan.kind == "none":
            out.in_pool_BRG[...] = jnp.ones_like(out.in_pool_BRG)

    def read(lanes: Any, first: Any) -> tuple[jax.Array, jax.Array]:
        return _read(logits_ref, ids_ref, lanes, first, experts, length)

    def sum_up(lanes: Any, first: Any) -> None:
        logits_RW, ids_1W = read(lanes, first)
        if kept:
            row_ref[:, pl.ds(first, lanes.size)] = logits_RW
        below_RW = logits_RW - logits_RW.max(0, keepdims=True)
        exp_RW = jnp.exp(below_RW)
        sum_1W = exp_RW.sum(0, keepdims=True)
        share_1W = 1 / sum_1W
        out.entropy_B1S[0, :, lanes] = jnp.log(sum_1W) - (exp_RW * below_RW).sum(0, keepdims=True) * share_1W
        # Each probability as three numbers of 8 bits: exact in bfloat16, and so are their products with 0 and 1.
        rest_RW, document_GW = exp_RW * share_1W, _one_hot(ids_1W, out.sum_p_BRG)
        for _ in range(3):
            part_RW = pltpu.bitcast(pltpu.bitcast(rest_RW, jnp.int32) & -(2**16), jnp.float32)
            out.sum_p_BRG[0] += _by_document(part_RW, document_GW)
            rest_RW -= part_RW

    def choose(lanes: Any, first: Any) -> None:
        logits_RW, ids_1W = read(lanes, first)
        if kept:
            logits_RW = row_ref[:, pl.ds(first, lanes.size)]
        document_GW = _one_hot(ids_1W, out.chosen_BRG)
        if plan.kind != "none":
            logits_RW = _inside(logits_RW, ids_1W, out.in_pool_BRG, document_GW)
        largest_1W = logits_RW.max(0, keepdims=True)
        exp_RW = jnp.exp(logits_RW - largest_1W)
        sum_1W = exp_RW.sum(0, keepdims=True)
        out.z_B1S[0, :, lanes] = largest_1W + jnp.log(sum_1W)
        share_1W = jnp.where(ids_1W > 0, 1 / sum_1W, 0.0)
        w_RW = exp_RW * share_1W
        out.weights_BRL[0] += sum(w_RW[:, start : start + LANES] for start in range(0, lanes.size, LANES))

        index_RW = _iota(logits_RW.shape, 0).astype(jnp.float32)  # chips have a minimum of floats, not of integers
        weights, unchosen_RW = [], logits_RW
        for choice in range(plan.choices):
            top_1W = unchosen_RW.max(0, keepdims=True)
            index_1W = jnp.where(unchosen_RW == top_1W, index_RW, float(experts)).min(0, keepdims=True)
            unchosen_RW = jnp.where(index_RW == index_1W, -jnp.inf, unchosen_RW)
            weights.append(jnp.exp(top_1W - largest_1W) * share_1W)
            index_1W = jnp.where(ids_1W > 0, index_1W, float(experts))
            out.indices_BCS[0, choice : choice + 1, lanes] = index_1W.astype(jnp.int32)
        total_1W = jnp.where(ids_1W > 0, sum(weights), 1.0) if plan.normalize else 1.0
        for choice, weight_1W in enumerate(weights):
            out.weights_BCS[0, choice : choice + 1, lanes] = weight_1W / total_1W
        out.chosen_BRG[0] += _by_document(jnp.where(unchosen_RW == -jnp.inf, 1.0, 0.0), document_GW)

    @pl.when(phase == 0)
    def sum_all() -> None:
        _in_parts(t, logits_ref.shape, sum_up)

    if plan.kind == "document":

        @pl.when((phase == 0) & (t == pl.num_programs(2) - 1))
        def decide() -> None:
            out.in_pool_BRG[0] = _pools(out.sum_p_BRG[0], size_ref[0], experts, plan.forced)

    @pl.when(phase == pl.num_programs(1) - 1)
    def choose_all() -> None:
        _in_parts(t, logits_ref.shape, choose)


def _pools(score_RG: jax.Array, size_1G: jax.Array, experts: int, forced: int) -> jax.Array:
    """`choose_pool`: 1 for the n experts of largest score, ties to the lower index, else 0: [R, G].

    The n-th largest is found bit by bit: those of floats that are not negative order as the floats do.
    """
    index_RG = _iota(score_RG.shape, 0)
    bits_RG = jnp.where(index_RG < experts - forced, pltpu.bitcast(score_RG, jnp.int32), INFINITY)
    bits_RG = jnp.where(index_RG < experts, bits_RG, -1)

    def count(wanted_RG: jax.Array) -> jax.Array:
        return jnp.where(wanted_RG, 1.0, 0.0).sum(0, keepdims=True)

    def narrow(step: Any, nth_1G: jax.Array) -> jax.Array:
        higher_1G = nth_1G | (1 << (30 - step))
        return jnp.where(count(bits_RG >= higher_1G) >= wanted_1G, higher_1G, nth_1G)

    wanted_1G = size_1G.astype(jnp.float32)
    nth_1G = jax.lax.fori_loop(0, 31, narrow, jnp.zeros_like(size_1G))
    square = (len(score_RG),) * 2
    lower_RR = jnp.where(_iota(square, 0) > _iota(square, 1), 1.0, 0.0).astype(jnp.bfloat16)
    tied_RG = jnp.where(bits_RG == nth_1G, 1.0, 0.0)
    rank_RG = jnp.dot(lower_RR, tied_RG.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    room_1G = wanted_1G - count(bits_RG > nth_1G)
    return jnp.where((bits_RG > nth_1G) | ((tied_RG > 0) & (rank_RG < room_1G)), 1.0, 0.0)


def _route_rows_forward(plan: Plan, logits_BRS: jax.Array, ids_B1S: jax.Array, *pools: Any) -> tuple[Routed, Any]:
    routed = route_rows(plan, logits_BRS, ids_B1S, *pools)
    # Where these are kept, a backward pass has no use for the forward kernel: what was decided is not decided again,
    # and its weights are not computed again from logits that would decide otherwise.
    decided = ("indices_BCS", "weights_BCS", "z_B1S", "in_pool_BRG")
    routed = routed._replace(**{field: checkpoint_name(getattr(routed, field), plan.name) for field in decided})
    return routed, (logits_BRS, ids_B1S, routed.in_pool_BRG, routed.indices_BCS)


def _route_rows_backward(plan: Plan, saved: Any, cotangents: Routed) -> tuple[jax.Array | None, ...]:
    logits_BRS, ids_B1S, in_pool_BRG, indices_BCS = saved
    rows, experts, length = logits_BRS.shape
    padded, documents = _up(experts, SUBLANES), _up(in_pool_BRG.shape[-1], LANES)
    block, blocks = _blocks(plan, padded, length)
    given = [
        logits_BRS,
        ids_B1S,
        indices_BCS,
        cotangents.weights_BCS,
        cotangents.z_B1S,
        in_pool_BRG,
        cotangents.weights_BRL,
    ]
    of_tokens = [_tokens(of, block) for of in (padded, 1, plan.choices, plan.choices, 1)]
    gradient_BRS = pl.pallas_call(
        functools.partial(_backward_kernel, plan, experts, length),
        grid=(rows, 1, blocks),
        in_specs=[*of_tokens, _row(padded, documents), _row(padded, LANES)],
        out_specs=of_tokens[0],
        out_shape=jax.ShapeDtypeStruct(logits_BRS.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=_cost(logits_BRS, documents, 1 if plan.kind != "none" else 0, [*given, logits_BRS]),
        name="routing_backward",
    )(*given)
    return gradient_BRS, None, None, None


def _backward_kernel(
    plan: Plan,
    experts: int,
    length: int,
    logits_ref: Any,
    ids_ref: Any,
    indices_ref: Any,
    weights_ref: Any,
    z_ref: Any,
    in_pool_ref: Any,
    sums_ref: Any,
    gradient_ref: Any,
) -> None:
    def pull_back(lanes: Any, first: Any) -> None:
        logits_RW, ids_1W = _read(logits_ref, ids_ref, lanes, first, experts, length)
        if plan.kind != "none":
            logits_RW = _inside(logits_RW, ids_1W, in_pool_ref, _one_hot(ids_1W, in_pool_ref))
        exp_RW = jnp.exp(logits_RW - logits_RW.max(0, keepdims=True))
        w_RW = exp_RW * (1 / exp_RW.sum(0, keepdims=True))
        index_RW = _iota(w_RW.shape, 0)
        # The cotangent of w: of its sums, and, where an expert was chosen, of the weight that it became.
        cotangent_RW, chosen_RW = jnp.zeros_like(w_RW), jnp.zeros_like(w_RW)
        for choice in range(plan.choices):
            here_RW = index_RW == indices_ref[0, choice : choice + 1, lanes]
            cotangent_RW = jnp.where(here_RW, weights_ref[0, choice : choice + 1, lanes], cotangent_RW)
            chosen_RW = jnp.where(here_RW, 1.0, chosen_RW)
        if plan.normalize:
            total_1W = jnp.where(ids_1W > 0, (chosen_RW * w_RW).sum(0, keepdims=True), 1.0)
            mean_1W = (cotangent_RW * w_RW).sum(0, keepdims=True) / total_1W
            cotangent_RW = (cotangent_RW - chosen_RW * mean_1W) / total_1W
        sums_RL = jnp.where(_iota(sums_ref.shape[1:], 0) < experts, sums_ref[0], 0.0)
        cotangent_RW += jnp.concatenate([sums_RL] * (lanes.size // LANES), axis=1)
        # A softmax's pullback of a is w (a − Σ a w), and that of its logsumexp is w.
        pulled_1W = z_ref[0, :, lanes] - (cotangent_RW * w_RW).sum(0, keepdims=True)
        gradient_ref[0, :, lanes] = w_RW * jnp.where(ids_1W > 0, cotangent_RW + pulled_1W, 0.0)

    _in_parts(pl.program_id(2), logits_ref.shape, pull_back)


route_rows.defvjp(_route_rows_forward, _route_rows_backward)


def _read(
    logits_ref: Any, ids_ref: Any, lanes: Any, first: Any, experts: int, length: int
) -> tuple[jax.Array, jax.Array]:
    """Logits [R, W] and ids [1, W] of a block's lanes, `first` in the row; rows and lanes beyond the arrays masked."""
    logits_RW, ids_1W = logits_ref[0, :, lanes], ids_ref[0, :, lanes]
    if length % logits_ref.shape[-1]:
        logits_RW = jnp.where(first + _iota(logits_RW.shape, 1) < length, logits_RW, 0.0)
        ids_1W = jnp.where(first + _iota(ids_1W.shape, 1) < length, ids_1W, 0)
    return jnp.where(_iota(logits_RW.shape, 0) < experts, logits_RW, MASKED), ids_1W


def _inside(logits_RW: jax.Array, ids_1W: jax.Array, in_pool_ref: Any, document_GW: jax.Array) -> jax.Array:
    """Logits masked outside each token's pool; those of document 0 as they are."""
    # Where an array has no documents, a block may hold anything, and 0 times that need not be 0.
    in_pool_RG = jnp.where(in_pool_ref[0] > 0.5, 1.0, 0.0).astype(jnp.bfloat16)
    in_pool_RW = jnp.dot(in_pool_RG, document_GW, preferred_element_type=jnp.float32)
    return jnp.where(in_pool_RW + jnp.where(ids_1W > 0, 0.0, 1.0) > 0.5, logits_RW, MASKED)


def _one_hot(ids_1W: jax.Array, by_document_ref: Any) -> jax.Array:
    """Each token's document, [G, W]; zeros for document 0."""
    document_GW = _iota((by_document_ref.shape[-1], ids_1W.shape[-1]), 0) + 1
    return jnp.where(document_GW == ids_1W, 1.0, 0.0).astype(jnp.bfloat16)


def _by_document(x_RW: jax.Array, document_GW: jax.Array) -> jax.Array:
    """Sums over each document's tokens, [R, G], of what is exact in bfloat16."""
    over_tokens = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_RW.astype(jnp.bfloat16), document_GW, over_tokens, preferred_element_type=jnp.float32)


def _in_parts(t: Any, shape: tuple[int, ...], work: Callable[[Any, Any], None]) -> None:
    """Calls `work` with the lanes of each part of block t, [1, R, tokens], and with the place of its first token."""
    _, experts, block = shape
    width = max(LANES, min(PART_BYTES // (4 * experts), block) // LANES * LANES)
    width = next(some for some in range(width, 0, -LANES) if block % some == 0)

    def part(i: Any, _: None) -> None:
        start = pl.multiple_of(i * width, width)
        work(pl.ds(start, width), pl.multiple_of(t * block + start, width))

    jax.lax.fori_loop(0, block // width, part, None)


def _cost(logits_BRS: jax.Array, documents: int, products: int, moved: list[Any]) -> pl.CostEstimate:
    """With it, the compiler knows what can hide behind a kernel: products with documents, and arrays in HBM."""
    return pl.CostEstimate(
        flops=2 * products * logits_BRS.size * documents,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in moved),
        transcendentals=2 * logits_BRS.size,
    )


def _blocks(plan: Plan, experts: int, length: int) -> tuple[int, int]:
    """Tokens of a block, and how many blocks a row has."""
    block = plan.block or max(LANES, BLOCK_BYTES // (4 * experts) // LANES * LANES)
    block = min(block, _up(length, LANES))
    return block, pl.cdiv(length, block)


def _tokens(of: int, block: int, place: Callable[[Any, Any], Any] = lambda f, t: t) -> pl.BlockSpec:
    return pl.BlockSpec((1, of, block), lambda b, f, t: (b, 0, place(f, t)))


def _row(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, *shape), lambda b, f, t: (b, 0, 0))


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple

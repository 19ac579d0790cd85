"""Tokens to the ranks that hold their experts, and back: expert parallelism without a dropped token.

Two transports over the `expert` axis, each in rounds of a fixed buffer. With the ring, every rank receives the tokens
of all (all-gather), computes its own experts' share of the result, and shares are added where the tokens came from
(reduce-scatter): a token crosses once in each direction whatever its number of choices. With the all-to-all, a row
crosses for each choice, to the rank of its expert alone.

Letters: B rows, S sequence, T tokens of a device, D width, C choices, R routed experts, X ranks, F expert hidden,
M choices in expert order, N devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from emo_jax.kernels.experts.dispatch import combine, dispatch, dispatch_weights, plan
from emo_jax.parallel.config import AXES, MeshConfig
from emo_jax.parallel.sharding import GATHERED, TOKENS, mesh_axes, param_sharding, vary

Compute = Callable[..., jax.Array]
"""(x_TD, indices_TC, weights_TC, gate_RDF, up_RDF, down_RFD, filled=most choices with an expert) → y_TD."""

DISPATCHED, COMBINED = "dispatched", "combined"
"""Names for remat policies: tokens that arrived at their experts, and what came back."""


def best_exchange(ranks: int, choices: int) -> str:
    """The transport that sends fewer bytes: T·(X−1) rows against T·C·(X−1)/X, in each direction."""
    return "ring" if ranks <= choices else "all_to_all"


def map_experts(
    compute: Compute, mesh: Mesh | None, config: MeshConfig, keep: Callable[..., bool] | None = None
) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    """Runs routed experts on every device's own tokens, with each rank of the `expert` axis computing its own experts.

    Args:
      compute: the experts of some tokens; an index of R, one past the last, is a choice without.
      mesh: None, or one device: `compute` itself.
      config: its transport, buffer and chunks; its chunks must divide a device's tokens.
      keep: the remat policy for what a chunk computes, where there are several; None: all is kept.

    Returns:
      (x_BSD, indices_BSC, weights_BSC, gate_RDF, up_RDF, down_RFD) → y_BSD, and the choices that arrived on each
      device, int32 [N, chunks], or None where no device computes for others. Weights are as every device sees them
      whole.
    """
    ranks = mesh.shape["expert"] if mesh is not None else 1

    def cut(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        """The tokens' arrays [B, S, ...] in chunks, [chunks, T / chunks, ...]."""
        return tuple(a.reshape(config.chunks, -1, a.shape[-1]) for a in arrays)

    def in_turn(share: Callable[..., jax.Array], chunks: tuple) -> jax.Array:
        """The results of `share`, chunk after chunk, two of them in the compiler's sight."""
        if config.chunks == 1:
            return share(jax.tree.map(lambda a: a[0], chunks))[None]
        share = share if keep is None else jax.checkpoint(share, policy=keep)
        return jax.lax.scan(lambda _, chunk: (None, share(chunk)), None, chunks, unroll=min(2, config.chunks))[1]

    def alone(x_BSD: jax.Array, indices_BSC: jax.Array, weights_BSC: jax.Array, *experts: jax.Array) -> jax.Array:
        chunks = cut(x_BSD, indices_BSC, weights_BSC)
        return in_turn(lambda chunk: compute(*chunk, *experts), chunks).reshape(x_BSD.shape)

    if mesh is None or mesh.size == 1:
        return lambda *args: (alone(*args), None)

    def own_experts(w: jax.Array, spec: PartitionSpec, width: int) -> jax.Array:
        """This rank's experts, whole; what rests in pieces is exchanged here, so that gradients are scattered."""
        w = vary(w, spec)
        if ranks > 1 and "expert" in mesh_axes(spec):
            w = jax.lax.all_to_all(w, "expert", split_axis=0, concat_axis=3 - width, tiled=True)
        elif ranks > 1:
            count = len(w) // ranks
            w = jax.lax.dynamic_slice_in_dim(w, jax.lax.axis_index("expert") * count, count)
        if pieces := spec[width]:
            # Whole experts, where there are enough: gathered, they follow one another without a copy.
            regroup = len(w) % jax.lax.axis_size(pieces) == 0
            if regroup:
                w = jax.lax.all_to_all(w, pieces, split_axis=0, concat_axis=width, tiled=True)
            w = jax.lax.all_gather(w, pieces, axis=0 if regroup else width, tiled=True)
        return checkpoint_name(w, GATHERED)

    def exchanged(
        x_BSD: jax.Array, indices_BSC: jax.Array, weights_BSC: jax.Array, *own: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        choices = indices_BSC.shape[-1]
        kind = best_exchange(ranks, choices) if config.exchange == "auto" else config.exchange
        choices = indices_BSC.size // config.chunks
        size = buffer_size(choices, ranks, config.buffer)
        make = _ring if kind == "ring" else functools.partial(_all_to_all, ragged=platform != "cpu")
        transport = make(compute, size, len(own[0]), choices, ranks)
        x, indices, weights = cut(x_BSD, indices_BSC, weights_BSC)
        routes, loads = jax.lax.map(transport.route, indices)
        # Every rank takes part in each round of each.
        rounds = jax.lax.pmax(-(-loads // size), AXES)
        run = _in_rounds(transport.share, in_turn, math.ceil(ranks * choices / size))
        y = run(rounds, routes, (x, weights, own)).reshape(x_BSD.shape)
        return checkpoint_name(y, COMBINED), loads[None]

    platform = mesh.devices.flat[0].platform
    shards = math.prod(mesh.shape[axis] for axis in ("fsdp", "expert", "context"))

    def mapped(
        x_BSD: jax.Array, indices_BSC: jax.Array, weights_BSC: jax.Array, *experts: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        routed, widths = len(experts[0]), (1, 1, 2)  # where D is in gate, up and down
        slots = -(-routed // ranks) * ranks
        regrouped = -(-routed // shards) * shards
        slots = regrouped if regrouped <= 1.125 * routed else slots
        # Spare experts that no token chooses; a choice without an expert lies behind them.
        experts = tuple(jnp.pad(w, ((0, slots - routed), (0, 0), (0, 0))) for w in experts)
        indices_BSC = jnp.where(indices_BSC == routed, slots, indices_BSC)

        names = [("routed", "embed", "mlp"), ("routed", "embed", "mlp"), ("routed", "mlp", "embed")]
        specs = [
            param_sharding(mesh, PartitionSpec(*axes), w.shape).spec for axes, w in zip(names, experts, strict=True)
        ]

        def local(x_BSD: jax.Array, indices_BSC: jax.Array, weights_BSC: jax.Array, *experts: jax.Array) -> Any:
            own = tuple(own_experts(w, *rest) for w, rest in zip(experts, zip(specs, widths, strict=True), strict=True))
            return (exchanged if ranks > 1 else alone)(x_BSD, indices_BSC, weights_BSC, *own)

        out_specs = (TOKENS, PartitionSpec(AXES)) if ranks > 1 else TOKENS
        run = jax.shard_map(local, mesh=mesh, in_specs=(TOKENS, TOKENS, TOKENS, *specs), out_specs=out_specs)
        results = run(x_BSD, indices_BSC, weights_BSC, *experts)
        return results if ranks > 1 else (results, None)

    return mapped


def buffer_size(choices: int, ranks: int, buffer: float) -> int:
    """Choices that a rank computes in a round, where each of X ranks sends out T·C of them: no more than all."""
    return min(math.ceil(buffer * choices), ranks * choices)


def rank_load(loads_NC: jax.Array, mesh: Mesh, choices: int, buffer: float) -> jax.Array:
    """How unevenly a layer's choices fell on the ranks: [2], the fullest rank over the mean, and the rounds it took.

    Args:
      loads_NC: int32, choices that arrived on each device, in each chunk of its tokens; microbatches one after another.
      mesh: where the step ran.
      choices: T·C, of a device's chunk, those without an expert included.
      buffer: the config's.
    """
    ranks, parts = mesh.shape["expert"], mesh.shape["context"]
    loads = loads_NC.reshape(-1, ranks, parts, loads_NC.shape[-1])
    worst = (loads.max(1) / jnp.maximum(loads.mean(1), 1e-9)).max()
    return jnp.stack([worst, jnp.ceil(loads.max() / buffer_size(choices, ranks, buffer))])


class _Transport(NamedTuple):
    """How the tokens of a chunk reach their experts.

    Attributes:
      route: their indices_TC → where each goes, and how many choices arrive here.
      share: (turn, route, (x_TD, weights_TC, own experts)) → y_TD, of the choices that fit into one round.
    """

    route: Callable[[jax.Array], tuple[Any, jax.Array]]
    share: Callable[[jax.Array, Any, tuple], jax.Array]


def _in_rounds(share: Callable[[jax.Array, Any, tuple], jax.Array], in_turn: Callable[..., Any], most: int) -> Any:
    """(rounds, routes, (x, weights, own)), all but the last by chunk → the sum of a chunk's rounds, for each.

    First rounds are differentiated as usual, and what remat policies name in them can be kept. Whether there are more
    is known only as the step runs; they keep nothing for the backward pass, which runs them again.
    """

    def first(routes: Any, arrays: tuple) -> jax.Array:
        x, weights, own = arrays
        zero = jnp.int32(0)
        return in_turn(lambda chunk: share(zero, chunk[0], (*chunk[1:], own)), (routes, x, weights))

    if most <= 1:
        return lambda rounds, routes, arrays: first(routes, arrays)

    def further(rounds: jax.Array, total: Any, add: Callable[[Any, jax.Array, jax.Array], Any]) -> Any:
        """`total`, after `add(total, chunk, turn)` for each further round."""
        ends = jnp.cumsum(rounds - 1)

        def body(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            done, total = carry
            chunk = jnp.searchsorted(ends, done, side="right")
            return done + 1, add(total, chunk, done - ends[chunk] + rounds[chunk])

        return jax.lax.while_loop(lambda carry: carry[0] < ends[-1], body, (jnp.int32(0), total))[1]

    def at(chunk: jax.Array, tree: Any) -> Any:
        return jax.tree.map(lambda a: a[chunk], tree)

    def add_y(routes: Any, arrays: tuple) -> Callable[..., jax.Array]:
        x, weights, own = arrays
        return lambda y, chunk, turn: y.at[chunk].add(share(turn, at(chunk, routes), (*at(chunk, (x, weights)), own)))

    @jax.custom_vjp
    def run(rounds: jax.Array, routes: Any, arrays: tuple) -> jax.Array:
        return further(rounds, first(routes, arrays), add_y(routes, arrays))

    def forward(rounds: jax.Array, routes: Any, arrays: tuple) -> tuple[jax.Array, tuple]:
        y, pull = jax.vjp(functools.partial(first, routes), arrays)
        return further(rounds, y, add_y(routes, arrays)), (rounds, routes, arrays, pull)

    def backward(saved: tuple, g: jax.Array) -> tuple:
        rounds, routes, (x, weights, own), pull = saved

        def add(total: tuple, chunk: jax.Array, turn: jax.Array) -> tuple:
            some = (*at(chunk, (x, weights)), own)
            _, again = jax.vjp(functools.partial(share, turn, at(chunk, routes)), some)
            *parts, by_own = again(g[chunk])[0]
            *totals, total_own = total
            totals = (a.at[chunk].add(part) for a, part in zip(totals, parts, strict=True))
            return *totals, jax.tree.map(jnp.add, total_own, by_own)

        grads = further(rounds, pull(g)[0], add)
        return *jax.tree.map(_no_gradient, (rounds, routes)), grads

    run.defvjp(forward, backward)
    return run


def _no_gradient(a: jax.Array) -> np.ndarray:
    return np.zeros(a.shape, jax.dtypes.float0)


def _ring(compute: Compute, size: int, count: int, choices: int, ranks: int) -> _Transport:
    def route(indices_TC: jax.Array) -> tuple[Any, jax.Array]:
        indices = jax.lax.all_gather(indices_TC, "expert", axis=0, tiled=True)
        own_TC = indices - jax.lax.axis_index("expert") * count
        here_TC = (own_TC >= 0) & (own_TC < count)
        place_TC = jnp.cumsum(here_TC.reshape(-1), dtype=jnp.int32).reshape(here_TC.shape) - 1
        return (own_TC, jnp.where(here_TC, place_TC // size, -1)), here_TC.sum(dtype=jnp.int32)

    def share(turn: jax.Array, route: Any, arrays: tuple) -> jax.Array:
        own_TC, round_TC = route
        *tokens, own = arrays
        x, weights = (
            checkpoint_name(jax.lax.all_gather(a, "expert", axis=0, tiled=True), DISPATCHED) for a in tokens
        )
        y = compute(x, jnp.where(round_TC == turn, own_TC, count), weights, *own, filled=size)
        return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)

    return _Transport(route, share)


class _Segments(NamedTuple):
    """Rows that each rank sends to each: how many, from where in the sender's rows, to where in the receiver's."""

    size_XX: jax.Array
    source_XX: jax.Array
    target_XX: jax.Array

    def back(self) -> "_Segments":
        return _Segments(self.size_XX.T, self.target_XX.T, self.source_XX.T)


def _all_to_all(compute: Compute, size: int, count: int, choices: int, ranks: int, ragged: bool) -> _Transport:
    def route(indices_TC: jax.Array) -> tuple[Any, jax.Array]:
        order = plan(indices_TC, ranks * count, 1)
        sent_XR = jax.lax.all_gather(order.counts_R, "expert")
        arriving_XR = jax.lax.dynamic_slice_in_dim(sent_XR, jax.lax.axis_index("expert") * count, count, axis=1)
        return (order, sent_XR.reshape(ranks, ranks, count).sum(2), arriving_XR), arriving_XR.sum()

    def share(turn: jax.Array, route: Any, arrays: tuple) -> jax.Array:
        order, sent_XX, arriving_XR = route
        x_TD, weights_TC, own = arrays
        queue_XX = jnp.cumsum(sent_XX, axis=0) - sent_XX  # behind what earlier ranks send to the same
        source_XX = jnp.cumsum(sent_XX, axis=1) - sent_XX
        low, high = (jnp.clip(q, turn * size, (turn + 1) * size) for q in (queue_XX, queue_XX + sent_XX))
        segments = _Segments(high - low, source_XX + low - queue_XX, low - turn * size)
        # What arrives here lies in the order of its sender, then its expert.
        place_M = turn * size + jnp.arange(size, dtype=jnp.int32)
        ends = jnp.cumsum(arriving_XR.reshape(-1))
        expert_M = (place_M[:, None] >= ends[None]).sum(1, dtype=jnp.int32) % count
        expert_M = jnp.where(place_M < ends[-1], expert_M, count)
        there, weight_M = (
            checkpoint_name(_move(ragged, size, rows, segments), DISPATCHED)
            for rows in (dispatch(x_TD, order), dispatch_weights(weights_TC, order))
        )
        y_MD = compute(there, expert_M[:, None], weight_M[:, None], *own, filled=size)
        return combine(_move(ragged, choices, y_MD, segments.back()), order)

    return _Transport(route, share)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _move(ragged: bool, size: int, rows: jax.Array, segments: _Segments) -> jax.Array:
    """Rows to other ranks: [size, D], or [size], that arrived here; 0 where none did. Its transpose moves them back."""
    me = jax.lax.axis_index("expert")
    count_XX, source_XX, target_XX = segments
    place_1M = jnp.arange(size, dtype=jnp.int32)[None]
    if rows.ndim == 1:
        # Single numbers would be filled up to a TPU's 128 lanes: all are gathered, and those for this rank taken.
        offset_XM = place_1M - target_XX[:, me][:, None]
        held_XM = (offset_XM >= 0) & (offset_XM < count_XX[:, me][:, None])
        index_XM = source_XX[:, me][:, None] + offset_XM + jnp.arange(len(count_XX))[:, None] * len(rows)
        index_M = jnp.where(held_XM, index_XM, 0).sum(0)
        every = jax.lax.all_gather(rows, "expert", tiled=True)
        return jnp.where(held_XM.any(0), every[index_M], 0)
    if ragged:
        empty_MD = jax.lax.pcast(jnp.zeros((size, rows.shape[1]), rows.dtype), AXES, to="varying")
        given = [a.astype(jnp.int32) for a in (source_XX[me], count_XX[me], target_XX[me], count_XX[:, me])]
        return jax.lax.ragged_all_to_all(rows, empty_MD, *given, axis_name="expert")
    # What a CPU lacks, padded: to each rank its whole buffer, empty but for what is sent from here.
    offset_XM = place_1M - target_XX[me][:, None]
    held_XM = (offset_XM >= 0) & (offset_XM < count_XX[me][:, None])
    index_XM = jnp.where(held_XM, source_XX[me][:, None] + offset_XM, len(rows))
    sent_XMD = rows.at[index_XM].get(mode="fill", fill_value=0)
    return jax.lax.all_to_all(sent_XMD, "expert", split_axis=0, concat_axis=0, tiled=True).sum(0)


def _move_fwd(ragged: bool, size: int, rows: jax.Array, segments: _Segments) -> tuple[jax.Array, tuple]:
    return _move(ragged, size, rows, segments), (jnp.zeros((len(rows), 0)), segments)


def _move_bwd(ragged: bool, size: int, saved: tuple, g: jax.Array) -> tuple[jax.Array, _Segments]:
    like, segments = saved
    return _move(ragged, len(like), g, segments.back()), jax.tree.map(_no_gradient, segments)


_move.defvjp(_move_fwd, _move_bwd)

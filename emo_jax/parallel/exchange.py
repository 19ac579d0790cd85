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
from emo_jax.parallel.sharding import GATHERED, TOKENS, mesh_axes, rest_spec, vary

Compute = Callable[..., jax.Array]
"""(x_TD, indices_TC, weights_TC, gate_RDF, up_RDF, down_RFD, filled=most choices with an expert) → y_TD."""

Turn = jax.Array | int
"""Which round of a chunk, from 0 on."""

DISPATCHED, COMBINED = "dispatched", "combined"
"""Names for remat policies: tokens that arrived at their experts, and what came back."""


UNROLL = 2
"""Chunks that the compiler sees at once: enough to overlap the exchange of one with the products of another."""


def best_exchange(ranks: int, choices: int) -> str:
    """The transport that sends fewer bytes: T·(X−1) rows against T·C·(X−1)/X, in each direction."""
    return "ring" if ranks <= choices else "all_to_all"


def map_experts(
    compute: Compute, mesh: Mesh | None, config: MeshConfig, keep_dispatched: bool = True
) -> Callable[..., tuple[jax.Array, jax.Array | None]]:
    """Runs routed experts on every device's own tokens, with each rank of the `expert` axis computing its own experts.

    Args:
      compute: the experts of some tokens; an index of R, one past the last, is a choice without.
      mesh: None, or one device: all experts are its own.
      config: its transport, buffer and chunks; its chunks must divide a device's tokens. With several, the backward
        pass computes a chunk's products again.
      keep_dispatched: whether the backward pass of several chunks finds their tokens where they were sent, or sends
        them again.

    Returns:
      (x_BSD, indices_BSC, weights_BSC, gate_RDF, up_RDF, down_RFD) → y_BSD, and the choices that arrived on each
      device, int32 [N, chunks], or None where no device computes for others. Weights are as every device sees them
      whole.
    """
    ranks = mesh.shape["expert"] if mesh is not None else 1

    def local(
        x_BSD: jax.Array, indices_BSC: jax.Array, weights_BSC: jax.Array, *own: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """This device's tokens, and the experts that are its own."""
        x, indices, weights = (a.reshape(config.chunks, -1, a.shape[-1]) for a in (x_BSD, indices_BSC, weights_BSC))
        if ranks == 1:
            y = _in_chunks(_here(compute), keep_dispatched)(indices, (x, weights), own)
            return y.reshape(x_BSD.shape), None
        kind = best_exchange(ranks, indices.shape[-1]) if config.exchange == "auto" else config.exchange
        choices = indices.size // config.chunks
        size = buffer_size(choices, ranks, config.buffer)
        make = _ring if kind == "ring" else functools.partial(_all_to_all, ragged=platform != "cpu")
        transport = make(compute, size, len(own[0]), choices, ranks)
        routes, loads = jax.lax.map(transport.route, indices)
        rounds = None
        if ranks * choices > size:
            rounds = jax.lax.pmax(-(-loads // size), AXES)  # every rank takes part in each round
        y = _in_chunks(transport, keep_dispatched)(routes, (x, weights), own, rounds)
        return checkpoint_name(y.reshape(x_BSD.shape), COMBINED), loads[None]

    if mesh is None or mesh.size == 1:
        return local

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

    platform = mesh.devices.flat[0].platform
    shards = math.prod(mesh.shape[axis] for axis in ("fsdp", "expert", "context"))

    def mapped(
        x_BSD: jax.Array, indices_BSC: jax.Array, weights_BSC: jax.Array, *experts: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        routed, widths = len(experts[0]), (1, 1, 2)  # where D is in gate, up and down
        slots = expert_slots(routed, ranks, shards)
        # Spare experts that no token chooses; a choice without an expert lies behind them.
        experts = tuple(jnp.pad(w, ((0, slots - routed), (0, 0), (0, 0))) for w in experts)
        indices_BSC = jnp.where(indices_BSC == routed, slots, indices_BSC)

        names = [("routed", "embed", "mlp"), ("routed", "embed", "mlp"), ("routed", "mlp", "embed")]
        specs = [rest_spec(mesh, axes, w.shape) for axes, w in zip(names, experts, strict=True)]

        def gathered(x_BSD: jax.Array, indices_BSC: jax.Array, weights_BSC: jax.Array, *experts: jax.Array) -> Any:
            own = [own_experts(*given) for given in zip(experts, specs, widths, strict=True)]
            return local(x_BSD, indices_BSC, weights_BSC, *own)

        in_specs = (TOKENS, TOKENS, TOKENS, *specs)
        out_specs = (TOKENS, PartitionSpec(AXES) if ranks > 1 else None)
        run = jax.shard_map(gathered, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
        return run(x_BSD, indices_BSC, weights_BSC, *experts)

    return mapped


def expert_slots(routed: int, ranks: int, shards: int) -> int:
    """Experts of a layer, spare ones included: as many on each rank, and a multiple of the shards if few are spare."""
    regrouped = -(-routed // shards) * shards
    return regrouped if regrouped <= 1.125 * routed else -(-routed // ranks) * ranks


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
      send: (turn, route, (x_TD, weights_TC)) → what arrives here of the choices that fit into one round; linear.
      finish: (turn, route, what arrived, own experts) → y_TD, back where the tokens came from.
    """

    route: Callable[[jax.Array], tuple[Any, jax.Array]]
    send: Callable[[Turn, Any, Any], Any]
    finish: Callable[[Turn, Any, Any, Any], jax.Array]


def _in_chunks(transport: _Transport, keep_dispatched: bool) -> Callable[..., jax.Array]:
    """(routes, (x, weights), own, rounds=None) → y, all but the experts by chunk; rounds: of each chunk, if not 1.

    The first round of a single chunk is differentiated as usual, and what remat policies name in it can be kept.
    Further rounds keep nothing for the backward pass, which runs them again: whether there are any is known only as
    the step runs.
    """
    _, send, finish = transport
    first = 0

    def at(chunk: jax.Array | int, tree: Any) -> Any:
        return jax.tree.map(lambda a: a[chunk], tree)

    def share(turn: Turn, route: Any, tokens: Any, own: Any) -> jax.Array:
        return finish(turn, route, send(turn, route, tokens), own)

    def share_gradients(turn: Turn, route: Any, tokens: Any, own: Any, there: Any, g: jax.Array) -> tuple:
        there = send(turn, route, tokens) if there is None else there
        by_there, by_own = jax.vjp(functools.partial(finish, turn, route), there, own)[1](g)
        return jax.vjp(functools.partial(send, turn, route), tokens)[1](by_there)[0], by_own

    def further(rounds: jax.Array | None, total: Any, add: Callable[[Any, jax.Array, jax.Array], Any]) -> Any:
        """`total`, after `add(total, chunk, turn)` for each further round."""
        if rounds is None:
            return total
        ends = jnp.cumsum(rounds - 1)

        def body(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            done, total = carry
            chunk = (done >= ends).sum(dtype=jnp.int32)
            return done + 1, add(total, chunk, done - ends[chunk] + rounds[chunk])

        return jax.lax.while_loop(lambda carry: carry[0] < ends[-1], body, (jnp.int32(0), total))[1]

    @jax.custom_vjp
    def run(routes: Any, tokens: Any, own: Any, rounds: jax.Array | None) -> jax.Array:
        return forward(routes, tokens, own, rounds, differentiated=False)[0]

    def forward(
        routes: Any, tokens: Any, own: Any, rounds: jax.Array | None, differentiated: bool = True
    ) -> tuple[jax.Array, tuple]:
        kept = None
        if len(tokens[0]) > 1:

            def body(_: None, chunk: tuple) -> tuple[None, tuple]:
                there = send(first, *chunk)
                return None, (
                    finish(first, chunk[0], there, own),
                    there if differentiated and keep_dispatched else None,
                )

            _, (y, kept) = jax.lax.scan(body, None, (routes, tokens), unroll=UNROLL)
        else:

            def only(tokens: Any, own: Any) -> jax.Array:
                return share(first, at(0, routes), at(0, tokens), own)[None]

            y, kept = jax.vjp(only, tokens, own) if differentiated else (only(tokens, own), None)

        def add(y: jax.Array, chunk: jax.Array, turn: jax.Array) -> jax.Array:
            return y.at[chunk].add(share(turn, at(chunk, routes), at(chunk, tokens), own))

        return further(rounds, y, add), (routes, tokens, own, rounds, kept)

    def backward(saved: tuple, g: jax.Array) -> tuple:
        routes, tokens, own, rounds, kept = saved
        if len(tokens[0]) > 1:
            # Zeros that nothing held back would be made, for all layers, before any of their backward passes.
            zeros, g = jax.lax.optimization_barrier((jax.tree.map(jnp.zeros_like, own), g))

            def body(total: Any, chunk: tuple) -> tuple[Any, Any]:
                route, some, there, g = chunk
                by_tokens, by_own = share_gradients(first, route, some, own, there, g)
                return jax.tree.map(jnp.add, total, by_own), by_tokens

            by_own, by_tokens = jax.lax.scan(body, zeros, (routes, tokens, kept, g), unroll=UNROLL)
        else:
            by_tokens, by_own = kept(g)

        def add(total: tuple, chunk: jax.Array, turn: jax.Array) -> tuple:
            more = share_gradients(turn, at(chunk, routes), at(chunk, tokens), own, None, g[chunk])
            by_tokens = jax.tree.map(lambda a, part: a.at[chunk].add(part), total[0], more[0])
            return by_tokens, jax.tree.map(jnp.add, total[1], more[1])

        by_tokens, by_own = further(rounds, (by_tokens, by_own), add)
        return jax.tree.map(_no_gradient, routes), by_tokens, by_own, jax.tree.map(_no_gradient, rounds)

    run.defvjp(forward, backward)
    return lambda routes, tokens, own, rounds=None: run(routes, tokens, own, rounds)


def _no_gradient(a: jax.Array) -> np.ndarray:
    return np.zeros(a.shape, jax.dtypes.float0)


def _here(compute: Compute) -> _Transport:
    """No transport: this device has all experts."""

    def finish(turn: Turn, indices_TC: jax.Array, there: Any, own: Any) -> jax.Array:
        x_TD, weights_TC = there
        return compute(x_TD, indices_TC, weights_TC, *own)

    return _Transport(
        lambda indices_TC: (indices_TC, jnp.int32(indices_TC.size)), lambda turn, route, tokens: tokens, finish
    )


def _ring(compute: Compute, size: int, count: int, choices: int, ranks: int) -> _Transport:
    def route(indices_TC: jax.Array) -> tuple[Any, jax.Array]:
        indices = jax.lax.all_gather(indices_TC, "expert", axis=0, tiled=True)
        own_TC = indices - jax.lax.axis_index("expert") * count
        here_TC = (own_TC >= 0) & (own_TC < count)
        place_TC = jnp.cumsum(here_TC.reshape(-1), dtype=jnp.int32).reshape(here_TC.shape) - 1
        return (own_TC, jnp.where(here_TC, place_TC // size, -1)), here_TC.sum(dtype=jnp.int32)

    def send(turn: Turn, route: Any, tokens: Any) -> Any:
        gather = functools.partial(jax.lax.all_gather, axis_name="expert", axis=0, tiled=True)
        return jax.tree.map(lambda a: checkpoint_name(gather(a), DISPATCHED), tokens)

    def finish(turn: Turn, route: Any, there: Any, own: Any) -> jax.Array:
        own_TC, round_TC = route
        x, weights = there
        y = compute(x, jnp.where(round_TC == turn, own_TC, count), weights, *own, filled=size)
        return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)

    return _Transport(route, send, finish)


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

    def segments(turn: Turn, route: Any) -> _Segments:
        _, sent_XX, _ = route
        queue_XX = jnp.cumsum(sent_XX, axis=0) - sent_XX  # behind what earlier ranks send to the same
        source_XX = jnp.cumsum(sent_XX, axis=1) - sent_XX
        low, high = (jnp.clip(q, turn * size, (turn + 1) * size) for q in (queue_XX, queue_XX + sent_XX))
        return _Segments(high - low, source_XX + low - queue_XX, low - turn * size)

    def send(turn: Turn, route: Any, tokens: Any) -> Any:
        x_TD, weights_TC = tokens
        rows = (dispatch(x_TD, route[0]), dispatch_weights(weights_TC, route[0]))
        return tuple(checkpoint_name(_move(ragged, size, a, segments(turn, route)), DISPATCHED) for a in rows)

    def finish(turn: Turn, route: Any, there: Any, own: Any) -> jax.Array:
        order, _, arriving_XR = route
        x_MD, weight_M = there
        # What arrives here lies in the order of its sender, then its expert.
        place_M = turn * size + jnp.arange(size, dtype=jnp.int32)
        ends = jnp.cumsum(arriving_XR.reshape(-1))
        expert_M = (place_M[:, None] >= ends[None]).sum(1, dtype=jnp.int32) % count
        expert_M = jnp.where(place_M < ends[-1], expert_M, count)
        y_MD = compute(x_MD, expert_M[:, None], weight_M[:, None], *own, filled=size)
        return combine(_move(ragged, choices, y_MD, segments(turn, route).back()), order)

    return _Transport(route, send, finish)


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

"""Tokens to the ranks that hold their experts, and back: expert parallelism as a ring.

Every rank of the `expert` axis receives the tokens of all of them (all-gather), computes its own experts' share of the
result, and the shares are added where the tokens came from (reduce-scatter). A token crosses the axis once in each
direction whatever its number of choices: fewer bytes than sending each choice as long as there are no more ranks than
choices.

Letters: B rows, S sequence, T tokens of a rank, D width, C choices, R routed experts, X ranks, F expert hidden.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from emo_jax.parallel.sharding import ROW_AXES

BUFFER = 1.5
"""Choices that a rank computes in a round, as a multiple of what balanced experts would give it."""

Compute = Callable[..., jax.Array]
"""(x_TD, indices_TC, weights_TC, gate_RDF, up_RDF, down_RFD, filled=most choices with an expert) → y_TD."""


def map_experts(compute: Compute, mesh: Mesh | None, buffer: float = BUFFER) -> Callable[..., jax.Array]:
    """Runs routed experts on every device's own rows, with each rank of the `expert` axis computing its own experts.

    Args:
      compute: the experts of some tokens; an index of R, one past the last, is a choice without.
      mesh: None, or one device: `compute` itself.
      buffer: see `BUFFER`. Rounds go on until all choices are done: no token is ever dropped. How many are needed is
        each rank's own affair, since no collective is inside one.

    Returns:
      (x_BSD, indices_BSC, weights_BSC, gate_RDF, up_RDF, down_RFD) → y_BSD, weights as every device sees them whole.
    """

    def whole(x_BSD: jax.Array, indices_BSC: jax.Array, weights_BSC: jax.Array, *experts: jax.Array) -> jax.Array:
        flat = [a.reshape(-1, a.shape[-1]) for a in (x_BSD, indices_BSC, weights_BSC)]
        return compute(*flat, *experts).reshape(x_BSD.shape)

    if mesh is None or mesh.size == 1:
        return whole
    ranks, shards = mesh.shape["expert"], mesh.shape["fsdp"] * mesh.shape["expert"]

    def own_experts(w: jax.Array, axis: int, split: bool) -> jax.Array:
        """This rank's experts, whole; what rests split by width is exchanged here, so that gradients are scattered."""
        if split and ranks > 1:
            w = jax.lax.all_to_all(w, "expert", split_axis=0, concat_axis=axis, tiled=True)
        if split:
            w = jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True)
        # A custom_vjp inside needs weights that vary like the rows; pcast transposes to the sum over devices.
        return jax.lax.pcast(w, ("data",) if split else ("data", "fsdp"), to="varying")

    def ring(x_BSD: jax.Array, indices_BSC: jax.Array, weights_BSC: jax.Array, *own: jax.Array) -> jax.Array:
        x_TD, indices_TC, weights_TC = (
            jax.lax.all_gather(a.reshape(-1, a.shape[-1]), "expert", axis=0, tiled=True)
            for a in (x_BSD, indices_BSC, weights_BSC)
        )
        count = own[0].shape[0]
        own_TC = indices_TC - jax.lax.axis_index("expert") * count
        here_TC = (own_TC >= 0) & (own_TC < count)
        place_TC = jnp.cumsum(here_TC.reshape(-1)).reshape(here_TC.shape) - 1
        size = math.ceil(buffer * indices_TC.size / ranks)

        def share(turn: jax.Array) -> jax.Array:
            some_TC = jnp.where(here_TC & (place_TC // size == turn), own_TC, count)
            return compute(x_TD, some_TC, weights_TC, *own, filled=size)

        y_TD = share(jnp.int32(0))
        turns = math.ceil(indices_TC.size / size)
        if turns > 1:
            left = here_TC.sum()

            def another(y_TD: jax.Array, turn: jax.Array) -> tuple[jax.Array, None]:
                # Recomputed for the backward pass, so that rounds that seldom happen keep nothing.
                run = jax.checkpoint(lambda turn: jax.lax.cond(left > turn * size, share, nothing, turn))
                return y_TD + run(turn), None

            def nothing(turn: jax.Array) -> jax.Array:
                return jnp.zeros_like(x_TD)

            y_TD, _ = jax.lax.scan(another, y_TD, jnp.arange(1, turns, dtype=jnp.int32))
        y_TD = jax.lax.psum_scatter(y_TD, "expert", scatter_dimension=0, tiled=True)
        return y_TD.reshape(x_BSD.shape)

    def mapped(x_BSD: jax.Array, indices_BSC: jax.Array, weights_BSC: jax.Array, *experts: jax.Array) -> jax.Array:
        routed, axes = len(experts[0]), (1, 1, 2)  # where the width D is in gate, up and down
        split = x_BSD.shape[-1] % shards == 0
        spare = -routed % ranks  # experts that no token chooses; a choice without an expert lies behind them
        experts = tuple(jnp.pad(w, ((0, spare), (0, 0), (0, 0))) for w in experts)
        indices_BSC = jnp.where(indices_BSC == routed, routed + spare, indices_BSC)

        def local(x_BSD: jax.Array, indices_BSC: jax.Array, weights_BSC: jax.Array, *experts: jax.Array) -> jax.Array:
            own = [own_experts(w, axis, split) for w, axis in zip(experts, axes, strict=True)]
            return (ring if ranks > 1 else whole)(x_BSD, indices_BSC, weights_BSC, *own)

        rows = PartitionSpec(ROW_AXES)
        rest = [
            PartitionSpec(*(None,) * axis, ("fsdp", "expert")) if split else PartitionSpec("expert") for axis in axes
        ]
        run = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, *rest), out_specs=rows)
        return run(x_BSD, indices_BSC, weights_BSC, *experts)

    return mapped


def ring_load(counts_BR: jax.Array, mesh: Mesh, choices: int, parts: int = 1, buffer: float = BUFFER) -> jax.Array:
    """How unevenly a layer's choices fell on the ranks: [2], the fullest rank over the mean, and the rounds it took.

    Args:
      counts_BR: of the step's rows, how many choices each expert got.
      mesh: where the step ran.
      choices: S·C, of a row, those without an expert included.
      parts: microbatches, whose rows follow one another.
      buffer: see `map_experts`.
    """
    ranks = mesh.shape["expert"]
    rings = parts * mesh.size // ranks  # neighbours in a batch share a ring
    rows, experts = counts_BR.shape
    padded_BR = jnp.pad(counts_BR, ((0, 0), (0, -experts % ranks)))
    load = padded_BR.reshape(rings, rows // rings, ranks, -1).sum((1, 3))
    size = math.ceil(buffer * (rows // rings) * choices / ranks)
    return jnp.stack([(load.max(1) / jnp.maximum(load.mean(1), 1e-9)).max(), jnp.ceil(load.max() / size)])

"""The device mesh, the rules table and the map of a function over each device's own rows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from emo_jax.errors import nearest_divisors, require
from emo_jax.parallel.config import AXES, MeshConfig

ROW_AXES = ("data", "fsdp", "expert")
"""Mesh axes that the rows of a batch are split over."""
TOKENS = PartitionSpec(ROW_AXES, "context")
"""Of arrays that begin with [B, S]."""

GATHERED = "gathered"
"""Name of gathered weights for remat policies: no layer's are kept for the backward pass."""
RULES: dict[str, tuple[str, ...] | None] = {
    "embed": ("fsdp", "context"),
    "vocab": ("expert",),
    "heads": ("expert",),
    "mlp": ("expert",),
    "head": None,
    "expert": None,
    "routed": None,
    "norm": None,
}
"""From the logical axes that parameters are annotated with to mesh axes, or None for whole.

A matrix is split in both directions, so that pieces stay as wide as a TPU's tiles. Stacks of routed experts rest split
as all else is, not by expert: so any number of experts has equal shards, and none of a rank's memory is spare. A step
moves them to the ranks that compute them (`exchange`).
"""


def make_mesh(
    config: MeshConfig,
    rows: int,
    devices: Sequence[Any] | None = None,
    *,
    length: int | None = None,
    experts: Sequence[int] = (),
) -> Mesh:
    """Lays out `devices` (default: all) as data × fsdp × expert × context.

    On TPUs, neighbours in the mesh are neighbours in the torus where its shape allows; several slices are told apart
    along `data`.

    Args:
      config: axis sizes; an axis of −1 takes what the others leave.
      rows: rows of a microbatch, which the mesh must divide.
      devices: real devices, or those of a compile-only topology.
      length: S, tokens of a row; None: one that any number of parts divides.
      experts: routed experts of each mixture layer.

    Raises:
      UserError: where the axes do not multiply to the devices, or do not divide the rows, their tokens or the experts.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices), rows, length=length, experts=experts)
    return Mesh(arrange(devices, sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(
    config: MeshConfig, n: int, rows: int, *, length: int | None = None, experts: Sequence[int] = ()
) -> dict[str, int]:
    """The size of each axis over `n` devices; arguments and errors as in `make_mesh`."""
    sizes = {name: getattr(config, name) for name in AXES}
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    for name, size in sizes.items():
        require(
            size == -1 or n % size == 0, f"mesh.{name}={size} does not divide the {n} devices; try one of {divisors}."
        )
    given = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: max(n // given, 1) if size == -1 else size for name, size in sizes.items()}
    words = " × ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size != 1 or name in ("data", "fsdp"))
    others = math.prod(sizes.values()) // sizes["data"]
    hint = f"set mesh.data=-1 for {n // others}" if n % others == 0 else "lower mesh.fsdp, mesh.expert or mesh.context"
    require(math.prod(sizes.values()) == n, f"{words} must equal the {n} devices; {hint}.")
    groups = n // sizes["context"]
    require(
        rows % groups == 0,
        f"data.batch_size / train.microbatches = {rows} rows must be a multiple of the {groups} "
        f"{'devices' if groups == n else 'groups of devices that share rows'}; "
        f"the nearest is {max(groups, round(rows / groups) * groups)}.",
    )
    _check_tokens(config, sizes, rows // groups, length, divisors)
    fewest = min(experts, default=sizes["expert"])
    require(
        sizes["expert"] <= fewest,
        f"mesh.expert={sizes['expert']} ranks are more than the {fewest} routed experts of a layer; "
        f"try one of {[d for d in divisors if d <= fewest]}.",
    )
    return sizes


def _check_tokens(
    config: MeshConfig, sizes: dict[str, int], rows: int, length: int | None, divisors: list[int]
) -> None:
    if length is None:
        return
    parts = sizes["context"]
    require(
        length % parts == 0,
        f"mesh.context={parts} does not divide data.sequence_length={length}; "
        f"try one of {[d for d in divisors if length % d == 0]}.",
    )
    tokens = rows * length // parts
    require(
        tokens % config.chunks == 0,
        f"mesh.chunks={config.chunks} does not divide the {tokens} tokens of a device; "
        f"try {nearest_divisors(config.chunks, tokens)}.",
    )


def arrange(devices: Sequence[Any], sizes: dict[str, int]) -> np.ndarray:
    """Devices [data, fsdp, expert, context]; on TPUs, neighbours there are neighbours in the torus where it can be."""
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(shape)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    require(
        sizes["data"] % slices == 0,
        f"mesh.data={sizes['data']} must be a multiple of the {slices} slices, which only replicas can span; "
        f"set mesh.data={slices}, or -1 for the rest.",
    )
    inside = (sizes["data"] // slices, *shape[1:])
    across = (slices, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def param_sharding(mesh: Mesh, logical_axes: PartitionSpec, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter lives, by `RULES`; an axis that its mesh axis does not divide stays whole.

    Raises:
      ValueError: where two axes of the parameter want the same mesh axis, or one is not in the table.
    """
    unknown = [name for name in logical_axes if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"no rule for the logical axes {unknown}; RULES knows {sorted(RULES)}")
    axes = [RULES[name] or () if name is not None else () for name in logical_axes]
    used = [axis for some in axes for axis in some]
    if len(set(used)) != len(used):
        raise ValueError(f"rules give {tuple(logical_axes)} the mesh axes {axes}: one is used twice")
    fitting = []
    for some, size in zip(axes, shape, strict=True):
        some = tuple(axis for axis in some if mesh.shape[axis] > 1)
        while some and size % math.prod(mesh.shape[axis] for axis in some):
            some = some[:-1]
        fitting.append(some or None)
    return NamedSharding(mesh, PartitionSpec(*fitting))


def rest_spec(mesh: Mesh | None, axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """How a parameter of these logical axes rests on the mesh: whole, where there is none."""
    if mesh is None or mesh.size == 1:
        return PartitionSpec()
    return param_sharding(mesh, PartitionSpec(*axes), shape).spec


def mesh_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """All mesh axes that a spec names."""
    return tuple(axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def vary(w: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Within a `shard_map`: a weight split by `spec`, typed as tokens are.

    A custom_vjp needs all its arguments so; where they were the same on several devices, gradients are added up.
    """
    return jax.lax.pcast(w, tuple(axis for axis in AXES if axis not in mesh_axes(spec)), to="varying")


def whole(w: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Within a `shard_map`: a weight that rests split by `spec`, gathered."""
    for dimension, axes in enumerate(spec):
        if axes:
            w = jax.lax.all_gather(w, axes, axis=dimension, tiled=True)
    return checkpoint_name(w, GATHERED)


def scattered(g: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Within a `shard_map`: the sum over devices of what `whole` was multiplied into, split by `spec`."""
    for dimension, axes in reversed(list(enumerate(spec))):
        if axes:
            g = jax.lax.psum_scatter(g, axes, scatter_dimension=dimension, tiled=True)
    return g


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data × fsdp × expert, their tokens over context; for arrays that begin with [B, S]."""
    return NamedSharding(mesh, TOKENS)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def map_tokens(
    fn: Callable[..., Any],
    mesh: Mesh | None,
    *,
    token_args: int,
    weights: Sequence[PartitionSpec] = (),
    total: bool = False,
    check_vma: bool = True,
) -> Callable[..., Any]:
    """Runs `fn` on each device's own tokens.

    Args:
      fn: its first `token_args` arguments and its results begin with [B, S]; the rest are weights.
      mesh: None, or one device: `fn` itself.
      token_args: how many leading arguments are split.
      weights: how each of the others reaches a device; missing ones are whole. Their gradients are summed over the
        devices that see the same.
      total: the results are sums over the tokens instead, and are added over devices.
      check_vma: as in `jax.shard_map`; False only where all arguments are tokens, so that no gradient is a sum over
        devices.
    """
    if mesh is None or mesh.size == 1:
        return fn

    def mapped(*args: jax.Array) -> Any:
        given = (*weights, *(PartitionSpec(),) * (len(args) - token_args - len(weights)))

        def local(*args: jax.Array) -> Any:
            pairs = zip(args[token_args:], given, strict=True)
            own = [vary(w, spec) for w, spec in pairs]
            results = fn(*args[:token_args], *own)
            return jax.lax.psum(results, AXES) if total else results

        specs = (*(TOKENS,) * token_args, *given)
        out_specs = PartitionSpec() if total else TOKENS
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check_vma)(*args)

    return mapped


def product(
    equation: str,
    x_BSD: jax.Array,
    weight: jax.Array,
    axes: tuple[str, ...],
    mesh: Mesh | None,
    precision: str | None = None,
) -> jax.Array:
    """einsum(equation, tokens, weight), tokens [B, S, ...] first, as each device computes it for its own tokens.

    The weight, of the logical `axes`, is gathered in the tokens' dtype, and its gradient scattered: left to the
    compiler, devices would add up whole gradients, and for several layers at once.
    """
    spec = rest_spec(mesh, axes, weight.shape)

    def local(x_BSD: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum(equation, x_BSD, whole(weight, spec), precision=precision)

    return map_tokens(local, mesh, token_args=1, weights=[spec])(x_BSD, weight.astype(x_BSD.dtype))


def own_rows(mesh: Mesh, rows: int) -> list[int]:
    """The places in a batch of so many rows that this process's devices hold, ascending.

    A mesh that follows a torus gives a process rows that need not lie together, and processes that share rows (along
    `context`) the same ones.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((rows, mesh.shape["context"]))
    return sorted({place for index in held.values() if index for place in range(rows)[index[0]]})


def put_rows(batch: dict[str, np.ndarray], mesh: Mesh, rows: int | None = None) -> dict[str, jax.Array]:
    """This process's rows of a batch as its part of global arrays.

    They are split as `batch_sharding` says, or by rows alone where an array has no value a token.

    Args:
      batch: arrays [own rows, ...], in the order of `own_rows`.
      mesh: where they go.
      rows: of the whole batch; None: this process has all.
    """
    own_count, length = batch["tokens"].shape
    rows = own_count if rows is None else rows
    own = own_rows(mesh, rows)
    if len(own) != own_count:
        raise ValueError(f"this process holds {len(own)} of the {rows} rows, but was given {own_count}")

    def put(array: np.ndarray) -> jax.Array:
        spec = TOKENS if array.shape[1] == length else PartitionSpec(ROW_AXES)

        def part(index: Any) -> np.ndarray:
            places = np.searchsorted(own, np.arange(rows)[index[0]])  # which follow one another
            return array[places[0] : places[-1] + 1][:, *index[1:]]

        return jax.make_array_from_callback((rows, *array.shape[1:]), NamedSharding(mesh, spec), part)

    return {name: put(array) for name, array in batch.items()}

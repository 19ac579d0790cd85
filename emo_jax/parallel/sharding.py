"""The device mesh, the rules table and the map of a function over each device's own rows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from emo_jax.errors import require
from emo_jax.parallel.config import AXES, MeshConfig

ROW_AXES = AXES
"""Mesh axes that the rows of a batch are split over."""

RULES: dict[str, tuple[str, ...] | None] = {
    "vocab": None,
    "embed": ("fsdp", "expert"),
    "heads": None,
    "head": None,
    "mlp": None,
    "expert": None,
    "routed": None,
    "norm": None,
}
"""From the logical axes that parameters are annotated with to mesh axes, or None for whole.

Stacks of routed experts rest as all else does, split by width: so any number of experts has equal shards, and none of a
rank's memory is spare. A step moves them to the ranks that compute them (`exchange`).
"""


def make_mesh(config: MeshConfig, rows: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays out `devices` (default: all) as data × fsdp × expert.

    Args:
      config: axis sizes; an axis of −1 takes what the others leave.
      rows: rows of a microbatch, which the mesh must divide.
      devices: real devices, or those of a compile-only topology.

    Raises:
      UserError: where the axes do not multiply to the devices or do not divide the rows.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    sizes = {name: getattr(config, name) for name in AXES}
    for name, size in sizes.items():
        divisors = [d for d in range(1, n + 1) if n % d == 0]
        require(
            size == -1 or n % size == 0, f"mesh.{name}={size} does not divide the {n} devices; try one of {divisors}."
        )
    given = math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: max(n // given, 1) if size == -1 else size for name, size in sizes.items()}
    words = " × ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size != 1 or name != "expert")
    others = sizes["fsdp"] * sizes["expert"]
    hint = f"set mesh.data=-1 for {n // others}" if n % others == 0 else "lower mesh.fsdp or mesh.expert"
    require(math.prod(sizes.values()) == n, f"{words} must equal the {n} devices; {hint}.")
    require(
        rows % n == 0,
        f"data.batch_size / train.microbatches = {rows} rows must be a multiple of the {n} devices; "
        f"the nearest is {max(n, round(rows / n) * n)}.",
    )
    axis_types = (AxisType.Auto,) * len(AXES)  # jax.make_mesh alone defaults to explicit axes
    return Mesh(np.asarray(devices).reshape(*sizes.values()), AXES, axis_types=axis_types)


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
        while some and size % math.prod(mesh.shape[axis] for axis in some):
            some = some[:-1]
        fitting.append(some or None)
    return NamedSharding(mesh, PartitionSpec(*fitting))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every device; for arrays whose first axis is B."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def map_rows(
    fn: Callable[..., Any], mesh: Mesh | None, *, row_args: int, total: bool = False, check_vma: bool = True
) -> Callable[..., Any]:
    """Runs `fn` on each device's own rows.

    Args:
      fn: its first `row_args` arguments and its results have the rows B first; the rest are weights,
        which every device sees whole and whose gradients are summed over devices.
      mesh: None, or one device: `fn` itself.
      row_args: how many leading arguments are split.
      total: the results are sums over the rows instead, and are added over devices.
      check_vma: as in `jax.shard_map`; False only where all arguments are rows, so that no gradient is a sum over
        devices.
    """
    if mesh is None or mesh.size == 1:
        return fn

    def local(*args: jax.Array) -> Any:
        # A custom_vjp inside needs weights that vary like the rows; pcast transposes to the sum over devices.
        weights = [jax.lax.pcast(w, ROW_AXES, to="varying") for w in args[row_args:]]
        results = fn(*args[:row_args], *weights)
        return jax.lax.psum(results, ROW_AXES) if total else results

    def mapped(*args: jax.Array) -> Any:
        specs = tuple(PartitionSpec(ROW_AXES) if i < row_args else PartitionSpec() for i in range(len(args)))
        out_specs = PartitionSpec() if total else PartitionSpec(ROW_AXES)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs, check_vma=check_vma)(*args)

    return mapped


def put_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as its part of global arrays, split by rows."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}

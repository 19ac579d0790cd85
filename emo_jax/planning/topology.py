"""Which chips, how many, and how a mesh axis lies on the wires between them."""

import contextlib
import difflib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from emo_jax.errors import UserError, require
from emo_jax.parallel.chips import CHIPS, Chip
from emo_jax.parallel.config import AXES

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
"""For processes that compile for TPUs without one."""

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
"""Slices that Google offers: of v5e and v6e the flat ones alone, of the others cubes, also others of multiples of 4."""


class Topology(NamedTuple):
    """Chips of one kind.

    Attributes:
      name: as a person writes it, such as `v5p:4x4x4` or `h200:64`.
      kind: of the chip, a key of `CHIPS`.
      shape: of a TPU slice, or the number of GPUs.
      slices: how many such slices; 1 for GPUs.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int

    @property
    def chip(self) -> Chip:
        """What one chip can do."""
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices in all slices: two a chip on TPU7x."""
        return self.chips * self.chip.devices

    @property
    def room(self) -> float:
        """Bytes of HBM that a device's program can have."""
        return self.chip.memory / self.chip.devices

    @property
    def compiles(self) -> bool:
        """Whether a program can be compiled for it here: for TPUs; GPUs are planned by formulas alone."""
        return self.chip.torus > 0


def parse_topology(name: str, slices: int = 1) -> Topology:
    """`v5p:4x4x4` or `h200:64`, as a person writes it.

    Raises:
      UserError: on a chip that is not known or a slice that nobody offers, naming the nearest that is.
    """
    kind, _, text = name.lower().partition(":")
    if kind not in CHIPS:
        kind, near = _nearest_kind(kind), kind
        raise UserError(
            f"--topology={name!r}: there is no chip {near!r} among {', '.join(CHIPS)}; did you mean {kind}?"
        )
    chip = CHIPS[kind]
    examples = f"{kind}:{'8' if not chip.torus else '4x4' if chip.torus == 2 else '4x4x4'}"
    require(bool(re.fullmatch(r"\d+(x\d+)*", text)), f"--topology={name!r} must be CHIP:SHAPE, as in {examples}.")
    require(slices >= 1, f"--slices={slices} must be at least 1.")
    shape = tuple(map(int, text.split("x")))
    if not chip.torus:
        require(slices == 1, f"--slices={slices} is for TPUs; give all GPUs in --topology, as in {kind}:64.")
        count = math.prod(shape)
        whole = max(round(count / chip.host), 1) * chip.host
        fits = count >= 1 and (chip.host % count == 0 if count < chip.host else count % chip.host == 0)
        require(fits, f"--topology={name!r}: GPUs come {chip.host} a node; the nearest is {kind}:{whole}.")
        return Topology(name, kind, (count,), 1)
    shapes = FLAT if chip.torus == 2 else CUBES
    cubes = chip.torus == 3 and len(shape) == 3 and all(size % 4 == 0 and size for size in shape)
    if text not in shapes and not (cubes and math.prod(shape) <= chip.largest):
        wanted = math.prod(shape)
        nearest = min(shapes, key=lambda one: abs(math.log(max(wanted, 1) / math.prod(map(int, one.split("x"))))))
        hint = (
            f" Several slices: --topology={kind}:16x16 --slices={-(-wanted // 256)}." if wanted > chip.largest else ""
        )
        raise UserError(
            f"--topology={name!r}: {kind} slices of {wanted} chips are not offered in this shape; the nearest is "
            f"{kind}:{nearest}.{hint}"
        )
    return Topology(name, kind, shape, slices)


def offered(kind: str) -> list[Topology]:
    """Slices of a kind of TPU, or whole nodes of a GPU, from few chips to many."""
    chip = CHIPS[kind]
    nodes = [str(chip.host * 2**i) for i in range(10)]
    shapes = nodes if not chip.torus else FLAT if chip.torus == 2 else CUBES
    return [parse_topology(f"{kind}:{shape}") for shape in shapes]


def _nearest_kind(kind: str) -> str:
    known = {"v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e", "trillium": "v6e", "v7x": "tpu7x", "v7": "tpu7x"}
    known |= {"ironwood": "tpu7x", "v5": "v5p", "gh200": "h200"}
    return known.get(kind) or (difflib.get_close_matches(kind, CHIPS, n=1, cutoff=0) or ["v5p"])[0]


def tpu_devices(topology: Topology) -> Sequence[Any]:
    """Devices of TPU slices that nobody has: enough to lay out a mesh and to compile for.

    Raises:
      UserError: where libtpu is missing or refuses.
    """
    require(
        importlib.util.find_spec("libtpu") is not None,
        f"--topology={topology.name}: TPUs are planned with libtpu, which is not installed: pip install -e '.[tpu]' "
        "(it has wheels for Linux on x86-64 alone). GPUs are planned without, as in --topology=h200:64.",
    )
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name != "JAX_PLATFORMS"})
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device, as Cloud TPUs show it
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    try:
        with _quiet():  # libtpu tells that this is no TPU host
            return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # the plugin raises what it likes
        raise UserError(f"--topology={topology.name}: libtpu refuses it: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what native code writes to standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Wires(NamedTuple):
    """What one device has of the connection along a mesh axis.

    Attributes:
      ring: bytes a second, out of a device, of messages that go around.
      cross: bytes a second, out of a device, of messages to all others alike.
    """

    ring: float
    cross: float


def wires(topology: Topology, mesh: np.ndarray | None, sizes: Mapping[str, int], axes: Sequence[str]) -> Wires:
    """Along these mesh axes together.

    On a torus, neighbours of a group that spans a whole dimension which closes into a ring have both of its links; of
    part of a dimension, one. Messages to all others are held up where most of them meet: half of a group sends half of
    its bytes across the middle of each dimension.

    Args:
      topology: the chips.
      mesh: devices [data, fsdp, expert, context] with coordinates; None where there is no torus.
      sizes: of the axes.
      axes: that the messages go along.
    """
    chip = topology.chip
    members = math.prod(sizes[axis] for axis in axes)
    if mesh is None:
        # Later axes of the mesh lie within a node.
        inside = math.prod(sizes[axis] for axis in AXES[AXES.index(axes[0]) :])
        rate = chip.link if inside <= chip.host else chip.network
        return Wires(rate, rate)
    order = [AXES.index(axis) for axis in axes]
    rest = [i for i in range(mesh.ndim) if i not in order]
    group = mesh.transpose(*order, *rest).reshape(members, -1)[:, 0]
    if len({getattr(device, "slice_index", 0) for device in group}) > 1:
        return Wires(chip.network / chip.devices, chip.network / chip.devices)
    ring, cross = 0.0, math.inf
    for dimension, length in enumerate((*topology.shape, 1)[:3]):
        extent = len({device.coords[dimension] for device in group})
        if extent == 1:
            continue
        closed = extent == length and length % chip.wraps == 0
        ring += chip.link * (2 if closed else 1) / chip.devices
        cross = min(cross, chip.link * (8 if closed else 4) / extent / chip.devices)
    if not ring:  # the cores of one chip
        return Wires(chip.bandwidth / chip.devices, chip.bandwidth / chip.devices)
    return Wires(ring, cross)

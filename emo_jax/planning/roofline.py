"""How long a step takes at the least, what holds it up, and what that makes of a token budget."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from emo_jax.config import Config
from emo_jax.planning.cost import Work
from emo_jax.planning.topology import Topology, wires

REACHED = 0.5
RANGE = "37 to 75%"
"""Of the roofline: about the median of ten published mixtures on TPUs, and their range, as
`benchmarks/planning.py published` has them."""

ASSUMPTIONS = (
    "a device's operations run one after another, each at the chip's peak or its HBM's, whichever takes longer;",
    "exchanges run one after another over the links along their mesh axes, and overlap with the former wholly;",
    "experts are balanced, no documents are masked out, and the input pipeline keeps up.",
)
"""Of the roofline, in words."""


class Operations(NamedTuple):
    """Of a compiled program, one after another.

    Attributes:
      busy: seconds by part of the model.
      multiplying: seconds of those whose FLOPs take longer than their bytes.
      traffic: bytes to and from HBM.
    """

    busy: Mapping[str, float]
    multiplying: float
    traffic: float


class StepTime(NamedTuple):
    """Of one step.

    Attributes:
      device: seconds by part of the model.
      network: seconds by exchange.
      compute, memory: seconds of all FLOPs at the chip's peak, and of all bytes at its HBM's.
      bound: what most of the roofline waits for: `compute`, `HBM` or `interconnect`.
      roofline: seconds at the least.
      expected: seconds, at the fraction of the roofline that others have reached.
      mfu, expected_mfu: model FLOPs over the chips' peak, at each.
      tokens_per_second: of all chips, as expected.
      chip_hours: of the whole run, as expected.
    """

    device: dict[str, float]
    network: dict[str, float]
    compute: float
    memory: float
    bound: str
    roofline: float
    expected: float
    mfu: float
    expected_mfu: float
    tokens_per_second: float
    chip_hours: float


def _whole_torus(topology: Topology, sizes: Mapping[str, int], axes: tuple[str, ...]) -> bool:
    """Whether these axes span all of a torus: XLA then scatters by all-reduce, and on three dimensions gathers too."""
    members = math.prod(sizes[axis] for axis in axes)
    return topology.chip.torus > 0 and topology.slices == 1 and members == topology.devices > 8


def step_time(
    run: Config,
    topology: Topology,
    mesh: np.ndarray | None,
    sizes: Mapping[str, int],
    work: Mapping[str, Work],
    sent: Mapping[tuple[str, tuple[str, ...]], float],
    model_flops: float,
    compiled: Operations | None = None,
) -> StepTime:
    """The roofline of a step.

    Args:
      run: for its batch and its length.
      topology: of the chips.
      mesh: devices [data, fsdp, expert, context] with coordinates; None for GPUs.
      sizes: of the mesh axes.
      work: of one device, by part.
      sent: bytes out of one device by (kind of collective, mesh axes).
      model_flops: of one device.
      compiled: a compiled program's operations, which count instead of formulas.
    """
    chip = topology.chip
    peak, bandwidth = chip.flops / chip.devices, chip.bandwidth / chip.devices
    compute = sum(part.flops for part in work.values()) / peak
    memory = (compiled.traffic if compiled else sum(part.traffic for part in work.values())) / bandwidth
    if compiled:
        device, multiplying = dict(compiled.busy), compiled.multiplying
    else:
        device = {name: max(part.flops / peak, part.traffic / bandwidth) for name, part in work.items()}
        multiplying = sum(part.flops / peak for part in work.values() if part.flops / peak > part.traffic / bandwidth)
    network: dict[str, float] = {}
    for (kind, axes), size in sent.items():
        if not size or axes == ("?",):
            continue
        along = wires(topology, mesh, sizes, axes)
        rate = along.cross if "all-to-all" in kind else along.ring
        if compiled is None and _whole_torus(topology, sizes, axes) and kind in ("reduce-scatter", "all-gather"):
            rate /= 1 if kind == "all-gather" and topology.chip.torus == 2 else 2
        network[f"{kind} over {' × '.join(axes)}"] = size / rate
    busiest, waiting = sum(device.values()), sum(network.values())
    bound = "interconnect" if waiting > busiest else "compute" if 2 * multiplying >= busiest else "HBM"
    roofline = max(busiest, waiting)
    expected = roofline / REACHED
    mfu = model_flops / peak / roofline
    tokens = run.data.batch_size * run.data.sequence_length
    hours = run.train.steps * expected * topology.chips / 3600
    return StepTime(
        device,
        network,
        compute,
        memory,
        bound,
        roofline,
        expected,
        mfu,
        mfu * REACHED,
        tokens / expected,
        hours,
    )

"""Which layout of a run is the fastest that fits: all are estimated, few are compiled."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from emo_jax.config import Config
from emo_jax.errors import UserError
from emo_jax.model.config import REMAT_POLICIES
from emo_jax.parallel.config import AXES
from emo_jax.parallel.exchange import best_exchange
from emo_jax.parallel.sharding import arrange, mesh_sizes
from emo_jax.planning.compiler import Compiled
from emo_jax.planning.cost import Cost, estimate
from emo_jax.planning.roofline import Operations, StepTime, step_time
from emo_jax.planning.shapes import dispatches
from emo_jax.planning.topology import Topology, offered, tpu_devices

CHUNKS = (1, 2, 4, 8)
"""Numbers of chunks that a search tries."""
MARGIN = 0.92
"""Of a device's memory that an estimate may fill to count as fitting: formulas are within a tenth of compilers."""

SECONDS = 5.0
"""Between lines of progress."""

FIELDS = (
    "mesh.data",
    "mesh.fsdp",
    "mesh.expert",
    "mesh.context",
    "mesh.exchange",
    "mesh.chunks",
    "model.remat",
    "train.microbatches",
)
"""Of a config, that a layout sets."""


class Layout(NamedTuple):
    """A run on a topology, as formulas have it.

    Attributes:
      run: every axis of its mesh a number.
      mesh: devices with coordinates, or None for GPUs.
      cost, time: of its step.
    """

    run: Config
    mesh: np.ndarray | None
    cost: Cost
    time: StepTime

    @property
    def sizes(self) -> dict[str, int]:
        """Of the mesh axes."""
        return {axis: getattr(self.run.mesh, axis) for axis in AXES}

    @property
    def exchange(self) -> str:
        """How tokens reach other ranks' experts: `ring`, `all_to_all`, or `none` where all experts are at hand."""
        mesh = self.run.mesh
        if mesh.expert == 1 or not dispatches(self.run.model):
            return "none"
        return best_exchange(mesh.expert, self.run.model.num_choices) if mesh.exchange == "auto" else mesh.exchange

    def fits(self, topology: Topology, margin: float = 1.0) -> bool:
        """Whether it needs no more than this share of a device's memory."""
        return self.cost.memory.total <= margin * topology.room

    def compiled_time(self, topology: Topology, compiled: Compiled) -> StepTime:
        """The roofline of a compiled program; what its attention kernels multiply is added by formula."""
        attention = self.cost.flops.attention * topology.chip.devices / topology.chip.flops
        busy = compiled.busy | {"attention": compiled.busy.get("attention", 0.0) + attention}
        operations = Operations(busy, compiled.multiplying + attention, sum(compiled.traffic.values()))
        given = (self.sizes, self.cost.work, compiled.sent, self.cost.flops.model)
        return step_time(self.run, topology, self.mesh, *given, operations)

    def flags(self, than: Config) -> str:
        """What to add to a command to get from another config to this one."""
        mine, other = self.run.fields(), than.fields()
        return " ".join(f"--config.{name}={mine[name]}" for name in FIELDS if mine[name] != other[name])


class Planner:
    """Lays runs out on one topology and estimates them."""

    def __init__(self, topology: Topology):
        """Asks libtpu for the devices of a TPU topology; for GPUs nothing is asked."""
        self.topology = topology
        self.devices = tpu_devices(topology) if topology.compiles else []
        self._arranged = functools.cache(self._arrange)

    def layout(self, run: Config) -> Layout:
        """The run as it is.

        Raises:
          UserError: where its mesh does not fit the devices, the rows, their tokens or the experts.
        """
        rows, experts = run.data.batch_size // run.train.microbatches, run.model.routed_experts
        sizes = mesh_sizes(run.mesh, self.topology.devices, rows, length=run.data.sequence_length, experts=experts)
        mesh = dataclasses.replace(run.mesh)
        for axis, size in sizes.items():
            setattr(mesh, axis, size)
        return self._estimate(dataclasses.replace(run, mesh=mesh))

    def _estimate(self, run: Config) -> Layout:
        sizes = {axis: getattr(run.mesh, axis) for axis in AXES}
        placed = self._arranged(tuple(sizes.values())) if self.topology.compiles else None
        cost = estimate(run, sizes)
        least = step_time(run, self.topology, placed, sizes, cost.work, cost.sent, cost.flops.model)
        return Layout(run, placed, cost, least)

    def _arrange(self, sizes: tuple[int, ...]) -> np.ndarray:
        return arrange(self.devices, dict(zip(AXES, sizes, strict=True)))

    def layouts(self, run: Config, log: Callable[[str], None]) -> list[Layout]:
        """Every layout that the run's batch allows, fastest first among those that fit, then those that do not."""
        found = []
        candidates = list(self._candidates(run))
        told = 0.0
        for i, candidate in enumerate(candidates):
            if time.monotonic() - told > SECONDS:
                told = time.monotonic()
                log(f"estimated {i:,} of {len(candidates):,} layouts")
            found.append(self._estimate(candidate))
        return sorted(
            found,
            key=lambda one: (
                not one.fits(self.topology, MARGIN),
                one.time.roofline if one.fits(self.topology, MARGIN) else one.cost.memory.total,
                sum(one.time.device.values()),
                one.cost.memory.total,
            ),
        )

    def _candidates(self, run: Config) -> Iterator[Config]:
        n = self.topology.devices
        experts = min(run.model.routed_experts) if dispatches(run.model) else 1
        context = max(run.mesh.context, 1)
        if n % context or run.data.sequence_length % context:
            return
        for expert in _divisors(n // context):
            if expert > experts:
                continue
            for fsdp in _divisors(n // context // expert):
                data = n // context // expert // fsdp
                rows = run.data.batch_size // (data * fsdp * expert)
                if rows * data * fsdp * expert != run.data.batch_size or data % self.topology.slices:
                    continue
                for microbatches in _divisors(rows):
                    tokens = rows // microbatches * run.data.sequence_length // context
                    yield from self._settings(run, data, fsdp, expert, context, microbatches, tokens)

    def _settings(
        self, run: Config, data: int, fsdp: int, expert: int, context: int, microbatches: int, tokens: int
    ) -> Iterator[Config]:
        other = "all_to_all" if best_exchange(expert, run.model.num_choices) == "ring" else "ring"
        kinds = ("auto", other) if expert > 1 else ("auto",)
        for exchange in kinds:
            for chunks in CHUNKS if dispatches(run.model) else (1,):
                if tokens % chunks:
                    continue
                mesh = dataclasses.replace(
                    run.mesh, data=data, fsdp=fsdp, expert=expert, context=context, exchange=exchange, chunks=chunks
                )
                for remat in REMAT_POLICIES:
                    if remat == "exchange" and expert == 1:
                        continue  # nothing crosses: as `full`
                    yield dataclasses.replace(
                        run,
                        mesh=mesh,
                        model=dataclasses.replace(run.model, remat=remat),
                        train=dataclasses.replace(run.train, microbatches=microbatches),
                    )

    def leanest(self, run: Config) -> Iterator[Layout]:
        """Layouts that need little memory: a row at a time, everything computed again, all state in pieces."""
        for candidate in self._candidates(run):
            rows = candidate.data.batch_size // candidate.train.microbatches
            groups = self.topology.devices // candidate.mesh.context
            lean = candidate.mesh.data == self.topology.slices and candidate.model.remat == "full"
            if lean and rows == groups and candidate.mesh.chunks in (1, CHUNKS[-1]):
                yield self._estimate(candidate)

    def nearest(self, run: Config, margin: float = MARGIN) -> Layout | None:
        """The layout that fits with the fewest fields changed, and among those the fastest; None where none fits."""
        fitting = [one for one in self.layouts(run, lambda text: None) if one.fits(self.topology, margin)]
        try:
            own = self.layout(run).run
        except UserError:
            own = run
        return min(fitting, key=lambda one: (_changes(one.run, own), one.time.roofline), default=None)


def apart(layouts: Sequence[Layout], number: int) -> list[Layout]:
    """The first so many that differ in more than their chunks and exchange."""
    kept: dict[tuple, Layout] = {}
    for one in layouts:
        key = (*one.sizes.values(), one.run.model.remat, one.run.train.microbatches)
        if len(kept) < number:
            kept.setdefault(key, one)
    return list(kept.values())


Pair = tuple[Layout, Compiled | None]
"""A layout, and its compiled program where there is one."""


def correction(pairs: Sequence[Pair], topology: Topology) -> float:
    """Times of compiled programs over times by formula: their median; 1 where none was compiled."""
    known = [(one, compiled) for one, compiled in pairs if compiled is not None and compiled.total]
    ratios = [one.compiled_time(topology, compiled).roofline / one.time.roofline for one, compiled in known]
    return statistics.median(ratios) if ratios else 1.0


def ranked(pairs: Sequence[Pair], topology: Topology) -> list[Pair]:
    """Fastest first, by compiled programs where there are some; what turned out too big comes last."""
    factor = correction(pairs, topology)

    def key(pair: Pair) -> tuple[bool, float]:
        layout, compiled = pair
        if compiled is None:
            return False, factor * layout.time.roofline
        return not compiled.fits(topology), layout.compiled_time(topology, compiled).roofline

    return sorted(pairs, key=key)


def smallest_topology(run: Config, kind: str) -> Topology | None:
    """The fewest chips of a kind, in shapes that are offered, on which some layout of the run fits."""
    for topology in offered(kind):
        planner = Planner(topology)
        for layout in planner.leanest(run):
            if layout.fits(topology, MARGIN):
                return topology
    return None


def _changes(run: Config, other: Config) -> int:
    mine, theirs = run.fields(), other.fields()
    return sum(mine[name] != theirs[name] for name in FIELDS)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]

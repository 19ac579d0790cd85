"""A plan in words and numbers, for people and for programs."""

from collections.abc import Sequence
from typing import Any

from emo_jax.analysis import human
from emo_jax.config import Config
from emo_jax.parallel.config import AXES
from emo_jax.planning.compiler import Compiled
from emo_jax.planning.roofline import ASSUMPTIONS, RANGE, REACHED, StepTime
from emo_jax.planning.search import Layout, Pair, correction
from emo_jax.planning.shapes import dispatches
from emo_jax.planning.topology import Topology

UNITS = {
    "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")),
    "FLOP": ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")),
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
}
LARGEST = 8
"""Kinds of arrays, and exchanges, that a plan names."""


def plan_text(layout: Layout, topology: Topology, compiled: Compiled | None) -> str:
    """One plan; without a compiled program, by formulas alone."""
    if compiled is not None and not compiled.total:
        return _out_of_memory_text(layout, topology, compiled)
    lines = [*_memory_lines(layout, topology, compiled), ""]
    lines += [*_flops_lines(layout, compiled), ""]
    lines += [*_exchange_lines(layout, compiled), ""]
    time = layout.compiled_time(topology, compiled) if compiled else layout.time
    return "\n".join(lines + _time_lines(layout, topology, time, compiled))


def header(layout: Layout, topology: Topology) -> str:
    """What is planned, in a line or two."""
    run = layout.run
    mesh = " × ".join(f"{axis} {size}" for axis, size in layout.sizes.items() if size > 1) or "one device"
    rows = run.data.batch_size // run.train.microbatches // _row_groups(layout)
    device = "a chip" if topology.chip.devices == 1 else "a device (two a chip)"
    experts = f", exchange {layout.exchange}, {run.mesh.chunks} chunks" if dispatches(run.model) else ""
    return (
        f"{topology.name}{f' × {topology.slices} slices' if topology.slices > 1 else ''}: {topology.chips:,} chips as "
        f"{mesh}\n{rows} rows of {run.data.sequence_length} × {run.train.microbatches} microbatches {device}, "
        f"remat {run.model.remat}{experts}"
    )


def _row_groups(layout: Layout) -> int:
    sizes = layout.sizes
    return sizes["data"] * sizes["fsdp"] * sizes["expert"]


class _Table:
    """Lines of names and of numbers, all in one unit: the largest in which the largest number is at least 0.2."""

    def __init__(self, title: str, kind: str, columns: Sequence[str]):
        self._title, self._kind, self._columns = title, kind, columns
        self._rows: list[tuple[str, Sequence[float | None], str]] = []

    def add(self, name: str, *values: float | None, note: str = "") -> None:
        self._rows.append((name, values, note))

    def lines(self) -> list[str]:
        largest = max((value for _, values, _ in self._rows for value in values if value), default=0.0)
        size, unit = scale(largest, self._kind)
        lines = [f"{f'{self._title}, {unit}':<46}" + "".join(f"{name:>12}" for name in self._columns)]
        for name, values, note in self._rows:
            shown = "".join(f"{'' if value is None else f'{value / size:,.2f}':>12}" for value in values)
            lines.append(f"  {name:<44}{shown}{note}".rstrip())
        return lines


def scale(value: float, kind: str) -> tuple[float, str]:
    """The unit of bytes (`B`), operations (`FLOP`) or seconds (`s`) that shows this value best."""
    return next((one for one in UNITS[kind] if value >= 0.2 * one[0]), UNITS[kind][-1])


def amount(value: float, kind: str) -> str:
    """A number with its unit, such as `7.57 GB`."""
    size, unit = scale(value, kind)
    return f"{value / size:,.2f} {unit}"


SOURCES = ("compiled", "by formula")


def _out_of_memory_text(layout: Layout, topology: Topology, compiled: Compiled) -> str:
    parts = sorted(layout.cost.memory.parts.items(), key=lambda part: -part[1])[:4]
    named = ", ".join(f"{name} {amount(size, 'B')}" for name, size in parts)
    return (
        f"DOES NOT FIT: the compiler needs {amount(compiled.needed, 'B')} of the {amount(compiled.limit, 'B')} of HBM, "
        f"{amount(compiled.needed - compiled.limit, 'B')} too much.\n"
        f"By formula the fullest moment is {layout.cost.memory.phase}: {named}."
    )


def _memory_lines(layout: Layout, topology: Topology, compiled: Compiled | None) -> list[str]:
    memory, limit = layout.cost.memory, topology.room
    table = _Table(f"Memory a {'chip' if topology.chip.devices == 1 else 'device'}", "B", SOURCES)
    table.add("parameters, moments and batch", compiled.arguments if compiled else None, memory.arguments)
    table.add("temporaries at the fullest moment", compiled.temporaries if compiled else None, memory.temporaries)
    table.add("in all", compiled.total if compiled else None, memory.total)
    lines = table.lines()
    total = compiled.total if compiled else memory.total
    spare = limit - total
    if spare >= 0:
        verdict = f"fits, {amount(spare, 'B')} ({spare / limit:.0%}) to spare"
    else:
        verdict = f"DOES NOT FIT, {amount(-spare, 'B')} too much"
    lines.append(f"  of {amount(limit, 'B')} of HBM: {verdict}")
    if compiled:
        lines.append("Largest arrays at the fullest moment")
        for one in compiled.largest[:LARGEST]:
            lines.append(f"  {amount(one.size, 'B'):>10} {one.number:>3} × {one.shape:<28} {one.name}")
    else:
        lines.append(f"Fullest moment: {memory.phase}")
        parts = sorted(memory.parts.items(), key=lambda part: -part[1])
        lines += [f"  {amount(size, 'B'):>10}  {name}" for name, size in parts[:LARGEST]]
    return lines


def _flops_lines(layout: Layout, compiled: Compiled | None) -> list[str]:
    flops = layout.cost.flops
    table = _Table("Operations of a device in a step", "FLOP", SOURCES)
    table.add("the model's, forward and backward", None, flops.model)
    table.add("dense products, recomputed ones too", compiled.dense if compiled else None, flops.dense)
    if flops.grouped:
        table.add("experts' products, buffers counted full", compiled.grouped if compiled else None, flops.grouped)
        table.add("  of which there are tokens for", None, flops.filled)
    table.add("attention's kernels", None, flops.attention)
    return table.lines()


def _exchange_lines(layout: Layout, compiled: Compiled | None) -> list[str]:
    formula, found = layout.cost.sent, compiled.sent if compiled else {}
    if not formula and not found:
        return ["Nothing is sent: one device."]
    table = _Table("Sent by a device in a step", "B", SOURCES)
    keys = sorted({*formula, *found}, key=lambda key: -max(formula.get(key, 0), found.get(key, 0)))
    for key in keys[:LARGEST]:
        name = f"{key[0]} over {' × '.join(key[1])}"
        table.add(name, found.get(key, 0.0) if compiled else None, formula.get(key, 0.0))
    table.add("in all", sum(found.values()) if compiled else None, sum(formula.values()))
    return table.lines()


def _time_lines(layout: Layout, topology: Topology, time: StepTime, compiled: Compiled | None) -> list[str]:
    run = layout.run
    tokens = run.data.batch_size * run.data.sequence_length
    table = _Table(f"Step time, from {'the compiled program' if compiled else 'formulas'}", "s", ("",))
    table.add("operations alone, at the chip's peak", time.compute)
    table.add("HBM alone", time.memory)
    table.add("one after another", sum(time.device.values()))
    table.add("exchanges one after another", sum(time.network.values()))
    table.add(f"roofline, bound by {time.bound}", time.roofline, note=f"   MFU {time.mfu:.1%}")
    expected = f"expected, {REACHED:.0%} of it (others reach {RANGE})"
    table.add(expected, time.expected, note=f"   MFU {time.expected_mfu:.1%}")
    lines = table.lines()
    top = sorted(time.device.items(), key=lambda part: -part[1])[:5]
    lines.append("  most of it: " + ", ".join(f"{name} {amount(seconds, 's')}" for name, seconds in top))
    rate = time.tokens_per_second
    days = run.train.steps * time.expected / 86_400
    lines += [
        f"  {human(rate)} tokens/s, {human(rate / topology.chips)} a chip",
        f"{run.train.steps:,} steps of {human(tokens)} tokens ({human(run.train.steps * tokens)} in all): "
        f"{time.chip_hours:,.{0 if time.chip_hours > 10 else 1}f} chip-hours, {days:,.1f} days",
        "Assumed:",
        *(f"  {line}" for line in ASSUMPTIONS),
    ]
    return lines


def search_text(pairs: Sequence[Pair], topology: Topology, than: Config, shown: int = 10) -> str:
    """A table of the first layouts and of all that were compiled, and the flags of each."""
    factor = correction(pairs, topology)
    listed = [(place, *pair) for place, pair in enumerate(pairs, 1) if place <= shown or pair[1] is not None]
    head = (
        f"{'':>3} {'data×fsdp×expert×context':<25}{'rows×micro':>11} {'remat':<9}{'chunks':>6} {'exchange':<11}"
        f"{'GB':>8}{'compiled':>16}{'step':>11}{'tokens/s':>10}{'MFU':>7}  bound"
    )
    lines = [f"Layouts by expected step time ({REACHED:.0%} of the roofline)", head]
    for place, one, compiled in listed:
        run, time, slower = one.run, one.time, factor
        if compiled is not None and compiled.total:
            time, slower = one.compiled_time(topology, compiled), 1.0
        mesh = "×".join(str(size) for size in one.sizes.values())
        rows = f"{run.data.batch_size // run.train.microbatches // _row_groups(one)}×{run.train.microbatches}"
        measured = "" if compiled is None else _held(compiled, topology)
        lines.append(
            f"{place:>3} {mesh:<25}{rows:>11} {run.model.remat:<9}{run.mesh.chunks:>6} {one.exchange:<11}"
            f"{one.cost.memory.total / 1e9:>8.2f}{measured:>16}{amount(slower * time.expected, 's'):>11}"
            f"{human(time.tokens_per_second / slower):>10}{time.expected_mfu / slower:>7.1%}  {time.bound}"
        )
    if factor != 1:
        lines.append(f"Steps that were not compiled: {factor:.2f} times the formula, as the compiled ones take.")
    lines.append("Flags:")
    lines += [f"{place:>3} {one.flags(than) or '(the config as it is)'}" for place, one, _ in listed]
    return "\n".join(lines)


def _held(compiled: Compiled, topology: Topology) -> str:
    text = f"{compiled.total / 1e9:.2f}" if compiled.total else ""
    return text if compiled.fits(topology) else f"{text}, too big".removeprefix(", ")


def plan_json(layout: Layout, topology: Topology, compiled: Compiled | None) -> dict[str, Any]:
    """Every figure of a plan, bytes, FLOPs and seconds of one device and step."""
    cost = layout.cost
    time = layout.compiled_time(topology, compiled) if compiled and compiled.total else layout.time
    found: dict[str, Any] = {
        "topology": topology._asdict() | {"chips": topology.chips},
        "layout": {axis: layout.sizes[axis] for axis in AXES}
        | {name: layout.run.fields()[name] for name in ("model.remat", "train.microbatches", "mesh.chunks")},
        "formula": {
            "memory": cost.memory._asdict() | {"total": cost.memory.total},
            "flops": cost.flops._asdict(),
            "work": {name: work._asdict() for name, work in cost.work.items()},
            "sent": _sent_json(cost.sent),
        },
        "time": time._asdict(),
        "room": topology.room,
    }
    if compiled:
        found["compiled"] = compiled._asdict() | {
            "sent": _sent_json(compiled.sent),
            "largest": [one._asdict() for one in compiled.largest],
        }
    return found | {"fits": layout.fits(topology) if compiled is None else compiled.fits(topology)}


def _sent_json(sent: dict[tuple[str, tuple[str, ...]], float]) -> list[dict[str, Any]]:
    return [{"kind": kind, "axes": list(axes), "bytes": size} for (kind, axes), size in sent.items()]

"""What a run takes on chips one has not: `python -m emo_jax.plan --config=configs/emo_1b14b.py --topology=v5p:4x4x4`.

Compiles the real step for the real chip, without one: memory, FLOPs, exchanges, a roofline of the step and what it
makes of the token budget. TPUs v4, v5e, v5p, v6e and tpu7x; h100:64 or h200:8 by formulas alone. `--search` looks for
the fastest layout that fits. Fields of the config can be overridden as in training. Ends with status 1 where the step
does not fit.
"""

import json
import sys
import time
from pathlib import Path

from absl import flags

from emo_jax import cli
from emo_jax.errors import UserError, require

_CONFIG = cli.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chips, as v5p:4x4x4, v5e:8x8, or h200:64 for GPUs.", required=True)
_SLICES = flags.DEFINE_integer("slices", 1, "TPU slices of that shape, joined by the data-centre network.")
_SEARCH = flags.DEFINE_bool("search", False, "Look for the fastest mesh, remat policy, rows and chunks that fit.")
_COMPILE = flags.DEFINE_integer(
    "compile", -1, "Layouts to compile; 0: formulas alone; -1: the one planned, or three of a search.", -1
)
_OUT = flags.DEFINE_string("out", "", "JSON file for every figure.")


class _Clock:
    """Prints what happens and since when."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"  [{time.monotonic() - self._start:4.0f} s] {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Prints a plan, or a table of layouts."""
    from emo_jax.planning import Planner, parse_topology, unplaced

    topology = parse_topology(_TOPOLOGY.value, _SLICES.value)
    run = unplaced(cli.check_config(_CONFIG.value))
    run.validate()
    require(
        topology.compiles or _COMPILE.value <= 0,
        f"--compile={_COMPILE.value}: GPUs are planned by formulas alone; drop the flag.",
    )
    planner = Planner(topology)
    return _search(planner, run) if _SEARCH.value else _plan(planner, run)


def _plan(planner, run) -> int:
    from emo_jax.planning import compile_step, expected_seconds, plan_json, plan_text
    from emo_jax.planning.report import header
    from emo_jax.planning.search import MARGIN

    topology, clock = planner.topology, _Clock()
    try:
        layout = planner.layout(run)
    except UserError as error:
        raise UserError(f"{error} {_advice(planner, run)}") from None
    print(header(layout, topology), flush=True)
    compiled = None
    if topology.compiles and _COMPILE.value:
        clock(f"compiling {run.model.num_layers} layers takes about {_minutes(expected_seconds(layout.run))}, once")
        compiled = compile_step(layout.run, topology, clock)
    print("\n" + plan_text(layout, topology, compiled))
    if _OUT.value:
        _write([plan_json(layout, topology, compiled)])
    if compiled.fits(topology) if compiled else layout.fits(topology):
        return 0
    # Where the compiler needs more than the formula says, others are taken to need as much more.
    more = compiled.total / layout.cost.memory.total if compiled else 1.0
    print(_advice(planner, run, MARGIN / max(more, 1.0)))
    return 1


def _search(planner, run) -> int:
    from emo_jax.planning import compile_step, expected_seconds, plan_json, search_text
    from emo_jax.planning.search import apart, ranked

    topology, clock = planner.topology, _Clock()
    layouts = planner.layouts(run, clock)
    require(
        bool(layouts),
        f"--search: no mesh over {topology.devices} devices divides data.batch_size={run.data.batch_size}; "
        f"try --config.data.batch_size={-(-run.data.batch_size // topology.devices) * topology.devices}.",
    )
    fitting = [one for one in layouts if one.fits(topology)]
    if not fitting:
        print(f"None of {len(layouts):,} layouts fits {topology.name}; the smallest, by formula:")
        print(search_text([(one, None) for one in layouts[:3]], topology, run))
        print(_advice(planner, run))
        return 1
    count = 0 if not topology.compiles else 3 if _COMPILE.value < 0 else _COMPILE.value
    wanted = apart(fitting, count)
    if wanted:
        time = _minutes(sum(expected_seconds(one.run) for one in wanted))
        clock(f"compiling the {len(wanted)} best takes about {time}, once; Ctrl-C stops")
    found = {}
    try:
        for i, one in enumerate(wanted, 1):
            clock(f"compiling {i} of {len(wanted)}: {one.flags(run)}")
            found[id(one)] = compile_step(one.run, topology, clock)
    except KeyboardInterrupt:
        print("\nStopped; what was compiled is kept, and the same command goes on from there.")
    pairs = ranked([(one, found.get(id(one))) for one in fitting], topology)
    print(search_text(pairs, topology, run))
    if _OUT.value:
        _write([plan_json(one, topology, compiled) for one, compiled in pairs[:50]])
    return 0


def _advice(planner, run, margin: float | None = None) -> str:
    """The nearest layout that works, or else the fewest chips that do."""
    from emo_jax.planning.search import MARGIN, smallest_topology

    nearest = planner.nearest(run, margin or MARGIN)
    if nearest is not None:
        memory = nearest.cost.memory.total / 1e9
        return f"Nearest that fits, by formula ({memory:.1f} GB): {nearest.flags(run) or 'the config as it is'}"
    larger = smallest_topology(run, planner.topology.kind)
    if larger is None:
        return f"No number of {planner.topology.kind} chips fits it."
    return f"The fewest {planner.topology.kind} chips that fit it, by formula: --topology={larger.name} --search"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s of two cores" if seconds < 100 else f"{seconds / 60:.0f} minutes of two cores"


def _write(plans: list) -> None:
    Path(_OUT.value).parent.mkdir(parents=True, exist_ok=True)
    Path(_OUT.value).write_text(json.dumps(plans, indent=1) + "\n")
    print(f"Every figure: {_OUT.value}")


if __name__ == "__main__":
    cli.run(main)

"""How far the planner's formulas are from what a TPU compiler says, and from what others have measured.

`python benchmarks/planning.py points [--out=DIR]` compares memory, FLOPs, traffic and exchanged bytes with compiled
steps: 21 configs, topologies and layouts, about an hour of two cores where nothing is cached.
`python benchmarks/planning.py published` sets the roofline beside what mixtures on TPUs are known to reach.

`python benchmarks/planning.py scale [--out=DIR] [--compile]` plans configs/emo_1b14b.py on 8 to 4096 v5p chips, and
with 32 to 1024 experts on 64 of them, the best layout of each way to the experts; --compile compiles the best at 8, 64
and 512 chips and with 32, 256 and 1024 experts (half an hour of two cores).
"""

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from skew import config_file

from emo_jax.analysis import page, write_page
from emo_jax.analysis.figures import BLUE, DOMAIN_COLOURS, GREY, ORANGE, Line, point_figure
from emo_jax.config import Config, MeshConfig, ModelConfig
from emo_jax.model import flops_per_token
from emo_jax.planning import (
    REACHED,
    Layout,
    Planner,
    Topology,
    compile_step,
    parse_topology,
    unplaced,
)
from emo_jax.planning.search import MARGIN


class Point(NamedTuple):
    """A step to compile: rows of a microbatch on each device, microbatches, and fields that differ from the config."""

    config: str
    topology: str
    rows: int
    microbatches: int = 1
    fields: Mapping[str, Any] = MappingProxyType({})


FOUR = {"model.num_layers": 4}
POINTS = [
    Point("emo_1b14b", "v5p:4x4x4", 4),
    Point("emo_1b14b", "v6e:8x8", 4),
    Point("emo_1b14b", "v5p:4x4x4", 4, 4, {"model.remat": "exchange"}),
    Point("emo_1b14b", "v4:4x4x4", 4, 4, {"model.remat": "exchange"}),
    Point("emo_1b14b", "v5p:4x4x4", 4, 1, {"mesh.expert": 1, "mesh.chunks": 1}),
    Point("stdmoe_1b14b", "v5p:4x4x8", 4, 2),
    Point("stdmoe_1b4b", "v5e:4x4", 2),
    Point("dense_1b", "v5e:4x4", 2),
    Point("emo_1b14b", "v5p:4x4x4", 4, 1, FOUR | {"model.remat": "none"}),
    Point("emo_1b14b", "v5p:4x4x4", 4, 1, FOUR | {"model.remat": "dots"}),
    Point("emo_1b14b", "v5p:2x2x1", 4, 1, FOUR | {"model.remat": "exchange", "mesh.expert": 4}),
    Point("emo_1b14b", "tpu7x:4x4x4", 8, 2, FOUR | {"model.remat": "exchange", "mesh.chunks": 8}),
    Point("emo_1b14b", "v6e:4x4", 2, 2, FOUR | {"model.remat": "dots", "mesh.expert": 16, "mesh.chunks": 2}),
    Point("emo_1b14b", "v5p:4x4x4", 4, 1, FOUR | {"mesh.context": 2}),
    Point(
        "emo_1b14b",
        "v5p:4x4x4",
        4,
        1,
        FOUR | {"model.num_experts": 512, "model.remat": "exchange", "mesh.expert": 64},
    ),
    Point("emo_1b14b", "v5p:4x4x4", 4, 1, FOUR | {"model.remat": "exchange", "mesh.exchange": "ring"}),
    Point("emo_1b14b", "v5p:4x4x4", 4, 1, FOUR | {"model.remat": "exchange", "mesh.expert": 1}),
    Point("emo_1b14b", "v5p:4x4x4", 4, 1, FOUR | {"model.remat": "exchange", "mesh.chunks": 1}),
    Point("emo_1b14b", "v5p:4x4x4", 4, 1, FOUR | {"model.remat": "none", "mesh.expert": 1, "mesh.chunks": 1}),
    Point("emo_1b14b", "v5p:4x4x4", 4, 1, FOUR | {"model.remat": "none", "mesh.chunks": 1}),
    Point("emo_1b14b", "v5p:4x4x4", 4, 1, FOUR | {"mesh.exchange": "ring", "mesh.chunks": 1}),
]


def load(name: str) -> Config:
    """The config of a file in configs/."""
    return config_file(name).get_config()


def placed(point: Point) -> Layout:
    """The point's run, laid out on its chips."""
    run, topology = load(point.config), parse_topology(point.topology)
    for name, value in point.fields.items():
        section, field = name.split(".")
        setattr(run, section, dataclasses.replace(getattr(run, section), **{field: value}))
    run.train.microbatches = point.microbatches
    run.data.batch_size = point.rows * point.microbatches * topology.devices // run.mesh.context
    return Planner(topology).layout(unplaced(run))


def points(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, point in enumerate(POINTS):
        if args.only and i not in args.only:
            continue
        layout, topology = placed(point), parse_topology(point.topology)
        found = compile_step(layout.run, topology, lambda text: None, Path(args.cache) if args.cache else None)
        cost = layout.cost
        total = sum(cost.sent.values())
        busy = sum(layout.compiled_time(topology, found).device.values())
        line = {
            "point": point._asdict() | {"fields": dict(point.fields)},
            "compiled_bytes": found.total,
            "memory": cost.memory.total / found.total if found.total else None,
            "needed": found.needed,
            "phase": cost.memory.phase,
            "dense": cost.flops.dense / found.dense if found.dense else None,
            "grouped": cost.flops.grouped / found.grouped if found.grouped else None,
            "sent": total / sum(found.sent.values()) if found.sent else None,
            "time": sum(layout.time.device.values()) / busy,
            "seconds": found.seconds,
        }
        lines.append(line)
        ratios = ", ".join(
            f"{name} {line[name]:.3f}" for name in ("memory", "dense", "grouped", "sent", "time") if line[name]
        )
        print(
            f"{i:2} {point.config} {point.topology} {found.total / 1e9:.2f} GB, {found.seconds:.0f} s: {ratios}",
            flush=True,
        )
        (out / "points.json").write_text(json.dumps(lines, indent=1))


class Published(NamedTuple):
    """A measured step of somebody's.

    Attributes:
      name, source: which.
      topology, rows, length: chips; rows on each device in a step, and their tokens.
      model: its geometry, or the nearest that ours has.
      mesh: expert ranks; the rest is FSDP.
      mfu: measured, by its own count of FLOPs; 0 where `rate` is given.
      rate: measured tokens a second and chip.
      apart: what the model here does not have of it.
    """

    name: str
    source: str
    topology: str
    rows: int
    length: int
    model: dict[str, Any]
    mesh: int = 1
    mfu: float = 0.0
    rate: float = 0.0
    apart: str = ""


MIXTRAL = {
    "vocab_size": 32_000,
    "d_model": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 8,
    "num_experts": 8,
    "num_shared_experts": 0,
    "top_k": 2,
    "d_expert": 14_336,
}
LARGE_MIXTRAL = MIXTRAL | {"vocab_size": 32_768, "d_model": 6144, "num_layers": 56, "num_heads": 48, "d_expert": 16_384}
SCOUT = {
    "vocab_size": 202_048,
    "d_model": 5120,
    "num_layers": 48,
    "num_heads": 40,
    "num_kv_heads": 8,
    "num_experts": 17,
    "num_shared_experts": 1,
    "top_k": 2,
    "d_expert": 8192,
}
MAVERICK = SCOUT | {"num_experts": 129, "experts_per_layer": (0, 129) * 24, "d_dense": 16_384}
GEMMA = {
    "vocab_size": 262_144,
    "d_model": 2816,
    "num_layers": 30,
    "num_heads": 16,
    "num_experts": 131,
    "num_shared_experts": 3,
    "top_k": 11,
    "d_expert": 704,
}
QWEN = {
    "vocab_size": 151_936,
    "d_model": 4096,
    "num_layers": 94,
    "num_heads": 64,
    "num_experts": 128,
    "num_shared_experts": 0,
    "top_k": 8,
    "d_expert": 1536,
}
OLMOE = {"vocab_size": 50_304, "num_experts": 64, "num_shared_experts": 0, "top_k": 8}
LATENT = {
    "d_model": 1792,
    "num_layers": 30,
    "num_heads": 14,
    "num_experts": 513,
    "num_shared_experts": 1,
    "top_k": 17,
    "d_expert": 768,
}
RECIPES = "AI-Hypercomputer/tpu-recipes"
PUBLISHED = [
    Published("Mixtral-8x7B", f"{RECIPES} trillium", "v6e:16x16", 8, 4096, MIXTRAL, rate=3896.8, apart="drops tokens"),
    Published(
        "Mixtral-8x22B", f"{RECIPES} trillium", "v6e:16x16", 8, 4096, LARGE_MIXTRAL, mfu=0.362, apart="rows assumed"
    ),
    Published(
        "Mixtral-8x7B", "maxtext Run_Mixtral.md", "v5p:4x4x4", 36, 4096, MIXTRAL, mfu=0.549, apart="bf16 masters"
    ),
    Published("Llama 4 Scout", f"{RECIPES} v5p", "v5p:8x8x8", 8, 8192, SCOUT, rate=2070.5),
    Published("Llama 4 Maverick", f"{RECIPES} v5p", "v5p:4x4x8", 4, 8192, MAVERICK, rate=1321.7, apart="4-way tensors"),
    Published("Gemma 4 26B", f"{RECIPES} ironwood", "tpu7x:4x4x4", 16, 4096, GEMMA, rate=23_707, apart="its attention"),
    Published("Qwen3 235B", f"{RECIPES} ironwood", "tpu7x:4x8x8", 16, 4096, QWEN, rate=4245.9, apart="its attention"),
    Published(
        "56 experts, top 14",
        "maxtext issue 1256",
        "v5p:2x4x4",
        4,
        4096,
        MIXTRAL | {"num_experts": 56, "top_k": 14, "d_expert": 2048},
        mfu=0.265,
        apart="rows assumed",
    ),
    Published("OLMoE", "marin issue 2371", "v5p:2x2x2", 4, 4096, OLMOE, mfu=0.207, apart="rows assumed"),
    Published(
        "EMO 62.9B",
        "maxtext olmoe3, README of its v4 runs",
        "v4:4x4x4",
        1,
        4096,
        LATENT,
        mesh=64,
        rate=4096 / 1.520,
        apart="linear attention, latent experts",
    ),
]


def published(args: argparse.Namespace) -> None:
    reached = []
    print(f"{'':<20}{'chips':<13}{'measured':>9}{'roofline':>9}{'reached':>9}  bound by, and what differs")
    for one in PUBLISHED:
        topology, run = parse_topology(one.topology), Config()
        run.model = ModelConfig(**one.model | {"remat": "full"})
        run.pool.kind, run.data.sequence_length = "none", one.length
        run.data.batch_size = one.rows * topology.devices
        run.mesh = MeshConfig(data=1, fsdp=-1, expert=one.mesh)
        layout = Planner(topology).layout(unplaced(run))
        peak = topology.chip.flops
        flops = flops_per_token(run.model, one.length)
        measured = one.mfu or one.rate * flops / peak
        reached.append(measured / layout.time.mfu)
        print(
            f"{one.name:<20}{one.topology:<13}{measured:>9.1%}{layout.time.mfu:>9.1%}{reached[-1]:>9.1%}  "
            f"{layout.time.bound}; {one.apart}"
        )
    middle = statistics.median(reached)
    errors = sorted(abs(REACHED / value - 1) for value in reached)
    print(f"median reached {middle:.1%}, from {min(reached):.1%} to {max(reached):.1%}")
    print(f"with {REACHED:.0%}, the time is off by {statistics.median(errors):.0%} (median), {errors[-1]:.0%} at most")


CHIPS = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
EXPERTS = (32, 64, 128, 256, 512, 1024)
WAYS = {"no exchange": "none", "ring": "ring", "all-to-all": "all_to_all"}


def best_of_each(run: Config, topology: Topology) -> dict[str, Layout]:
    """The fastest layout that fits, for each way of tokens to their experts."""
    layouts = Planner(topology).layouts(run, lambda text: None)
    fitting = [one for one in layouts if one.fits(topology, MARGIN)]
    found = {way: next((one for one in fitting if one.exchange == kind), None) for way, kind in WAYS.items()}
    return {way: one for way, one in found.items() if one is not None}


def scale(args: argparse.Namespace) -> None:
    cache = Path(args.cache) if args.cache else None
    studies: dict[str, list[dict[str, Any]]] = {"chips": [], "experts": []}

    def study(name: str, x: int, run: Config, topology: Topology, compiled: bool) -> None:
        layouts = best_of_each(run, topology)
        for way, one in layouts.items():
            line = {"x": x, "way": way, "flags": one.flags(run), "memory": one.cost.memory.total, "source": "formula"}
            studies[name].append(line | {"seconds": one.time.expected, "mfu": one.time.expected_mfu})
        fastest = min(layouts.values(), key=lambda one: one.time.roofline)
        if compiled and args.compile:
            found = compile_step(fastest.run, topology, lambda text: None, cache)
            time = fastest.compiled_time(topology, found)
            line = {"x": x, "way": "compiled", "flags": fastest.flags(run), "memory": found.total, "source": "compiled"}
            studies[name].append(line | {"seconds": time.expected, "mfu": time.expected_mfu})
        for line in studies[name]:
            if line["x"] == x:
                print(
                    f"{x:5} {name} {line['way']:<12} {line['seconds'] * 1e3:8.0f} ms  MFU {line['mfu']:.1%}  "
                    f"{line['memory'] / 1e9:6.1f} GB  {line['flags']}",
                    flush=True,
                )

    for shape in CHIPS:
        run, topology = unplaced(load("emo_1b14b")), parse_topology(f"v5p:{shape}")
        context = max(topology.devices // run.data.batch_size, 1)  # more devices than rows share them
        run.mesh = dataclasses.replace(run.mesh, context=context)
        study("chips", topology.chips, run, topology, topology.chips in (8, 64, 512))
    for experts in EXPERTS:
        run, topology = unplaced(load("emo_1b14b")), parse_topology("v5p:4x4x4")
        run.model = dataclasses.replace(run.model, num_experts=experts)
        run.pool = dataclasses.replace(run.pool, max=experts)
        study("experts", experts, run, topology, experts in (32, 256, 1024))
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "scale.json").write_text(json.dumps(studies, indent=1))
    print(write_page(out / "scale.html", scale_page(studies)))


def scale_page(studies: dict[str, list[dict[str, Any]]]) -> str:
    colours = {"no exchange": GREY, "ring": BLUE, "all-to-all": ORANGE, "compiled": DOMAIN_COLOURS[2]}
    sections = []
    for name, title in (("chips", "Chips (v5p), 128 experts"), ("experts", "Experts of a layer, on 64 v5p chips")):
        cards = []
        for key, what, factor, options in (
            ("mfu", "MFU, %", 100, {"rangemode": "tozero"}),
            ("seconds", "Step time, ms", 1e3, {"type": "log"}),
        ):
            lines = []
            for way, colour in colours.items():
                rows = [line for line in studies[name] if line["way"] == way]
                dash = "dot" if way == "compiled" else "solid"
                values = [line[key] * factor for line in rows]
                lines.append(Line(way, [line["x"] for line in rows], values, colour, way, dash))
            figure = point_figure(
                f"{name}_{key}", lines, x_title=title, hover=".3~s", height=340, falling=False, **options
            )
            cards.append(page.card(what, figure, "", wide=True))
        legend = page.legend("way to the experts", [(way, way, colour) for way, colour in colours.items()])
        lead = "One step of 4.19M tokens, as expected from the roofline; the best layout of each way that fits."
        sections.append(page.section(title, lead, cards, legend))
    header = "<header><h1>EMO 1B/14B on paper</h1></header>"
    return page.page("EMO on paper", header + "".join(sections))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=published)  # the one that takes seconds
    commands = parser.add_subparsers()
    one = commands.add_parser("points")
    one.add_argument("--out", default="planning")
    one.add_argument("--cache", default="", help="folder of compiled results; default: the planner's own")
    one.add_argument("--only", type=int, nargs="*", default=[])
    one.set_defaults(run=points)
    two = commands.add_parser("published")
    two.set_defaults(run=published)
    three = commands.add_parser("scale")
    three.add_argument("--out", default="planning")
    three.add_argument("--cache", default="")
    three.add_argument("--compile", action="store_true")
    three.set_defaults(run=scale)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

"""Our kernels beside what XLA and libraries make of the same operation, and beside what no kernel could beat.

`python benchmarks/kernels.py run [--quick]` times routing, dispatch and combine, routed experts and decoding on the
device at hand, swept over tokens, experts, choices and width. A floor is the time in which the device copies the fewest
bytes, or computes the FLOPs, that the operation needs, at the speeds of the fastest copy and of a large product, which
the same run measures.
`python benchmarks/kernels.py compiled [--chips v5p,v6e] [--tokens 32768]` compiles the released geometry for TPUs,
without one: memory, bytes, and FLOPs as the compiler has them (half an hour of two cores for all chips).
`python benchmarks/kernels.py tiles` prints how our TPU products are cut, by chip and shape.
"""

import argparse
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _timing import median_ms, versions
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from emo_jax.kernels.experts import dispatch as ops
from emo_jax.kernels.experts import routed_experts
from emo_jax.kernels.experts.tpu_rows import MOVES
from emo_jax.kernels.experts.tpu_sizes import best_sizes
from emo_jax.kernels.routing import default_implementation as routing_implementation
from emo_jax.model.config import PoolConfig
from emo_jax.model.routing import Routing, route
from emo_jax.parallel import compiled

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
EXPERTS = {
    "cpu": ("blocked", "ragged", "reference"),
    "gpu": ("pallas_gpu", "ragged", "tokamax"),
    "tpu": ("pallas_tpu", "ragged", "megablox", "tokamax"),
}
MOST_GFLOP = 60
"""Of a formulation on CPU that computes every expert; beyond, minutes would pass."""
ROW = 4096
"""Tokens of a row for the router, at most."""


class Shape(NamedTuple):
    """Of a layer: T, D, R, C and F."""

    tokens: int
    width: int
    experts: int
    choices: int
    hidden: int


RELEASED = Shape(32768, 2048, 127, 7, 1024)
SMALL = Shape(4096, 128, 31, 3, 64)


class Speed(NamedTuple):
    """Bytes and FLOPs a second of this device."""

    bytes: float
    flops: float


def sweep(base: Shape, quick: bool) -> Iterator[Shape]:
    """The base, and what differs from it in one size."""
    yield base
    if quick:
        return
    for name, factors in (
        ("tokens", (1 / 4, 4)),
        ("experts", (1 / 4, 4)),
        ("choices", (1 / 3, 2)),
        ("width", (1 / 2, 2)),
    ):
        for factor in factors:
            size = getattr(base, name) * factor
            yield base._replace(**{name: max(1, round(size) - (1 if name == "experts" and factor > 1 else 0))})


def measured_speed(dtype: Any, small: bool) -> Speed:
    """Of a copy (read and written), the fastest of several sizes, and of a square product."""
    copied = 0.0
    for power in (20, 22, 24, 26) if small else (26, 30):
        x = jnp.zeros(2**power, jnp.uint8)
        copied = max(copied, 2 * x.size / median_ms(jax.jit(lambda x: x + jnp.uint8(1)), x) * 1e3)
    size = 1024 if small else 8192
    a = jnp.ones((size, size), dtype)
    return Speed(copied, 2 * size**3 / median_ms(jax.jit(jnp.dot), a, a) * 1e3)


def arguments(shape: Shape, dtype: Any) -> tuple[jax.Array, ...]:
    """x, indices, weights, gate, up, down; choices by a random router."""
    t, d, r, c, f = shape
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (t, d), dtype)
    gate, up = (jax.random.normal(key, (r, d, f), dtype) * d**-0.5 for key in keys[1:3])
    down = jax.random.normal(keys[3], (r, f, d), dtype) * f**-0.5
    weights, indices = jax.lax.top_k(jax.nn.softmax(jax.random.normal(keys[4], (t, r))), c)
    return x, indices, weights, gate.astype(dtype), up.astype(dtype), down.astype(dtype)


def with_backward(function: Callable[..., jax.Array], places: tuple[int, ...]) -> Callable[..., Any]:
    """Value and gradients; the cotangent is the value."""

    def run(*args: Any) -> Any:
        def of(*given: Any) -> jax.Array:
            every = list(args)
            for place, value in zip(places, given, strict=True):
                every[place] = value
            return function(*every)

        value, pull = jax.vjp(of, *(args[place] for place in places))
        return value, pull(value)

    return run


def line(name: str, shape: Shape, ms: float, floor: float) -> None:
    """One result."""
    sizes = " ".join(f"{size:>6}" for size in shape)
    print(f"{sizes}  {name:<34} {ms:>10.3f} ms {floor:>10.3f} ms {floor / ms:>7.1%}", flush=True)


def attempt(name: str, shape: Shape, floor: tuple[float, float], speed: Speed, function: Any, *args: Any) -> None:
    """Times a function beside its floor of (bytes, FLOPs); what fails is said, and the rest goes on."""
    try:
        ms = median_ms(jax.jit(function), *args, repeats=7)
    except Exception as error:
        print(f"{name}: failed: {str(error).splitlines()[0][:160]}", flush=True)
        return
    line(name, shape, ms, 1e3 * max(floor[0] / speed.bytes, floor[1] / speed.flops))


def time_routing(shape: Shape, speed: Speed) -> None:
    """Document pools and top-k; the pool's own cost is the difference to a router without."""
    t, r = shape.tokens, shape.experts
    rows, length = max(1, t // ROW), min(t, ROW)
    documents = 8
    logits = jax.random.normal(jax.random.key(0), (rows, length, r))
    ids = jnp.broadcast_to(jnp.arange(length) * documents // length + 1, (rows, length)).astype(jnp.int32)
    sizes = jnp.full((rows, documents), max(shape.choices, r // 4), jnp.int32)
    for kind in ("none", "document"):
        pool = PoolConfig(kind=kind, min=shape.choices, max=r)
        for implementation in dict.fromkeys(("xla", routing_implementation(jax.default_backend()))):

            def decide(logits: jax.Array, pool: Any = pool, implementation: str = implementation) -> jax.Array:
                routing = route(
                    logits, ids, choices=shape.choices, pool=pool, size_BG=sizes, implementation=implementation
                )
                return routing.weights_BSC + (routing.totals.z_B.sum() + routing.totals.weights_BR.sum())

            name, fewest = f"routing {kind} {implementation}", 4.0 * t * r
            attempt(name, shape, (fewest, 0.0), speed, decide, logits)
            attempt(name + " + backward", shape, (3 * fewest, 0.0), speed, with_backward(decide, (0,)), logits)


def time_rows(shape: Shape, speed: Speed, dtype: Any) -> None:
    """Rows to expert order and back, by XLA's gathers."""
    x, indices, *_ = arguments(shape._replace(hidden=1), dtype)
    order = jax.jit(lambda indices: ops.plan(indices, shape.experts, 1))(indices)
    fewest = float((shape.tokens + indices.size) * shape.width * x.dtype.itemsize)
    attempt("plan xla", shape, (8.0 * indices.size, 0.0), speed, lambda i: ops.plan(i, shape.experts, 1), indices)
    attempt("dispatch xla", shape, (fewest, 0.0), speed, ops.dispatch, x, order)
    attempt("combine xla", shape, (fewest, 0.0), speed, ops.combine, jax.jit(ops.dispatch)(x, order), order)


def time_experts(shape: Shape, speed: Speed, dtype: Any) -> None:
    """Every formulation that runs here."""
    args = arguments(shape, dtype)
    t, d, r, c, f = shape
    w = args[0].dtype.itemsize
    fewest = float((2 * t * d + 3 * min(r, t * c) * d * f) * w)
    for name in EXPERTS[jax.default_backend()]:
        if jax.default_backend() == "cpu" and name != "blocked" and 18e-9 * t * r * d * f > MOST_GFLOP:
            continue  # which computes every expert there
        run = functools.partial(routed_experts, implementation=name)
        attempt(f"experts {name}", shape, (fewest, 6.0 * t * c * d * f), speed, run, *args)
        both = with_backward(run, (0, 2, 3, 4, 5))
        attempt(f"experts {name} + backward", shape, (3 * fewest, 18.0 * t * c * d * f), speed, both, *args)


def time_decoding(shape: Shape, speed: Speed, dtype: Any) -> None:
    """A token each of a few rows: the floor reads the chosen experts once."""
    for tokens in (1, 8, 64):
        few = shape._replace(tokens=tokens)
        args = arguments(few, dtype)
        chosen = len(np.unique(args[1]))
        fewest = 3.0 * chosen * shape.width * shape.hidden * args[0].dtype.itemsize
        for name in ("streamed", *EXPERTS[jax.default_backend()][:1]):
            run = functools.partial(routed_experts, implementation=name)
            attempt(f"decode {name}", few, (fewest, 0.0), speed, run, *args)


def run(args: argparse.Namespace) -> None:
    """All operations, swept."""
    small = jax.default_backend() == "cpu"
    dtype = jnp.float32 if small else jnp.bfloat16
    speed = measured_speed(dtype, small)
    copies, products = f"{speed.bytes / 1e9:.1f} GB/s", f"{speed.flops / 1e9:.0f} GFLOP/s"
    print(f"{versions()}, {np.dtype(dtype).name}: copies {copies}, products {products}")
    print(f"{'T':>6} {'D':>6} {'R':>6} {'C':>6} {'F':>6}  {'operation':<34} {'time':>13} {'floor':>13} {'reached':>7}")
    for shape in sweep(SMALL if small else RELEASED, args.quick):
        time_routing(shape, speed)
        time_rows(shape, speed, dtype)
        time_experts(shape, speed, dtype)
    time_decoding(Shape(1, 1024, 63, 7, 512) if small else RELEASED, speed, dtype)


def chip_mesh(chip: str) -> Mesh:
    """One device of a TPU that is not here."""
    options = {"chip_config_name": "megacore"} if chip == "v4" else {}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip], **options)
    return Mesh(np.array(topology.devices[:1]), ("x",))


def compile_for(
    chip: str, function: Callable[..., Any], *shapes: tuple[tuple[int, ...], str], free: bool = False
) -> Any:
    """The compiled function, and the seconds that took; `free`: arguments and results in the compiler's layouts."""
    mesh = chip_mesh(chip)
    place = NamedSharding(mesh, PartitionSpec())
    given = [jax.ShapeDtypeStruct(shape, dtype, sharding=None if free else place) for shape, dtype in shapes]
    layout = Format(Layout.AUTO, place)
    options = {"in_shardings": layout, "out_shardings": layout} if free else {}
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function, **options).lower(*given)
    return lowered.compile(), time.perf_counter() - start


def compile_experts(chip: str, shape: Shape) -> None:
    """Memory, bytes and FLOPs of a layer's routed experts, forward and backward, by implementation."""
    t, d, r, c, f = shape
    bf16 = "bfloat16"
    stacks = [((r, d, f), bf16), ((r, d, f), bf16), ((r, f, d), bf16)]
    given = [((t, d), bf16), ((t, c), "int32"), ((t, c), "float32"), *stacks]
    for name in EXPERTS["tpu"]:
        step = with_backward(functools.partial(routed_experts, implementation=name), (0, 2, 3, 4, 5))
        try:
            program, seconds = compile_for(chip, step, *given)
        except Exception as error:
            print(f"{chip:<6} experts {name:<12} failed: {str(error).splitlines()[0][:160]}", flush=True)
            continue
        hlo = program.as_text()
        work = compiled.work(hlo)
        moved = sum(one.traffic for one in work)
        rows = sum(one.traffic for one in work if any(move in one.name for move in MOVES))
        fewest = 4.0 * (t + t * c) * d * 2
        text = f"{program.memory_analysis().temp_size_in_bytes / 2**20:>6.0f} MiB, {moved / 1e9:>5.1f} GB moved"
        text += (
            f", of which rows there and back {rows / 1e9:.2f} ({rows / fewest:.2f} times the fewest)" if rows else ""
        )
        print(f"{chip:<6} experts {name:<12} {text}, compiled in {seconds:.0f} s", flush=True)


def compile_routing(chip: str, shape: Shape) -> None:
    """The same of a router's decisions.

    Alone, they find room in fast memory that they would not find in a step, so bytes count wherever they lie. Layouts
    of logits and results are the compiler's, as they are in a step.
    """
    rows, documents = shape.tokens // ROW, 64
    pool = PoolConfig(kind="document", min=shape.choices, max=shape.experts)
    for implementation in ("xla", "pallas_tpu"):

        def decide(logits: jax.Array, ids: jax.Array, sizes: jax.Array, implementation: str = implementation) -> Any:
            def differentiable(logits: jax.Array) -> tuple[Any, Routing]:
                routing = route(
                    logits, ids, choices=shape.choices, pool=pool, size_BG=sizes, implementation=implementation
                )
                return (routing.weights_BSC, routing.totals.weights_BR, routing.totals.z_B), routing

            out, pull, routing = jax.vjp(differentiable, logits, has_aux=True)
            return routing, pull(out)

        given = (((rows, ROW, shape.experts), "float32"), ((rows, ROW), "int32"), ((rows, documents), "int32"))
        program, seconds = compile_for(chip, decide, *given, free=True)
        moved = sum(one.traffic for one in compiled.work(re.sub(r"S\(\d\)", "", program.as_text())))
        fewest = 3.0 * 4 * shape.tokens * shape.experts
        text = f"{program.memory_analysis().temp_size_in_bytes / 2**20:>6.1f} MiB, {moved / 1e6:>6.0f} MB moved"
        print(
            f"{chip:<6} routing {implementation:<12} {text} ({moved / fewest:.1f} times the fewest), {seconds:.0f} s",
            flush=True,
        )


def compile_all(args: argparse.Namespace) -> None:
    """Every chip asked for."""
    shape = RELEASED._replace(tokens=args.tokens)
    print(f"jax {jax.__version__}, T D R C F {tuple(shape)}, bfloat16, forward and backward, a chip")
    for chip in args.chips.split(","):
        compile_routing(chip, shape)
        compile_experts(chip, shape)


def tiles(args: argparse.Namespace) -> None:
    """How products are cut: rows of a tile, and columns of the hidden layer and of the model at once."""
    sizes = f"{'T':>6} {'D':>5} {'R':>4} {'F':>5}"
    print(f"{'chip':<6} {'fast memory':>11}  {sizes} {'dtype':<9} {'rows':>4} {'of F':>5} {'of D':>5}")
    for chip in CHIPS:
        mesh = chip_mesh(chip)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            memory = pltpu.get_tpu_info().vmem_capacity_bytes / 2**20
            for t, d, r, c, f in (RELEASED, RELEASED._replace(tokens=8192), Shape(32768, 4096, 127, 7, 1536), SMALL):
                for dtype in (jnp.bfloat16, jnp.float32):
                    cut = best_sizes(t * c, r, c, d, f, dtype)
                    sizes = "{:>4} {:>5} {:>5}".format(*cut[:3]) if cut else "not by these kernels"
                    shape = f"{t:>6} {d:>5} {r:>4} {f:>5} {np.dtype(dtype).name:<9}"
                    print(f"{chip:<6} {memory:>7.0f} MiB  {shape} {sizes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run, quick=False)
    commands = parser.add_subparsers()
    one = commands.add_parser("run")
    one.add_argument("--quick", action="store_true", help="the base shape alone")
    one.set_defaults(run=run)
    two = commands.add_parser("compiled")
    two.add_argument("--chips", default=",".join(CHIPS))
    two.add_argument("--tokens", type=int, default=RELEASED.tokens)
    two.set_defaults(run=compile_all)
    commands.add_parser("tiles").set_defaults(run=tiles)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

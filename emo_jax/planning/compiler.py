"""The real step, compiled for chips that nobody has, and what the compiler says of it.

XLA plans a program's memory long before it has generated code, which for sixteen layers takes an hour of a core. So the
compiler runs in a process of its own, writes what it has decided into a folder, and is stopped when it starts to
generate code.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh

import emo_jax
from emo_jax.config import Config
from emo_jax.errors import UserError
from emo_jax.parallel.compiled import collectives, products, work
from emo_jax.parallel.config import AXES
from emo_jax.planning.buffers import Buffer, part_of, read_assignment
from emo_jax.planning.topology import ENVIRONMENT, Topology, parse_topology, tpu_devices

MODULE = "train_step"


class Compiled(NamedTuple):
    """Of one device and step, as compiled.

    Attributes:
      arguments, temporaries: bytes, more than there are where they do not fit; 0 where the compiler gave up before.
      largest: arrays at the fullest moment, at most 40 kinds.
      needed, limit: bytes that the compiler wanted and had, where it gave up; else 0.
      dense, grouped: FLOPs of products, those of experts over whole buffers.
      traffic: bytes to and from HBM, by part of the model.
      busy: seconds that its operations take one after another at the chip's peaks, by part; experts' rows as many as
        there are, and attention's kernels by their bytes alone.
      multiplying: seconds of those operations whose FLOPs take longer than their bytes.
      sent: bytes by (kind of collective, mesh axes).
      seconds: that it took.
    """

    arguments: int
    temporaries: int
    largest: list[Buffer]
    needed: float
    limit: float
    dense: float
    grouped: float
    traffic: dict[str, float]
    busy: dict[str, float]
    multiplying: float
    sent: dict[tuple[str, tuple[str, ...]], float]
    seconds: float

    @property
    def total(self) -> int:
        """Arguments and temporaries, bytes."""
        return self.arguments + self.temporaries

    def fits(self, topology: Topology) -> bool:
        """Whether a device has room for it."""
        return 0 < self.total <= topology.room


def expected_seconds(run: Config) -> float:
    """About how long two cores take, from compiles of 4 to 16 layers; accumulation compiles the layers once as well."""
    per_layer = 9 if run.mesh.chunks > 1 else 4
    return 15 + per_layer * run.model.num_layers


def compile_step(run: Config, topology: Topology, log: Callable[[str], None], cache: Path | None = None) -> Compiled:
    """Compiles the step of `run` for `topology` until its memory is planned, or finds it in the cache.

    Args:
      run: its mesh must fit the topology.
      topology: of TPUs.
      log: progress.
      cache: folder of earlier results; None: `default_cache()`.

    Raises:
      UserError: where the compiler fails for another reason than memory.
    """
    file = (cache or default_cache()) / f"{_key(run, topology)}.json"
    if file.is_file():
        log(f"compiled before ({file})")
        return _from_json(json.loads(file.read_text()))
    found = _attempt(run, topology, log) or _attempt(run, topology, log)
    if found is None:
        raise UserError(
            "The TPU compiler wrote no memory plan, twice; give the command again when the machine is idle."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(_to_json(found)))
    temporary.replace(file)
    return found


def _attempt(run: Config, topology: Topology, log: Callable[[str], None]) -> Compiled | None:
    """None where no memory plan was left: seen once in sixty compiles, on a busy machine, and not again there."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="emo_jax_plan_") as folder:
        error = _run_compiler(run, topology, Path(folder), log)
        if error is not None:
            return _out_of_memory(error, time.monotonic() - start)
        log("reading the program")
        found = _read(run, topology, Path(folder), time.monotonic() - start)
        return found if found.arguments else None


def default_cache() -> Path:
    """Where results of compiles are kept between plans."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emo_jax" / "plans"


def _key(run: Config, topology: Topology) -> str:
    """Changes with whatever the compiled program could depend on."""
    code, package = hashlib.sha256(), Path(emo_jax.__file__).parent
    for folder in ("kernels", "model", "parallel", "training"):
        for file in sorted((package / folder).rglob("*.py")):
            code.update(file.read_bytes())
    for name in ("buffers", "compiler", "topology"):
        code.update((Path(__file__).parent / f"{name}.py").read_bytes())
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu")]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    parts = [run.to_json(), repr(topology), code.hexdigest(), *versions, *flags]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _run_compiler(run: Config, topology: Topology, folder: Path, log: Callable[[str], None]) -> str | None:
    """None once the optimised program lies in `folder`; else what the compiler printed last."""
    request = json.dumps({"config": run.to_json(), "topology": topology.name, "slices": topology.slices})
    dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*{MODULE}.*"
    environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip()}
    errors = folder / "errors"
    with errors.open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "emo_jax.planning.compiler"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment,
            text=True,
            start_new_session=True,  # a Ctrl-C is for this process, which then ends the other
        )
        assert child.stdin is not None
        try:
            child.stdin.write(request)
            child.stdin.close()
            told = ""
            while child.poll() is None:
                phase = "optimising" if list(folder.glob("*before_optimizations.txt")) else "tracing"
                if phase != told:
                    log(phase)
                    told = phase
                if _whole(folder, age=1):
                    return None
                time.sleep(0.5)
            return None if _whole(folder) else errors.read_text()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _whole(folder: Path, age: float = 0) -> bool:
    """Whether the optimised program has been written to its end, so many seconds ago."""
    files = list(folder.glob("*.after_optimizations.txt"))
    if not files:
        return False
    with files[0].open("rb") as file:
        file.seek(max(files[0].stat().st_size - 16, 0))
        return file.read().rstrip().endswith(b"}") and time.time() - files[0].stat().st_mtime >= age


def _read(run: Config, topology: Topology, folder: Path, seconds: float) -> Compiled:
    (program,) = folder.glob("*.after_optimizations.txt")
    hlo = program.read_text()
    (assignment,) = folder.glob("*.after_optimizations-buffer-assignment.txt")
    (live,) = folder.glob("*.after_optimizations-live-range.txt")
    memory = read_assignment(assignment, live, hlo)
    mesh = AbstractMesh(tuple(getattr(run.mesh, axis) for axis in AXES), AXES)
    sent: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for one in collectives(hlo, mesh):
        sent[one.kind, one.axes] += one.sent * one.times  # further rounds of experts run only where they are needed
    found = products(hlo)
    chip, traffic, busy = topology.chip, *(defaultdict[str, float](float) for _ in range(2))
    filled = 1 / run.mesh.buffer if run.mesh.expert > 1 else 1.0
    multiplying = 0.0
    for op in work(hlo):
        part, share = part_of(op.name), chip.devices * (filled if op.grouped else 1.0)
        traffic[part] += op.traffic
        products_take, bytes_take = share * op.flops / chip.flops, share * op.traffic / chip.bandwidth
        busy[part] += max(products_take, bytes_take)
        multiplying += products_take if products_take > bytes_take else 0.0
    return Compiled(
        memory.arguments,
        memory.temporaries,
        memory.largest[:40],
        0,
        0,
        found.dense,
        found.grouped,
        dict(traffic),
        dict(busy),
        multiplying,
        dict(sent),
        seconds,
    )


def _out_of_memory(error: str, seconds: float) -> Compiled:
    """What the compiler wanted, from what it printed.

    Raises:
      UserError: where it failed for another reason.
    """
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", error)
    if not found:
        lines = [line for line in error.splitlines() if "Error" in line or "INTERNAL" in line or "INVALID" in line]
        raise UserError("The TPU compiler failed: " + (lines or error.splitlines() or ["it said nothing"])[-1])
    units = {unit: 2 ** (10 * i) for i, unit in enumerate(("", "K", "M", "G", "T"))}
    needed, limit = float(found[1]) * units[found[2]], float(found[3]) * units[found[4]]
    return Compiled(0, 0, [], needed, limit, 0.0, 0.0, {}, {}, 0.0, {}, seconds)


def _to_json(found: Compiled) -> dict[str, Any]:
    return found._asdict() | {"sent": [[kind, axes, size] for (kind, axes), size in found.sent.items()]}


def _from_json(values: dict[str, Any]) -> Compiled:
    sent = {(kind, tuple(axes)): size for kind, axes, size in values["sent"]}
    return Compiled(**values | {"sent": sent, "largest": [Buffer(*one) for one in values["largest"]]})


def _compile() -> None:
    """Of the process that `compile_step` starts."""
    from emo_jax.training.step import abstract_batch, abstract_state, make_train_step, run_mesh

    request = json.load(sys.stdin)
    run = Config.from_json(request["config"])
    mesh = run_mesh(run, tpu_devices(parse_topology(request["topology"], request["slices"])))
    step: Any = make_train_step(run, mesh)
    step.lower(abstract_state(run, mesh), abstract_batch(run, mesh)).compile()


def unplaced(run: Config) -> Config:
    """The run without what no compiled step depends on: so equal steps have equal keys."""
    plain, labels = type(run.data)(), run.data.labels
    data = dataclasses.replace(
        plain,
        source="examples" if labels else plain.source,
        labels=labels,
        packing="best_fit" if labels else plain.packing,
        path="unused",
        sequence_length=run.data.sequence_length,
        batch_size=run.data.batch_size,
        max_documents=run.data.max_documents,
    )
    return dataclasses.replace(run, data=data)


if __name__ == "__main__":
    _compile()

"""Is a run worth trusting? `python benchmarks/endurance.py [--kills=20] [--steps=480000]`.

Kills: one run is killed with SIGKILL at random moments, in turn while starting, between two steps and during a save,
and started again each time; its metrics and its parameters must end as those of a run that nothing disturbed.
Memory: one run of many small steps (480,000 are 8 hours of emo_tiny's 60 ms); the slope of its resident memory.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PAGE = os.sysconf("SC_PAGE_SIZE")
SMALL = {
    "model.vocab_size": 300,
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.num_experts": 8,
    "model.top_k": 3,
    "model.d_expert": 8,
    "pool.max": 8,
    "data.source": "jsonl",
    "data.sequence_length": 32,
    "data.batch_size": 4,
    "optimizer.warmup_steps": 5,
}
STARTUP = 8.0  # seconds until a process steps, about
SAVING = "orbax-checkpoint-tmp"  # in the name of a checkpoint that is not complete


def write_documents(folder: Path) -> dict[str, Path]:
    """The paragraphs of this project's documents; returns the fields that read them."""
    paragraphs = [
        p for name in ("README.md", "BUILD_NOTES.md", "LICENSE") for p in (ROOT / name).read_text().split("\n\n")
    ]
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs))
    return {"data.path": path}


def start(workdir: Path, log: Path, **fields: object) -> subprocess.Popen:
    """Starts `emo_jax.train` in a process of its own."""
    flags = [f"--config.{name}={value}" for name, value in (SMALL | fields).items()]
    command = [sys.executable, "-m", "emo_jax.train", f"--config={ROOT / 'configs' / 'emo_tiny.py'}"]
    cache = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(log.parent / "compiled")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    with log.open("a") as file:
        return subprocess.Popen(
            [*command, f"--workdir={workdir}", *flags], stdout=file, stderr=file, env=os.environ | cache
        )


def finish(workdir: Path, log: Path, **fields: object) -> None:
    """Runs to the end."""
    if start(workdir, log, **fields).wait():
        raise SystemExit(f"The run failed:\n{log.read_text()[-3000:]}")


def lines(workdir: Path) -> list[str]:
    """Of `metrics.jsonl`."""
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def computed(workdir: Path) -> tuple[list[dict], dict]:
    """Every logged number but the clock's, and the bits of the last parameters."""
    from emo_jax.training.checkpoints import checksums
    from emo_jax.training.weights import load_parameters

    logged = [{key: value for key, value in json.loads(line).items() if key != "timing"} for line in lines(workdir)]
    return logged, checksums(load_parameters(workdir)[1])


def unfinished(workdir: Path) -> set[Path]:
    """Checkpoints that are being saved, or whose save was cut in half."""
    return {path for path in (workdir / "checkpoints").glob("*") if SAVING in path.name}


def kill_once(process: subprocess.Popen, workdir: Path, moment: str, rng: random.Random) -> str:
    """Kills the process at `moment`; returns what it hit."""
    before, deadline = len(lines(workdir)), time.monotonic() + rng.random() * STARTUP
    ahead, old = rng.randint(1, 40), unfinished(workdir)
    while process.poll() is None:
        if moment == "starting" and time.monotonic() >= deadline:
            break
        if moment == "stepping" and len(lines(workdir)) >= before + ahead:
            time.sleep(rng.random() * 0.02)
            break
        if moment == "saving" and unfinished(workdir) - old:
            time.sleep(rng.random() * 0.05)
            break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = unfinished(workdir) - old
    return f"{moment}: {len(lines(workdir))} steps logged" + (", a save cut in half" if half else "")


def kills(count: int, folder: Path, seed: int = 0) -> None:
    """Kills a run `count` times and compares its end with an undisturbed run's."""
    rng, log = random.Random(seed), folder / "log.txt"
    fields = {"train.steps": 200 * count, "train.eval_every": 150, "train.checkpoint_every": 10}
    fields |= write_documents(folder)
    finish(folder / "warm", log, **(fields | {"train.steps": 10}))  # fills the compilation cache
    finish(folder / "undisturbed", log, **fields)
    hit = folder / "killed"
    for k in range(count):
        moment = ("stepping", "saving", "starting")[k % 3]
        print(f"  {k + 1:>3} {kill_once(start(hit, log, **fields), hit, moment, rng)}", flush=True)
    finish(hit, log, **fields)
    (logged, params), (wanted, wanted_params) = computed(hit), computed(folder / "undisturbed")
    if logged != wanted or params != wanted_params:
        raise SystemExit("The killed run ended differently.")
    print(f"{count} kills: {len(logged)} steps logged once each, every number and parameter bit-identical.")


def memory(steps: int, folder: Path) -> float:
    """Runs `steps` small steps; returns the slope of resident memory after the first fifth, bytes a step."""
    workdir, log = folder / "memory", folder / "memory.txt"
    every = max(steps // 24, 50)
    fields = {
        "train.steps": steps,
        "train.log_every": 10,
        "train.eval_every": every,
        "train.checkpoint_every": every,
        "model.num_layers": 1,
    } | write_documents(folder)
    process = start(workdir, log, **fields)
    samples = []
    while process.poll() is None:
        time.sleep(max(0.5, min(10.0, steps / 20_000)))
        try:
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE
            with (workdir / "metrics.jsonl").open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - 20_000, 0))
                done = file.read().splitlines()
            if resident:  # 0: it has just ended
                samples.append((json.loads(done[-1 if done[-1].endswith(b"}") else -2])["step"], resident))
        except (OSError, IndexError, ValueError):
            continue  # not logging yet, or gone
    if process.returncode:
        raise SystemExit(f"The run failed:\n{log.read_text()[-3000:]}")
    step, resident = np.array([sample for sample in samples if sample[0] > steps / 5], float).T
    slope = float(np.polyfit(step, resident, 1)[0])
    print(
        f"{steps:,} steps: resident memory {resident[0] / 1e6:.0f} MB after a fifth, {resident[-1] / 1e6:.0f} MB at "
        f"the end, at most {resident.max() / 1e6:.0f} MB; slope {slope:.1f} bytes a step over {len(step)} samples."
    )
    return slope


def main() -> None:
    """Runs both; each can be left out with 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=480_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.kills:
            kills(args.kills, Path(folder))
        if args.steps:
            memory(args.steps, Path(folder))


if __name__ == "__main__":
    main()

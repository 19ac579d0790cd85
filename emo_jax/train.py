"""Trains a model: `python -m emo_jax.train --config=configs/emo_tiny.py --workdir=runs/emo_tiny`.

The same command continues a run that was interrupted. Any field of the config can be overridden:
`--config.data.source=jsonl --config.data.path='texts/*.jsonl.gz' --config.train.steps=2000`.
On several hosts, each runs it with `--distributed`; `launch/` has scripts that start them.
"""

import contextlib
import re
import signal

from absl import flags

from emo_jax import cli
from emo_jax.errors import require

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder, or gs://BUCKET/NAME, for checkpoints, metrics and report.", required=True
)
_PROFILE = flags.DEFINE_string("profile_steps", "", "Steps to trace with the profiler, as FIRST:LAST.")

_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This is one process of several. On TPU pods, under Slurm and under Open MPI, JAX finds the others; elsewhere "
    "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell.",
)
_PREEMPTED = flags.DEFINE_integer(
    "preempted_status",
    0,
    "Exit status after SIGTERM, once the step is saved; for launchers that start it again.",
    0,
    255,
)


def main() -> int:
    """Runs the training and prints what it reached."""
    config = cli.check_config(_CONFIG.value)
    profile = _profiled(_PROFILE.value, config.train.steps)
    from emo_jax.parallel import processes  # after flags are parsed: a mistake answers at once
    from emo_jax.training import train

    with processes.job() if _DISTRIBUTED.value else contextlib.nullcontext():
        result = train(config, _WORKDIR.value, profile=profile)
    status = _PREEMPTED.value if result.stopped_by == signal.SIGTERM else result.exit_status
    if not processes.first():
        return status
    if result.stopped_by or result.heldout is None:
        print(f"Stopped after step {result.step}. The same command goes on from there.")
        return status
    print("\nHeld-out loss by domain (nats a token, no document pool):")
    width = max(map(len, result.heldout.domains), default=0)
    for name, part in sorted(result.heldout.domains.items(), key=lambda item: item[1]):
        print(f"  {name:<{width}}  {part.loss:.3f}  ({part.tokens:,} tokens)")
    print(f"  {'all':<{width}}  {result.heldout.all.loss:.3f}  ({result.heldout.all.tokens:,} tokens)")
    print(f"\nReport: {result.report}")
    return 0


def _profiled(text: str, steps: int) -> tuple[int, int] | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    require(1 <= first <= last <= steps, f"--profile_steps={text!r} must be FIRST:LAST within 1:{steps}, as in 10:14.")
    return first, last


if __name__ == "__main__":
    cli.run(main)

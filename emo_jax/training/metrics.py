"""Where numbers go: `metrics.jsonl`, TensorBoard events and the progress line."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tensorboardX import SummaryWriter

from emo_jax.analysis import human, read_metrics
from emo_jax.config import Config
from emo_jax.errors import require


def to_numbers(tree: Any) -> Any:
    """Arrays of a metrics tree as Python numbers and lists: waits for the step that made them."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), jax.device_get(tree))


class MetricsLog:
    """`metrics.jsonl`, each logged step once, and the same scalars as TensorBoard events and, if wanted, at wandb.

    Attributes:
      kept: lines of the run so far, when it was opened.
    """

    def __init__(self, run_dir: Path, start_step: int, config: Config):
        """Opens the files; lines after `start_step`, which the resumed run computes again, are cut off."""
        self._path = run_dir / "metrics.jsonl"
        self.kept = [line for line in read_metrics(self._path)[0] if line["step"] <= start_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self.kept))
        temporary.replace(self._path)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)
        self._wandb = _start_wandb(run_dir, config) if config.train.wandb_project else None

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line; `line["step"]` counts steps done."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in _scalars(line):
            self._board.add_scalar(name, value, line["step"])
        if self._wandb:
            self._wandb.log(dict(_scalars(line)), step=line["step"])

    def close(self) -> None:
        """Flushes and closes all."""
        self._file.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()


def check_wandb(project: str) -> None:
    """Raises `UserError` where `train.wandb_project` is set and the package is not installed."""
    require(
        not project or importlib.util.find_spec("wandb") is not None,
        f"train.wandb_project={project!r} needs the package wandb: pip install 'emo_jax[wandb]', or leave it empty.",
    )


def _start_wandb(run_dir: Path, config: Config) -> Any:
    """The run's one wandb run, whose id lies in the run directory; WANDB_MODE and the rest are wandb's own settings."""
    import wandb

    file = run_dir / "wandb_id"
    run = wandb.init(
        project=config.train.wandb_project,
        id=file.read_text() if file.exists() else None,
        name=run_dir.resolve().name,
        dir=run_dir,
        resume="allow",
        config=json.loads(config.to_json()),
    )
    file.write_text(run.id)
    return run


def _scalars(line: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    scalars = []
    for name, value in line.items():
        if isinstance(value, dict):
            scalars += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list) and value and isinstance(value[0], int | float):
            scalars += [(f"{prefix}{name}/layer_{i:02d}", x) for i, x in enumerate(value)]
        elif isinstance(value, int | float) and name != "step":
            scalars.append((f"{prefix}{name}", value))
    return scalars


class Progress:
    """One line that renews itself on a terminal; elsewhere a line every `SECONDS`."""

    SECONDS = 15.0

    def __init__(self, steps: int, stream: TextIO | None = None):
        """For a run of `steps`."""
        self._steps = steps
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._shown = -self.SECONDS
        self._width = 0

    def show(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Shows step, loss, speed and the time left."""
        now = time.monotonic()
        last = step == self._steps
        if not self._terminal and now - self._shown < self.SECONDS and not last:
            return
        self._shown = now
        text = f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {loss:.4f}"
        if tokens_per_second:  # not after the first step, which compiles
            text += f"  {human(tokens_per_second)} tokens/s  ETA {clock(seconds_left)}"
        if self._terminal:
            width = os.get_terminal_size(self._stream.fileno()).columns - 1
            self._stream.write("\r" + text[:width].ljust(min(self._width, width)))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def message(self, text: str) -> None:
        """Prints a line of its own above the progress line."""
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._stream.write(text + "\n")
        self._stream.flush()


def clock(seconds: float) -> str:
    """3723.4 as 1h02m."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s"

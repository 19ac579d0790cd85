"""What a run directory says: its config, and `metrics.jsonl`, one JSON object a line, steps ascending."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emo_jax.config import Config
from emo_jax.errors import require

Record = dict[str, Any]


class Series(NamedTuple):
    """A metric over the run: `steps` [N] and `values` [N] or, for one value a layer, [N, L]; NaN: not finite."""

    steps: np.ndarray
    values: np.ndarray


class Run:
    """A run's config and its readable log lines, finished or not.

    Attributes:
      name: of the directory.
      records: the lines of `metrics.jsonl`.
      unreadable: how many lines could not be read; a last line that is being written does not count.
      layers: index of each mixture layer, as text.
      pooled: whether training draws document pools.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / "config.json"
        require(
            path.is_file(),
            f"{run_dir} has no config.json, so it is not a run directory; give the --workdir of a training run.",
        )
        self.config = Config.from_json(path.read_text(encoding="utf-8"))
        self.name = run_dir.resolve().name
        self.records, self.unreadable = read_metrics(run_dir / "metrics.jsonl")
        self.layers = [str(layer) for layer in self.config.model.routing_layers]
        self.pooled = bool(self.layers) and self.config.pool.kind != "none"
        self.steps_done: int = self.records[-1]["step"] if self.records else 0
        self.finished = self.steps_done >= self.config.train.steps

    @property
    def kind(self) -> str:
        """What people call a model with these fields."""
        if not self.layers:
            return "Dense model"
        return {"none": "Standard MoE", "document": "EMO", "random": "MoE with random pools"}[self.config.pool.kind]

    @property
    def first_evaluation(self) -> str:
        """When held-out numbers appear."""
        steps = self.config.train.steps
        return f"first at step {min(self.config.train.eval_every or steps, steps):,}"

    def series(self, *keys: str) -> Series:
        """The scalar at `keys` of every line that has it."""
        return self._series(keys, 0)

    def layer_series(self, metric: str, where: tuple[str, ...] = ("routing",)) -> Series:
        """A metric of training's routing, or at other keys, one value a mixture layer."""
        return self._series((*where, metric), len(self.layers))

    def last_with(self, *keys: str) -> Record | None:
        """The newest line that has a value at `keys`."""
        return next((record for record in reversed(self.records) if _value(record, keys)), None)

    def _series(self, keys: tuple[str, ...], width: int) -> Series:
        steps, values = [], []
        for record in self.records:
            value = _value(record, keys)
            if value is not None and (not width or len(value) == width):
                steps.append(record["step"])
                values.append(value)
        array = np.array(values, dtype=np.float64).reshape(len(values), *([width] if width else []))
        return Series(np.array(steps, dtype=np.int32), np.where(np.isfinite(array), array, np.nan))


def _value(record: Record, keys: tuple[str, ...]) -> Any:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_metrics(path: Path) -> tuple[list[Record], int]:
    """Every readable line, and how many others there were.

    The last line may be cut off, as while a run is writing it; it does not count. A missing file is empty.
    """
    if not path.exists():
        return [], 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records, unreadable = [], 0
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
            records.append(record)
        except (ValueError, KeyError, TypeError):
            unreadable += number < len(lines) and bool(line.strip())
    return records, unreadable


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over `window` values, over fewer at the ends; NaN values are left out."""
    finite = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(finite, values, 0), kernel, mode="same")
    count = np.convolve(finite, kernel, mode="same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def thin(data: Series, points: int) -> Series:
    """At most about `points` of the logged points: the lowest and highest of each stretch, so spikes stay."""
    steps, values = data
    if len(values) <= points:
        return data
    width = -(-len(values) // (points // 2))
    padded = np.pad(values, (0, -len(values) % width), constant_values=np.nan).reshape(-1, width)
    starts = np.arange(len(padded)) * width
    low = starts + np.where(np.isnan(padded), np.inf, padded).argmin(axis=1)
    high = starts + np.where(np.isnan(padded), -np.inf, padded).argmax(axis=1)
    keep = np.unique(np.concatenate([[0], low, high, [len(values) - 1]]))
    return Series(steps[keep], values[keep])


def human(number: float) -> str:
    """Three significant digits with a unit: 950, 18.2k, 12.3M, 1.45B."""
    if not math.isfinite(number):
        return "–"
    if abs(number) < 1e4:
        return f"{number:,.0f}" if abs(number) >= 100 or number == int(number) else f"{number:.3g}"
    number = float(f"{number:.3g}")
    size, unit = next(pair for pair in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(number) >= pair[0])
    return f"{number / size:.3g}{unit}"

"""Reading `metrics.jsonl`: one JSON object a line, steps ascending."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Record = dict[str, Any]


class Series(NamedTuple):
    """A metric over the run: `steps` [N] and `values` [N] or, for one value a layer, [N, L]; NaN: not finite."""

    steps: np.ndarray
    values: np.ndarray


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


def series(records: list[Record], *keys: str, width: int = 0) -> Series:
    """The value at `keys` of the lines that have it; with `width`, lists of that length only."""
    steps, values = [], []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and (not width or len(value) == width):
            steps.append(record["step"])
            values.append(value)
    array = np.array(values, dtype=np.float64).reshape(len(values), *([width] if width else []))
    return Series(np.array(steps, dtype=np.int32), np.where(np.isfinite(array), array, np.nan))


def last_with(records: list[Record], *keys: str) -> Record | None:
    """The newest line that has a value at `keys`."""
    for record in reversed(records):
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value:
            return record
    return None


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

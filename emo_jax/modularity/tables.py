"""Evaluations as tables: the first line a head, then one line a domain; for a terminal, CSV or JSON."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from emo_jax.evaluation import Loss
from emo_jax.modularity.retention import WEIGHTINGS, Retention, specificity

Table = list[list[Any]]
RETENTION_HEAD = ("domain", "method", "kept", "full loss", "renormalized", "original", "accuracy lost")
SPECIFICITY = "off the diagonal − on it"


def loss_table(full: dict[str, Loss], sizes: dict[str, int] | None) -> Table:
    """Loss, accuracy and bits per byte of each domain.

    Args:
      full: losses of each domain.
      sizes: UTF-8 bytes of each domain's text; a document's first token, which nothing predicts, counts with its bytes.
        None: of a classifier, which predicts labels.
    """
    if sizes is None:
        head: list[Any] = ["domain", "loss", "accuracy", "texts"]
        return [head, *([name, loss.loss, loss.accuracy, loss.tokens] for name, loss in full.items())]
    table: Table = [["domain", "loss", "accuracy", "bits per byte", "tokens"]]
    for name, loss in full.items():
        bits = loss.loss * loss.tokens / math.log(2) / max(sizes[name], 1)
        table.append([name, loss.loss, loss.accuracy, bits, loss.tokens])
    return table


def change_table(before: dict[str, Loss], after: dict[str, Loss]) -> Table:
    """Each domain's loss and accuracy before and after something was done to a model."""
    table: Table = [["domain", "loss before", "after", "change", "accuracy before", "after", "tokens"]]
    for name, old in before.items():
        new = after[name]
        table.append([name, old.loss, new.loss, new.loss - old.loss, old.accuracy, new.accuracy, old.tokens])
    return table


def retention_table(result: Retention) -> Table:
    """Nats added and accuracy lost by each domain, method and size; last the mean over the domains."""
    table: Table = [list(RETENTION_HEAD)]
    for domain, method, keep in result.subsets:
        full = result.full[domain]
        both = [result.kept[domain, method, keep, weighting] for weighting in WEIGHTINGS]
        changes = [loss.loss - full.loss for loss in both]
        table.append([domain, method, keep, full.loss, *changes, full.accuracy - both[0].accuracy])
    return [*table, *_means(table[1:], "mean")]


def _means(rows: Table, label: str) -> Table:
    """The mean over domains of rows that begin with a domain, a method and a number, of each method and number."""
    groups: dict[tuple[str, int], Table] = {}
    for _, method, number, *values in rows:
        groups.setdefault((method, number), []).append(values)
    return [[label, *key, *np.mean(values, axis=0).tolist()] for key, values in groups.items()]


def calibration_table(results: dict[int, Retention], keep: int, method: str) -> Table:
    """Nats added when the experts are chosen on so many documents of each domain (0: all of them)."""
    table: Table = [["domain", "method", "documents", "renormalized", "original"]]
    for documents, result in results.items():
        for domain, full in result.full.items():
            both = [result.kept[domain, method, keep, weighting].loss - full.loss for weighting in WEIGHTINGS]
            table.append([domain, method, documents, *both])
    return [*table, *_means(table[1:], "mean")]


def matrix_table(result: Retention) -> Table:
    """Nats added to each domain (across) by the subset chosen for each (down), and how specific that is."""
    domains = list(result.full)
    table: Table = [["chosen for", *domains]]
    for own in domains:
        table.append([own, *(result.matrix[own, other].loss - result.full[other].loss for other in domains)])
    return [*table, [SPECIFICITY, specificity(result)[0]]]


def pools_table(added: dict[tuple[str, str], dict[str, float]]) -> Table:
    """Nats added on the same tokens by what a text may use, from (which experts, chosen by) → domain → nats."""
    domains = list(next(iter(added.values())))
    table: Table = [["experts", "chosen by", "mean", *domains]]
    for (experts, chooser), values in added.items():
        table.append([experts, chooser, float(np.mean([*values.values()])), *(values[name] for name in domains)])
    return table


def cache_table(hits: dict[str, np.ndarray], sizes: Sequence[int]) -> Table:
    """Hit rates of an expert cache, from what a text may use → [R], for caches of so many experts a layer."""
    table: Table = [["experts cached", *hits]]
    return [*table, *([size, *(float(rate_R[size - 1]) for rate_R in hits.values())] for size in sizes)]


def summary_table(retention: dict[str, Table]) -> Table:
    """The means of several models, from the retention table of each."""
    means = [(name, row) for name, table in retention.items() for row in table[1:] if row[0] == "mean"]
    return [["model", *RETENTION_HEAD[1:]], *([name, *row[1:]] for name, row in means)]


def as_text(table: Table) -> str:
    """Aligned columns."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in line] for line in table]
    widths = [max(len(line[i]) for line in cells if i < len(line)) for i in range(len(cells[0]))]
    lines = []
    for first, *rest in cells:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def as_csv(models: dict[str, dict[str, Table]]) -> str:
    """Every table under a line with its model and its name, an empty line behind each."""
    text = io.StringIO()
    writer = csv.writer(text)
    for model, tables in models.items():
        for name, table in tables.items():
            writer.writerows([[model, name], *table, []])
    return text.getvalue()

"""Evaluations as tables: the first line a head, then one line a domain; for a terminal, CSV or JSON."""

import csv
import io
import math
from typing import Any

from emo_jax.evaluation import Loss
from emo_jax.modularity.retention import WEIGHTINGS, Retention, specificity

Table = list[list[Any]]


def loss_table(full: dict[str, Loss], sizes: dict[str, int]) -> Table:
    """Loss, accuracy and bits per byte of each domain.

    Args:
      full: losses of each domain.
      sizes: UTF-8 bytes of each domain's text; a document's first token, which nothing predicts, counts with its bytes.
    """
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
    """Nats added and accuracy lost by each domain, method and size."""
    table: Table = [["domain", "method", "kept", "full loss", "renormalized", "original", "accuracy lost"]]
    for domain, method, keep in result.subsets:
        full = result.full[domain]
        both = [result.kept[domain, method, keep, weighting] for weighting in WEIGHTINGS]
        changes = [loss.loss - full.loss for loss in both]
        table.append([domain, method, keep, full.loss, *changes, full.accuracy - both[0].accuracy])
    return table


def matrix_table(result: Retention) -> Table:
    """Nats added to each domain (across) by the subset chosen for each (down), and how specific that is."""
    domains = list(result.full)
    table: Table = [["chosen for", *domains]]
    for own in domains:
        table.append([own, *(result.matrix[own, other].loss - result.full[other].loss for other in domains)])
    return [*table, ["off the diagonal − on it", specificity(result)[0]]]


def as_text(table: Table) -> str:
    """Aligned columns."""
    cells = [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in line] for line in table]
    widths = [max(len(line[i]) for line in cells if i < len(line)) for i in range(len(cells[0]))]
    lines = []
    for first, *rest in cells:
        padded = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
    return "\n".join(lines)


def as_csv(tables: dict[str, Table]) -> str:
    """Every table under its title, an empty line behind each."""
    text = io.StringIO()
    writer = csv.writer(text)
    for title, table in tables.items():
        writer.writerows([[title], *table, []])
    return text.getvalue()

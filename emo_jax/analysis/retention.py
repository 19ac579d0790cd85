"""What survives when only some experts stay: figures of the tables that `emo_jax.evaluate` writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_jax.analysis import page
from emo_jax.analysis.figures import (
    BLUE,
    DOMAIN_COLOURS,
    NATS_COLOURS,
    ORANGE,
    Line,
    matrix_heatmap,
    point_figure,
    shorten,
)

EVALUATION_FILE = "evaluation.json"
Tables = dict[str, list[list[Any]]]
"""By name, as `evaluation.json` has them: each a head and its lines."""

_COLOURS = (BLUE, ORANGE, *(colour for colour in DOMAIN_COLOURS if colour not in (BLUE, ORANGE)))
_DASHES = ("solid", "dot", "dash", "longdash", "dashdot", "longdashdot")
_SIZES = "experts kept in a layer, the shared ones included"


def read_evaluation(run_dir: Path) -> Tables | None:
    """The tables that an evaluation left in a run directory; None for none."""
    file = run_dir / EVALUATION_FILE
    if not file.is_file():
        return None
    models = json.loads(file.read_text())["models"]
    return next(iter(models.values()))


def retention_sections(models: dict[str, Tables]) -> str:
    """Sections of a page about one model or several: curves, domains, cross-domain matrices, benchmarks."""
    parts = []
    having = {name: tables for name, tables in models.items() if "retention" in tables}
    if having:
        parts += [_curves(having), _domains(having)]
    matrices = {name: tables["matrix"] for name, tables in having.items() if "matrix" in tables}
    if matrices:
        parts.append(_matrices(matrices))
    calibrated = {name: tables["calibration"] for name, tables in models.items() if "calibration" in tables}
    if calibrated:
        parts.append(_calibration(calibrated))
    served = {name: tables for name, tables in models.items() if "pools" in tables and "cache" in tables}
    if served:
        parts.append(_serving(served))
    plain = [
        page.card(f"{title} · {name}" if len(models) > 1 else title, html_table(tables[key]), "", wide=True)
        for name, tables in models.items()
        for key, title in (("kept", "A subset's experts"), ("ablated", "Without a subset"), ("tasks", "Benchmarks"))
        if key in tables
    ]
    if plain:
        parts.append(page.section("Measured", "Nats a token, without pools.", plain))
    return "".join(parts)


def retention_page(models: dict[str, Tables]) -> str:
    """A page of its own about several models."""
    names = " · ".join(models)
    header = f"<header><h1>What survives</h1><p class='soft'>{page.escape(names)}</p></header>"
    losses = {
        name: {line[0]: line[1] for line in tables["losses"][1:]}
        for name, tables in models.items()
        if "losses" in tables
    }
    rows: list[list[Any]] = [["domain", *losses]]
    for domain in dict.fromkeys(domain for found in losses.values() for domain in found):
        rows.append([domain, *(found.get(domain, "–") for found in losses.values())])
    card = page.card("", html_table(rows), "Nats a token with all experts, without pools.", wide=True)
    full = page.section("Full models", "Held-out loss by domain.", [card]) if losses else ""
    return page.page(f"What survives · {names}", header + retention_sections(models) + full)


def _curves(models: dict[str, Tables]) -> str:
    methods = list(dict.fromkeys(row[1] for tables in models.values() for row in tables["retention"][1:]))
    chips = [(name, name, colour) for name, colour in zip(models, _COLOURS, strict=False)]
    legend = page.legend("model", chips, note=_dashes(methods))

    def figure(name: str, column: int, absolute: bool = False, **options: Any) -> str:
        lines = []
        for (key, tables), colour in zip(models.items(), _COLOURS, strict=False):
            for method, dash in zip(methods, _DASHES, strict=False):
                rows = [row for row in tables["retention"][1:] if row[0] == "mean" and row[1] == method]
                if rows:
                    values = [row[column] + (row[3] if absolute else 0) for row in rows]
                    label = f"{key}, {method}" if len(methods) > 1 else key
                    lines.append(Line(label, [row[2] for row in rows], values, colour, key, dash))
        return point_figure(name, lines, x_title=_SIZES, **options)

    cards = [
        page.card(
            "Nats added",
            figure("kept_nats", 4, height=340),
            "Each domain keeps the experts chosen for it; mean over the domains, relative to the full model. Flat: the "
            "experts of a domain suffice for it. Weights are the softmax over the kept experts.",
            wide=True,
        ),
        page.card(
            "Nats added, original weights",
            figure("kept_original", 5),
            "Weights as the whole router gives them: what a model that never trained with pools is used to.",
        ),
        page.card(
            "Accuracy lost",
            figure("kept_accuracy", 6, hover=".1%", tickformat=".0%"),
            "Next-token accuracy, renormalised weights.",
        ),
        page.card("Loss", figure("kept_loss", 4, absolute=True), "Nats a token, renormalised weights.", wide=True),
    ]
    lead = "No fine-tuning, no document pools."
    return page.section("Keep only the experts a domain needs", lead, cards, legend)


def _dashes(methods: Sequence[str]) -> str:
    if len(methods) == 1:
        return f"chosen by {methods[0]}"
    return "chosen by " + ", ".join(f"{method} ({dash})" for method, dash in zip(methods, _DASHES, strict=False))


def _domains(models: dict[str, Tables]) -> str:
    first = next(iter(models.values()))["retention"]
    method, size = first[1][1], min(row[2] for row in first[1:])
    rows: list[list[Any]] = [["domain", *models]]
    for domain in dict.fromkeys(row[0] for row in first[1:]):
        found = []
        for tables in models.values():
            chosen = [r for r in tables["retention"][1:] if r[:3] == [domain, method, size]]
            found.append(f"{chosen[0][4]:+.3f}" if chosen else "–")
        rows.append([domain, *found])
    caption = f"Nats added when {size} experts stay, chosen by {method}; renormalised weights."
    return page.section("By domain", "Which domains survive.", [page.card("", html_table(rows), caption, wide=True)])


def _matrices(matrices: dict[str, list[list[Any]]]) -> str:
    limit = max(max(row[1:]) for table in matrices.values() for row in table[1:-1])
    cards = []
    for number, (name, table) in enumerate(matrices.items()):
        figure = matrix_heatmap(f"matrix{number}", [row[1:] for row in table[1:-1]], table[0][1:], limit)
        caption = f"Off the diagonal minus on it: {table[-1][1]:.3f} nats."
        cards.append(page.card(shorten(name, 40), figure, caption, wide=len(matrices) == 1))
    lead = (
        "Rows: the domain that experts were chosen for. Columns: the domain tested. A modular model is pale on "
        "the diagonal and dark elsewhere; one that is merely prunable is pale everywhere."
    )
    scale = page.colour_scale("nothing added", f"{limit:.2f} nats added", NATS_COLOURS)
    return page.section("One domain's experts on another", lead, cards, scale)


def _calibration(tables: dict[str, list[list[Any]]]) -> str:
    rows: list[list[Any]] = [["model", "documents of a domain", "renormalized", "original"]]
    for name, table in tables.items():
        rows += [[name, row[2] or "all", *row[3:]] for row in table[1:] if row[0] == "mean"]
    card = page.card("", html_table(rows), "Nats added, mean over the domains.", wide=True)
    return page.section("How few documents are enough", "Experts chosen on so many documents.", [card])


def _serving(models: dict[str, Tables]) -> str:
    """What a prompt's pool costs, and what a cache of experts saves."""
    pools = list(dict.fromkeys(row[0] for tables in models.values() for row in tables["pools"][1:]))
    prompted, cached, rows = [], [], [["model", "experts", "chosen by", "nats added"]]
    for (name, tables), colour in zip(models.items(), _COLOURS, strict=False):
        for pool, dash in zip(pools, _DASHES[1:], strict=False):
            own = [row for row in tables["pools"][1:] if row[0] == pool]
            lengths = [(int(row[1].split()[0]), row[2]) for row in own if row[1].endswith(" tokens")]
            if lengths:
                x, y = zip(*lengths, strict=True)
                prompted.append(Line(f"{name}, {pool}" if len(pools) > 1 else name, x, y, colour, name, dash))
            rows += [[name, *row[:3]] for row in own if not row[1].endswith(" tokens")]
        head, *lines = tables["cache"]
        for place, (kind, dash) in enumerate(zip(head[1:], _DASHES, strict=False), 1):
            values = [row[place] for row in lines]
            cached.append(Line(f"{name}, {kind}", [row[0] for row in lines], values, colour, name, dash))
    share: dict[str, Any] = {"hover": ".1%", "tickformat": ".0%", "falling": False}
    cards = [
        page.card(
            "A prompt's pool",
            point_figure(
                "prompt_pool",
                prompted,
                x_title="tokens of the prompt, which choose the pool",
                falling=False,
                height=340,
            ),
            "Nats added on the same tokens, those behind the longest prompt, when the first tokens choose the routed "
            "experts that prompt and continuation may use; mean over the domains.",
        ),
        page.card(
            "An expert cache",
            point_figure("expert_cache", cached, x_title="routed experts of a layer in the cache", height=340, **share),
            "Share of expert uses that a cache of the least recently used experts answers, on a stream that takes a "
            "document of each domain in turn, token by token.",
        ),
        page.card(
            "Other choices of as many experts",
            html_table(rows),
            "Nats added on those tokens. The oracle reads the whole text, its future too; a subset is chosen on other "
            "texts of the domain.",
            wide=True,
        ),
    ]
    chips = [(name, name, colour) for name, colour in zip(models, _COLOURS, strict=False)]
    sizes = "all experts (solid), pools of "
    sizes += ", ".join(f"{pool} ({dash})" for pool, dash in zip(pools, _DASHES[1:], strict=False))
    lead = "What the routed experts of a text are when it is served: pools frozen from its prompt, experts in a cache."
    return page.section("Serving", lead, cards, page.legend("model", chips, note=sizes))


def html_table(table: Sequence[Sequence[Any]]) -> str:
    """A table whose first line is its head; columns behind the first are numbers, to the right."""

    def line(row: Sequence[Any], tag: str) -> str:
        texts = [f"{value:.3f}" if isinstance(value, float) else value for value in row]
        cells = [
            f"<{tag}{' class=number' if place else ''}>{page.escape(text)}</{tag}>" for place, text in enumerate(texts)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    rows = "".join(line(row, "td") for row in table[1:])
    head = line(table[0], "th")
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'

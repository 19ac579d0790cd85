"""Several runs on one page: what differs between them, and what came of it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emo_jax.analysis import page
from emo_jax.analysis.figures import DOMAIN_COLOURS, Curve, line_figure
from emo_jax.analysis.report import write_page
from emo_jax.analysis.run import Run, Series, human, smooth
from emo_jax.errors import require

_STRUCTURE = ("heldout", "structure")
_ROUTING = (
    (
        *(
            _STRUCTURE,
            "information",
            "Information of an expert about the domain",
            "share of H(expert), held-out documents",
        ),
        "Mean over the layers, less what shuffled domains give; 0 means that experts ignore domains.",
    ),
    (
        *(_STRUCTURE, "similarity", "Likeness of domains", "held-out documents"),
        "Mean over the layers of the cosine of two domains' use of experts; lower is more modular.",
    ),
    (
        ("routing",),
        "load_max_over_mean",
        "Busiest expert",
        "× the mean load",
        "Mean over the layers; 1 would be perfectly even.",
    ),
    (("routing",), "token_entropy", "Entropy of a token's routing", "nats", "Mean over the layers."),
    (
        ("routing",),
        "document_entropy",
        "Entropy of a document's routing",
        "nats",
        "Mean over the layers; lower is more modular.",
    ),
    (("routing",), "experts_per_document", "Experts used by a document", "routed experts", "Mean over the layers."),
)


def compare_runs(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes a page that lays runs side by side.

    Args:
      run_dirs: at least two run directories.
      out: the page's path.

    Raises:
      UserError: where a folder is not a run directory or has logged nothing.
    """
    runs = [Run(Path(run_dir)) for run_dir in run_dirs]
    for run, folder in zip(runs, run_dirs, strict=True):
        require(bool(run.records), f"{folder} has logged no step yet; there is nothing to compare.")
    names = _names(runs, run_dirs)
    colours = [DOMAIN_COLOURS[i % len(DOMAIN_COLOURS)] for i in range(len(runs))]
    legend = page.legend("run", list(zip(names, names, colours, strict=True)))

    def overlay(figure: str, keys: tuple[str, ...], smoothed: bool = False, **options: Any) -> str:
        curves = []
        for run, name, colour in zip(runs, names, colours, strict=True):
            by_layer = keys[:-1] in (("routing",), _STRUCTURE)
            data = run.layer_series(keys[-1], keys[:-1]) if by_layer else run.series(*keys)
            values = data.values.mean(axis=1) if data.values.ndim == 2 else data.values
            if smoothed and len(values) >= 60:
                values = smooth(values, max(5, len(values) // 50))
            if len(values):
                curves.append(Curve(name, Series(data.steps, values), colour, name))
        return line_figure(figure, curves, **options) if curves else ""

    note = ""
    if len({run.config.pool.kind for run in runs}) > 1:
        note = "Training losses of runs with and without pools do not compare: a pool is read from the whole document."
    loss = [
        page.card(
            "Held-out cross-entropy",
            overlay("heldout", ("heldout", "loss"), height=320),
            "Nats per token, without pools.",
            wide=True,
        ),
        page.card(
            "Training cross-entropy",
            overlay("training", ("cross_entropy",), smoothed=True),
            "Smoothed.",
            wide=True,
            note=note,
        ),
        page.card(
            "Throughput",
            overlay("speed", ("timing", "tokens_per_second"), smoothed=True, hover=",.0f", tickformat="~s"),
            "Tokens per second.",
        ),
        page.card("Gradient norm", overlay("norm", ("grad_norm",), smoothed=True), "Smoothed."),
    ]
    parts = [
        f"<header><h1>{len(runs)} runs</h1><p class='soft'>{page.escape(' · '.join(names))}</p></header>",
        page.section("Summary", "The last evaluation of each.", [_summary(runs, names)]),
        page.section("Curves", "Steps count optimizer steps.", loss, legend),
        page.section("Held-out loss by domain", "At the last evaluation that all have.", [_domains(runs, names)]),
    ]
    if any(run.layers for run in runs):
        cards = [
            page.card(title, body, caption, unit=unit)
            for where, metric, title, unit, caption in _ROUTING
            if (body := overlay(metric, (*where, metric), smoothed=where == ("routing",)))
        ]
        parts.append(page.section("Routing", "Runs without experts are left out.", cards, legend))
    parts.append(page.section("Configuration", "Fields in which the runs differ.", [_differences(runs, names)]))
    return write_page(
        Path(out), page.page(" · ".join(names), "".join(parts), refresh=not all(r.finished for r in runs))
    )


def _names(runs: Sequence[Run], folders: Sequence[Path]) -> list[str]:
    """Names of the folders; whole paths where those are not unique."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _summary(runs: Sequence[Run], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        heldout, speed = run.series("heldout", "loss").values, run.series("timing", "tokens_per_second").values
        value = f"{heldout[-1]:.4f}" if len(heldout) else "–"
        rate = human(float(np.nanmedian(speed))) if np.isfinite(speed).any() else "–"
        raised = sum(event["event"] == "raised" for record in run.records for event in record.get("alarms", ()))
        cells = (run.kind, f"{run.steps_done:,} of {run.config.train.steps:,}", value, rate, str(raised))
        rows.append([name, *cells])
    return _table(["run", "model", "steps", "held-out loss", "tokens/s", "alarms"], rows, "")


def _domains(runs: Sequence[Run], names: Sequence[str]) -> str:
    steps = [{record["step"]: record for record in run.records if "heldout" in record} for run in runs]
    common = set.intersection(*map(set, steps))
    if not common:
        return page.card("None in common", "", "The runs have no evaluation at the same step.", wide=True)
    step = max(common)
    losses = [{n: d["loss"] for n, d in made[step]["heldout"]["domains"].items()} for made in steps]
    rows = []
    for domain in sorted(set().union(*losses)):
        values = [loss.get(domain) for loss in losses]
        first = values[0]
        shown = [f"{values[0]:.3f}" if first is not None else "–"]
        for value in values[1:]:
            change = f" ({value - first:+.3f})" if value is not None and first is not None else ""
            shown.append(f"{value:.3f}{change}" if value is not None else "–")
        rows.append([domain, *shown])
    caption = f"Step {step:,}, nats per token; in brackets the difference to the first run."
    return _table(["domain", *names], rows, caption)


def _differences(runs: Sequence[Run], names: Sequence[str]) -> str:
    configs = [dataclasses.asdict(run.config) for run in runs]
    rows = []
    for section, fields in configs[0].items():
        for field in fields:
            values = [str(config[section][field]) for config in configs]
            if len(set(values)) > 1:
                rows.append([f"{section}.{field}", *values])
    if not rows:
        return page.card("None", "", "The runs have the same configuration.", wide=True)
    return _table(["field", *names], rows, "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    titles = "".join(f"<th>{page.escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{page.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
    return page.card("", table, caption, wide=True)

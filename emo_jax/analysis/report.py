"""One page about a run, for the person who trained it: what was learned, by which experts, how fast."""

import dataclasses
import math
import os
import tempfile
from pathlib import Path

import numpy as np

from emo_jax.analysis import page, routing_sections, sections
from emo_jax.analysis.retention import read_evaluation, retention_sections
from emo_jax.analysis.run import Run, human
from emo_jax.config import Config
from emo_jax.model import active_parameters, total_parameters


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` from a run directory's `config.json` and `metrics.jsonl`, finished or not.

    Returns:
      The page's path. An earlier page is replaced atomically.

    Raises:
      UserError: where the folder is not a run directory, or its config is not one this version knows.
    """
    run_dir = Path(run_dir)
    run = Run(run_dir)
    parts = [_header(run)]
    if run.records:
        parts += [sections.alarms(run), sections.loss(run), sections.domains(run)]
        if run.layers:
            parts += [routing_sections.load(run), routing_sections.structure(run), routing_sections.pools(run)]
        parts += [routing_sections.health(run), sections.speed(run)]
    evaluated = read_evaluation(run_dir)
    if evaluated:
        parts.insert(2 + bool(run.records), retention_sections({run.name: evaluated}))
    parts.append(_config_table(run.config))
    text = page.page(f"{run.kind} · {run.name}", "".join(parts), refresh=not run.finished)
    return write_page(run_dir / "report.html", text)


def write_page(path: Path, text: str) -> Path:
    """Writes a page; one that was there is replaced atomically."""
    handle, temporary = tempfile.mkstemp(prefix=".report-", suffix=".html", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's are private; a report is for sharing
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def _header(run: Run) -> str:
    config, model = run.config, run.config.model
    total, active = total_parameters(model), active_parameters(model)
    size = f"{human(total)} parameters" + (f", {human(active)} active" if active < total else "")
    about = f"{model.num_layers} layers of width {model.d_model:,}"
    if model.split_layers:
        kind = "copies" if model.split_copies else "emergent experts"
        about += f" · layers {', '.join(run.layers)} split into {model.split_experts} {kind}, "
        about += f"a token uses {model.split_top_k}"
    elif run.layers:
        counts = sorted({experts for experts in model.layer_experts if experts})
        counted = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        about += f" · {counted} experts ({model.num_shared_experts} shared), a token uses {model.top_k}"
    if run.pooled:
        about += f" · {config.pool.kind} pools of {config.pool.min} to {config.pool.max} experts"
    state = "finished" if run.finished else "in progress" if run.records else "not started"
    state += "" if run.finished else "; this page renews itself when it is in view"
    share = min(run.steps_done / config.train.steps, 1)
    hint = (
        '<p class="soft hint mouse">Drag across a figure to zoom in, double-click to zoom out. '
        "A layer or domain button shows that one alone.</p>"
    )
    notes = []
    if not run.records:
        notes.append("Nothing is logged yet: metrics.jsonl has no complete line. Figures appear with the first.")
    if run.unreadable:
        notes.append(f"Left out: {run.unreadable:,} unreadable line(s) of metrics.jsonl.")
    loss = run.series("loss")
    if np.isnan(loss.values).any():
        step = int(loss.steps[np.isnan(loss.values).argmax()])
        notes.append(f"The training loss was not a finite number at step {step:,}: gaps in the curves mark such steps.")
    return (
        f"<header><h1>{page.escape(run.kind)} <span>{page.escape(size)}</span></h1>"
        f'<p class="soft">{page.escape(about)}</p>'
        f"<p><code>{page.escape(run.name)}</code> · step {run.steps_done:,} of {config.train.steps:,} ({share:.0%}), "
        f'{state}</p><div class="progress"><div style="width:{100 * share:.1f}%"></div></div></header>'
        f'{"".join(map(page.note, notes))}<div class="tiles">{"".join(_tiles(run))}</div>'
        f"{hint if run.records else ''}"
    )


def _tiles(run: Run) -> list[str]:
    if not run.records:
        return []
    tiles = []
    heldout = run.series("heldout", "loss")
    if len(heldout.steps):
        value, step = float(heldout.values[-1]), int(heldout.steps[-1])
        detail = f"perplexity {human(math.exp(min(value, 50)))}, step {step:,}"
        tiles.append(page.tile(f"{value:.3f}", f"{'final' if run.finished else 'latest'} held-out loss", detail))
    else:
        tiles.append(page.tile("–", "held-out loss", run.first_evaluation))
    training = run.series("cross_entropy").values
    recent = training[-max(1, len(training) // 50) :]
    if np.isfinite(recent).any():
        detail = "not comparable: uses pools" if run.pooled else "nats per token"
        tiles.append(page.tile(f"{np.nanmean(recent):.3f}", "training cross-entropy", detail))
    a_step = run.config.data.batch_size * run.config.data.sequence_length
    tiles.append(page.tile(human(run.steps_done * a_step), "tokens read", f"{human(a_step)} a step"))
    speed, mfu = (run.series("timing", name).values for name in ("tokens_per_second", "mfu"))
    if np.isfinite(speed).any():
        detail = f"median; MFU {np.nanmedian(mfu):.1%}" if np.isfinite(mfu).any() else "median"
        tiles.append(page.tile(human(float(np.nanmedian(speed))), "tokens per second", detail))
    if run.layers and len(dead := run.layer_series("dead_experts").values):
        detail = f"of {sum(run.config.model.routed_experts):,} routed, last step"
        tiles.append(page.tile(f"{np.nansum(dead[-1]):,.0f}", "unused experts", detail))
    return tiles


def _config_table(config: Config) -> str:
    rows = []
    default = dataclasses.asdict(Config())
    for section, fields in dataclasses.asdict(config).items():
        for field, value in fields.items():
            changed = ' class="changed"' if value != default[section][field] else ""
            shown = page.escape(value) if value not in ("", ()) else '<span class="soft">empty</span>'
            rows.append(f"<tr{changed}><td><code>{section}.{field}</code></td><td>{shown}</td></tr>")
    return (
        '<section><h2>Configuration</h2><details class="card"><summary>All fields</summary>'
        f'<p class="soft">Bold: not the default.</p><table><tbody>{"".join(rows)}</tbody></table>'
        "</details></section>"
    )

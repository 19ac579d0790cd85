"""Sections that every run's report has: loss, domains, speed."""

import math
from typing import Any

import numpy as np

from emo_jax.analysis import page
from emo_jax.analysis.figures import BLUE, DOMAIN_COLOURS, GREY, ORANGE, Curve, Rule, line_figure, shorten
from emo_jax.analysis.run import Run, Series, human, smooth


def alarms(run: Run) -> str:
    """What the run's alarms and its guard saw, newest first."""
    table: dict[tuple[str, int, int], dict[str, Any]] = {}
    for record in run.records:
        for event in record.get("alarms", ()):
            key = (event["name"], event["layer"], event["since"])
            table[key] = table.get(key, {"until": None}) | event | {"event": ""}
            if event["event"] == "cleared":
                table[key]["until"] = record["step"]
    skipped = [record for record in run.records if record.get("skipped_in_row")]
    lead = "Whether the router and the gradients stay healthy, judged over stretches of 100 logged steps."
    cards = []
    if table:
        rows = [
            f"<tr><td>{page.escape(event['name'])}{_where(event)}</td><td>{page.escape(event.get('seen', ''))}</td>"
            f"<td>step {event['since']:,} to {'now' if event['until'] is None else format(event['until'], ',')}</td>"
            f"<td>{page.escape(event.get('helps', ''))}</td></tr>"
            for event in reversed(table.values())
        ]
        head = "<tr><th>alarm</th><th>seen</th><th>when</th><th>what helps</th></tr>"
        now = sum(event["until"] is None for event in table.values())
        cards.append(_table(f"{len(table)} alarms, {now} of them now", head, rows))
    if skipped:
        rows = [
            f'<tr><td class="number">{record["step"]:,}</td><td class="number">{_number(record["loss"])}</td>'
            f'<td class="number">{_number(record["grad_norm"])}</td></tr>'
            for record in reversed(skipped[-200:])
        ]
        head = '<tr><th class="number">step</th><th class="number">loss</th><th class="number">gradient norm</th></tr>'
        total = run.records[-1].get("skipped", len(skipped))
        cards.append(_table(f"{total:,} steps skipped: not finite, or far above those before", head, rows))
    if not cards:
        cards = [page.card("None", "", "No alarm was raised and no step skipped.", wide=True)]
    return page.section("Alarms", lead, cards)


def _where(event: dict[str, Any]) -> str:
    return f" · layer {event['layer']}" if event["layer"] >= 0 else ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else page.escape(value)


def _table(title: str, head: str, rows: list[str]) -> str:
    body = f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    return page.card(title, body, "", wide=True)


def loss(run: Run) -> str:
    """Training and held-out loss over steps."""
    training, heldout = run.series("cross_entropy"), run.series("heldout", "loss")
    curves = [Curve("training", training, BLUE)]
    if len(training.steps) >= 60:
        mean = smooth(training.values, max(5, len(training.steps) // 50))
        curves = [
            Curve("training, as logged", training, BLUE, width=1, opacity=0.35),
            Curve("training, smoothed", Series(training.steps, mean), BLUE, width=2.2),
        ]
    chips = [("", "training", BLUE)]
    if len(heldout.steps):
        curves.append(Curve("held-out", heldout, ORANGE, width=2.2))
        chips.append(("", "held-out", ORANGE))
    note = ""
    if run.pooled:
        start = run.config.pool.start_step
        subject = f"From step {start:,} on, the training loss" if start else "The training loss"
        if run.config.pool.kind == "document":
            note = (
                f"{subject} is not a likelihood: pools are on, and each document's pool is chosen by reading the whole "
                "document."
            )
        else:
            note = f"{subject} is that of documents confined to pools drawn at random."
        note += (
            " Do not compare it with a standard MoE's training loss. The held-out loss uses no pool: compare that one."
        )
    figure = line_figure("loss", curves, unit="nats", height=340, rules=pool_start(run))
    caption = (
        "Held-out text is never trained on: when its loss turns upwards while the training loss still falls, the "
        "model has begun to memorise."
    )
    body = page.legend("", chips, clickable=False) + figure
    cards = [page.card("Cross-entropy", body, caption, unit="nats per token", wide=True, note=note)]
    return page.section("Loss", "How well the next token is predicted. Lower is better.", cards)


def domains(run: Run) -> str:
    """Held-out loss of each domain, over steps and at the last evaluation."""
    title, lead = "Held-out loss by domain", "The same evaluation, one kind of text at a time. It uses no pool."
    record = run.last_with("heldout", "domains")
    if record is None:
        return page.section(title, lead, [waiting(run, "No evaluation is logged yet")])
    last = {
        name: (float(domain["loss"]), int(domain.get("tokens", 0)))
        for name, domain in record["heldout"]["domains"].items()
        if domain.get("loss") is not None and math.isfinite(domain["loss"])
    }
    largest = sorted(sorted(last, key=lambda name: -last[name][1])[: len(DOMAIN_COLOURS)])
    colours = dict(zip(largest, DOMAIN_COLOURS, strict=False))
    keys = {name: f"domain {number}" for number, name in enumerate(largest)}
    curves = [
        Curve(name, run.series("heldout", "domains", name, "loss"), colours[name], key) for name, key in keys.items()
    ]
    caption = "Levels differ because some text is easier to predict; look at which curves still fall."
    if len(last) > len(keys):
        caption += f" The {len(last) - len(keys)} domains with the fewest tokens are in the table only."
    figure = line_figure("domains", curves, unit="nats", height=300)
    cards = [
        page.card("Held-out loss over steps", figure, caption, unit="nats per token", wide=True),
        page.card(
            f"Step {record['step']:,}, hardest first",
            _domain_table(last, colours),
            "Perplexity is e to the loss: among how many equally likely tokens the model seems to choose. Few tokens "
            "make a noisy estimate.",
            wide=True,
        ),
    ]
    legend = page.legend("domain", [(key, shorten(name, 40), colours[name]) for name, key in keys.items()])
    return page.section(title, lead, cards, legend)


def _domain_table(last: dict[str, tuple[float, int]], colours: dict[str, str]) -> str:
    longest = max((value for value, _ in last.values()), default=0) or 1
    rows = []
    for name, (value, tokens) in sorted(last.items(), key=lambda item: -item[1][0]):
        colour = colours.get(name, GREY)
        rows.append(
            f'<tr><td><i style="background:{colour}"></i> {page.escape(name)}</td>'
            f'<td class="bar"><div style="width:{100 * value / longest:.1f}%;background:{colour}"></div></td>'
            f'<td class="number">{value:.3f}</td><td class="number optional">{human(math.exp(min(value, 50)))}</td>'
            f'<td class="number">{tokens:,}</td></tr>'
        )
    return (
        '<div class="scroll"><table><thead><tr><th>domain</th><th></th><th class="number">loss</th>'
        '<th class="number optional">perplexity</th><th class="number">tokens</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


_TIMINGS = (  # group, metric, title, unit, hover format, tick format, reading aid
    (
        *("timing", "tokens_per_second", "Throughput", "tokens per second", ",.0f", "~s"),
        "Dips are evaluations, checkpoints or a busy machine.",
    ),
    (
        *("timing", "mfu", "Model FLOPs utilisation", "share of the chip's peak", ".1%", "~%"),
        "How much of the chip's peak goes into the model's own arithmetic; recomputation is not counted.",
    ),
    (
        *("timing", "data_wait", "Waiting for input", "share of a step", ".1%", "~%"),
        "Near zero is right; above a few percent, reading data holds the chip back.",
    ),
    (
        *("data", "padding", "Padding", "share of positions", ".2%", "~%"),
        "Positions without a token: what best-fit packing pays for whole documents.",
    ),
    (
        *("data", "filtered_rows", "Filtered rows", "share of rows", ".2%", "~%"),
        "Rows that the repetition filter took out; they train nothing.",
    ),
)


def speed(run: Run) -> str:
    """Throughput and what explains it, and the learning rate."""
    cards = []
    for group, metric, title, unit, hover, ticks, caption in _TIMINGS:
        data = run.series(group, metric)
        if len(data.steps) and (group == "timing" or np.nanmax(data.values) > 0):
            curve = Curve(title.lower(), data, BLUE)
            figure = line_figure(metric, [curve], hover=hover, tickformat=ticks, rangemode="tozero")
            cards.append(page.card(title, figure, caption, unit=unit))
    optimizer = run.config.optimizer
    warmup = f"{optimizer.warmup_steps:,} steps of warm-up, then " if optimizer.warmup_steps else ""
    rate = Curve("learning rate", run.series("learning_rate"), BLUE)
    figure = line_figure("learning_rate", [rate], hover=".3~e", rangemode="tozero")
    caption = f"The plan, not a measurement: {warmup}{optimizer.schedule}."
    cards.append(page.card("Learning rate", figure, caption, wide=len(cards) % 2 == 0))
    return page.section("Speed and schedule", "What the hardware gave, and how fast weights moved.", cards)


def waiting(run: Run, what: str) -> str:
    """A card in place of a figure that needs an evaluation."""
    return page.card(what, "", f"It comes with the held-out evaluation: {run.first_evaluation}.", wide=True)


def pool_start(run: Run) -> list[Rule]:
    """Marks where an annealed run switches pools on."""
    start = run.config.pool.start_step
    return [Rule(start, "pools on", at_step=True)] if run.pooled and 0 < start <= run.steps_done else []

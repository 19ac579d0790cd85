"""Sections of a run's report about its routers and experts."""

from typing import Any

import numpy as np

from emo_jax.analysis import page
from emo_jax.analysis.figures import (
    BLUE,
    GREY,
    LOAD_COLOURS,
    NATS_COLOURS,
    Curve,
    Rule,
    layer_colours,
    line_figure,
    load_heatmap,
    some,
    use_heatmap,
)
from emo_jax.analysis.run import Run, Series, smooth
from emo_jax.analysis.sections import pool_start, waiting

_POINTS = 60_000
"""Over all nine curves of all layers: what keeps a deep model's page light."""


def load(run: Run) -> str:
    """Tokens of every expert at the last evaluation; busiest and unused experts over steps."""
    record = run.last_with("routing", "expert_load")
    if record is None:
        heatmap = waiting(run, "The load of every expert is not logged yet")
    else:
        heatmap = page.card(
            f"Load of every expert at step {record['step']:,}",
            page.colour_scale("unused", "twice the mean or more", LOAD_COLOURS)
            + load_heatmap("expert_load", record["routing"]["expert_load"], run.layers),
            "A cell is one expert's tokens relative to its layer's mean: pale is even, blue idles, red is busy.",
            wide=True,
        )
    busiest = _card(
        run,
        "Busiest expert",
        "load_max_over_mean",
        "1 would be perfectly even; steady growth means that the router collapses onto few experts.",
        unit="× the mean load",
        hover=".2f",
    )
    unused = _card(
        run,
        "Unused experts",
        "dead_experts",
        "Experts that no token of the step chose; those that stay unused are wasted memory.",
        unit="per layer",
        hover=".3~g",
        rangemode="tozero",
    )
    lead = "Is every routed expert used? Shared experts see every token and are left out."
    return page.section("Expert load", lead, [heatmap, busiest, unused], _legend(run))


def structure(run: Run) -> str:
    """How far experts follow domains, over steps and at the last evaluation; empty where it was never logged."""
    record = run.last_with("heldout", "structure")
    if record is None:
        return ""
    last = record["heldout"]["structure"]
    information = _card(
        run,
        "Information of an expert about the domain",
        "information",
        "How much the expert that a token chose tells of its document's domain, I(expert; domain) / H(expert), beyond "
        "what it seems to tell where domains are shuffled among documents: 0 means that experts ignore domains. Part "
        "of it is vocabulary; emo_jax.explore tells it apart.",
        unit="held-out documents",
        hover=".1%",
        tickformat=".0%",
        heldout=True,
        rangemode="tozero",
    )
    similarity = _card(
        run,
        "Likeness of domains",
        "similarity",
        "Mean cosine of two domains' use of experts: 1 means that all use the same, 0 that none share any.",
        unit="held-out documents",
        heldout=True,
    )
    layers = some(len(run.layers))
    heatmaps = [
        page.card(
            f"Who uses which expert in layer {run.layers[layer]}",
            use_heatmap(f"use{layer}", last["use"][layer], last["names"]),
            f"At step {record['step']:,}, experts in the order of the domain that uses them most.",
            wide=layer == layers[-1] and len(layers) % 2 == 1,
        )
        for layer in layers
    ]
    lead = "Do experts take sides? Domains are only looked at here: training never sees them."
    scale = page.colour_scale("unused", "four times an even share or more", NATS_COLOURS)
    return page.section("Domain structure", lead, [information, similarity, *heatmaps], _legend(run) + scale)


def pools(run: Run) -> str:
    """How large document pools are, and how much of the routing they hold."""
    used = _card(
        run,
        "Experts used by a document",
        "experts_per_document",
        "How many different routed experts a document's tokens chose; fewer means more concentrated.",
        unit="mean over documents, smoothed",
        hover=".1f",
        smoothed=True,
        wide=True,
    )
    if not run.pooled:
        lead = "This run trains without pools: every document may use every expert."
        return page.section("Experts per document", lead, [used], _legend(run))
    low, high = run.layer_series("pool_size_min"), run.layer_series("pool_size_max")
    band = (
        Curve("smallest of any layer", Series(low.steps, low.values.min(axis=1)), GREY, width=0),
        Curve("largest of any layer", Series(high.steps, high.values.max(axis=1)), GREY, width=0, band=True),
    )
    size = _card(
        run,
        "Pool size",
        "pool_size_mean",
        "Sizes are drawn at random for every document: lines are their running mean, the band spans the smallest and "
        "largest pool.",
        unit="routed experts",
        hover=".1f",
        smoothed=True,
        before=band,
        rangemode="tozero",
    )
    mass = _card(
        run,
        "Routing mass inside the pool",
        "pool_mass",
        "How much of the probability that the router gives all experts falls inside the pool; it rises as a document's "
        "tokens come to agree.",
        unit="share",
        hover=".1%",
        tickformat=".0%",
    )
    choice = "those its tokens ask for most" if run.config.pool.kind == "document" else "drawn at random"
    lead = f"In training, a document may use only the experts of its pool: {choice}."
    return page.section("Document pools", lead, [size, mass, used], _legend(run))


def health(run: Run) -> str:
    """Entropies, router losses and the gradient norm; a dense model has only the last."""
    clip = run.config.optimizer.clip_norm
    norm = run.series("grad_norm")
    near_clip = np.nan_to_num(norm.values).max(initial=0) > clip / 2
    gradient = page.card(
        "Gradient norm",
        line_figure(
            "grad_norm",
            [Curve("gradient norm", norm, BLUE)],
            rules=[Rule(clip, f"clipped above {clip:g}")] if near_clip else [],
            rangemode="tozero",
        ),
        f"Gradients above {clip:g} are scaled down to it. Rare spikes are normal; a steady climb comes before trouble.",
        wide=True,
    )
    if not run.layers:
        return page.section("Training health", "Is training stable?", [gradient])
    uniform = np.log(np.maximum(run.config.model.routed_experts, 2))
    balance = run.config.balance
    share: dict[str, Any] = {"unit": "share of ln R", "scale": uniform, "hover": ".1%", "tickformat": ".0%"}
    cards = [
        _card(
            run,
            "Entropy of a token's routing",
            "token_entropy",
            "At 100 % the router cannot tell experts apart; it falls as tokens choose more clearly.",
            **share,
        ),
        _card(
            run,
            "Entropy of a document's routing",
            "document_entropy",
            "Over the mean of a document's tokens: the lower, the more a document keeps to its own few experts, which "
            "is what makes a model modular.",
            **share,
        ),
        _card(
            run,
            "Balance loss",
            "balance",
            f"1 is perfect balance (scope: {balance.scope}); it enters the training loss with weight "
            f"{balance.weight:g}.",
            rules=[Rule(1, "")],
        ),
        _card(
            run,
            "Router z",
            "router_z",
            "Mean squared log-partition of the router's logits; steady growth means that they drift off.",
            hover=".2f",
        ),
        gradient,
    ]
    lead = "Do routers decide clearly, evenly and without drifting? Entropies are relative to ln R, an even choice's."
    return page.section("Router health", lead, cards, _legend(run))


def _window(run: Run) -> int:
    """Logged steps that a curve of a layer averages: noise would hide many layers behind each other."""
    return max(1, len(run.records) // 200)


def _legend(run: Run) -> str:
    colours = layer_colours(len(run.layers))
    chips = [(f"layer {layer}", layer, colour) for layer, colour in zip(run.layers, colours, strict=True)]
    mean = f"running means of {_window(run):,} logged steps" if _window(run) > 1 else ""
    return page.legend("layer", chips, note=mean)


def _card(
    run: Run,
    title: str,
    metric: str,
    caption: str,
    *,
    unit: str = "",
    wide: bool = False,
    scale: np.ndarray | float = 1.0,
    smoothed: bool = False,
    before: tuple[Curve, ...] = (),
    rules: list[Rule] | None = None,
    heldout: bool = False,
    **figure: Any,
) -> str:
    """A figure of a metric / `scale`, of training's routing or of held-out documents' structure.

    One curve a mixture layer, drawn over the curves `before`.
    """
    steps, values = run.layer_series(metric, ("heldout", "structure") if heldout else ("routing",))
    window = max(5, len(steps) // 50) if smoothed and len(steps) >= 60 else 1 if heldout else _window(run)
    if window > 1 and len(steps):
        values = np.stack([smooth(column, window) for column in values.T], axis=1)
    colours = layer_colours(len(run.layers))
    curves = [
        Curve(f"layer {layer}", Series(steps, column), colour, f"layer {layer}")
        for layer, colour, column in zip(run.layers, colours, (values / scale).T, strict=True)
    ]
    points = max(150, min(1000, _POINTS // (9 * len(curves))))
    rules = [*(rules or []), *pool_start(run)]
    body = line_figure(metric, [*before, *curves], points=points, rules=rules, **figure)
    return page.card(title, body, caption, unit=unit, wide=wide)

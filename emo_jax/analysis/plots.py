"""Static figures of an analysis, as PNG and SVG, drawn from the numbers in `analysis.json` alone.

Letters: D domains, L mixture layers, R routed experts.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from emo_jax.analysis.figures import shorten, some

_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")
"""Of models: Okabe and Ito's, which colour-blind readers tell apart too."""
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names may hold dollar signs
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "emo_jax",  # equal numbers, equal files
}

Numbers = dict[str, Any]


def write_figures(folder: Path, models: Sequence[Numbers]) -> Path:
    """Draws each figure that the numbers allow, models side by side, as NAME.png and NAME.svg; returns the folder.

    Args:
      folder: made where there is none.
      models: their parts of `analysis.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        for name, figure in _figures(models):
            figure.savefig(folder / f"{name}.png", dpi=160)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return folder


def _figures(models: Sequence[Numbers]) -> Iterator[tuple[str, Figure]]:
    for model in models:
        yield "experts-" + re.sub(r"[^\w.-]+", "-", model["name"]), _experts(model)
    yield "coverage", _coverage(models)
    if all(model["mutual"] for model in models):
        yield "similarity", _similarity(models)
        yield "information", _information(models)
        yield "agreement", _agreement(models)


def _experts(model: Numbers) -> Figure:
    """Share of each domain's tokens that choose each expert, experts by block."""
    shown, domains = some(len(model["layers"])), model["domains"]
    most = max(np.max(model["layers"][layer]["use"]) for layer in shown)
    figure = Figure((9, 0.8 + len(shown) * (0.55 + 0.16 * len(domains))), layout="constrained")
    grid = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, layer in zip(grid, shown, strict=True):
        numbers = model["layers"][layer]
        order_R = np.array(numbers["order"])
        image = _heatmap(axes, np.array(numbers["use"])[:, order_R], "Blues", 0, most)
        block_R = np.array(numbers["block"])[order_R]
        for edge in np.flatnonzero(np.diff(block_R)) + 0.5:
            axes.axvline(edge, color="#d55e00", linewidth=0.8)
        axes.set_yticks(range(len(domains)), _labels(domains))
        step = 1 if len(order_R) <= 40 else 8
        axes.set_xticks(range(0, len(order_R), step), order_R[::step].tolist(), fontsize=7)
        axes.set_title(f"mixture layer {layer}", loc="left")
    grid[-1].set_xlabel("expert, by block (orange lines): experts that tokens choose together")
    figure.colorbar(
        image, ax=grid.tolist(), label="share of the domain's tokens", format=_percent, aspect=15 * len(shown)
    )
    figure.suptitle(f"Experts that domains use: {shorten(model['name'], 60)}")
    return figure


def _similarity(models: Sequence[Numbers]) -> Figure:
    """Cosine of domains' mean probabilities, on one colour range."""
    columns = max(len(some(len(model["layers"]))) for model in models)
    domains = max(len(model["domains"]) for model in models)
    least = min(np.min(layer["similarity"]) for model in models for layer in model["layers"])
    size = max(0.16 * domains, 1.4)
    figure = Figure((3 + columns * (size + 0.2), 2 + len(models) * (size + 0.35)), layout="constrained")
    grid = figure.subplots(len(models), columns, squeeze=False)
    for place, (row, model) in enumerate(zip(grid, models, strict=True)):
        for axes in row[len(some(len(model["layers"]))) :]:
            axes.set_visible(False)
        for axes, layer in zip(row, some(len(model["layers"])), strict=False):
            numbers = model["layers"][layer]
            image = _heatmap(axes, np.array(numbers["similarity"]), "viridis", least, 1, aspect="equal")
            axes.set_title(f"layer {layer}, mean {numbers['similarity_mean']:.2f}")
            axes.set_xticks(range(len(model["domains"])), _labels(model["domains"]), rotation=90, fontsize=7)
            axes.set_yticks(range(len(model["domains"])), _labels(model["domains"]), fontsize=7)
            axes.tick_params(length=0, labelleft=axes is row[0], labelbottom=place == len(models) - 1)
        row[0].set_ylabel(shorten(model["name"], 34), fontsize=9)
    figure.colorbar(image, ax=grid, label="cosine of mean router probabilities", aspect=30)
    figure.suptitle("How alike domains are routed (mean: of different domains)")
    return figure


def _coverage(models: Sequence[Numbers]) -> Figure:
    """Experts above an even share, and entropy, of each domain and layer."""
    domains = max(len(model["domains"]) for model in models)
    widest = max(len(model["layers"]) for model in models)
    width = max(0.42 * min(widest, 8), 2.4) * len(models)
    figure = Figure((2.6 + width, 1.4 + 2 * (0.7 + 0.19 * domains)), layout="constrained")
    grid = figure.subplots(2, len(models), squeeze=False)
    for row, key, unit in zip(
        grid, ("coverage", "entropy"), ("experts above an even share", "entropy, bits"), strict=True
    ):
        values = [np.array([layer[key] for layer in model["layers"]]).T for model in models]
        low, high = min(map(np.min, values)), max(map(np.max, values))
        for axes, model, value_DL in zip(row, models, values, strict=True):
            image = _heatmap(axes, value_DL, "cividis", low, max(high, low + 1e-6))
            layers = value_DL.shape[1]
            axes.set_xticks(range(layers), range(layers))
            axes.set_yticks(range(len(value_DL)), _labels(model["domains"]))
            axes.tick_params(labelleft=axes is row[0])
            if layers <= 6:
                for (y, x), value in np.ndenumerate(value_DL):
                    dark = (value - low) / max(high - low, 1e-6) < 0.5
                    text = f"{value:.0f}" if key == "coverage" else f"{value:.2f}"
                    axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
            if key == "coverage":
                axes.set_title(shorten(model["name"], 34))
            else:
                axes.set_xlabel("mixture layer")
        ticks = MaxNLocator(8, integer=key == "coverage")
        figure.colorbar(image, ax=row.tolist(), label=unit, ticks=ticks)
    figure.suptitle("How many experts a domain's mean routing is spread over")
    return figure


def _information(models: Sequence[Numbers]) -> Figure:
    """What a layer's experts tell about the domain, the token, and the domain beyond the token."""
    measures = {"domain": "domain", "token": "token", "domain_given_token": "domain | token"}
    parts = _parts(models)
    layers = max(len(model["layers"]) for model in models)
    figure = Figure((max(8, 1.5 + 0.9 * layers), 0.9 + 2.1 * len(parts)), layout="constrained")
    grid = figure.subplots(len(parts), len(measures), squeeze=False)
    for row, (title, numbers) in zip(grid, parts.items(), strict=True):
        for axes, (key, shown) in zip(row, measures.items(), strict=True):
            shares = [[layer["mutual"][key]["share"] for layer in one["layers"]] for one in numbers]
            _bars(axes, shares, [str(layer) for layer in range(layers)])
            axes.yaxis.set_major_formatter(_percent)
            axes.set_title(f"I(expert; {shown})")
            axes.set_xlabel("mixture layer" if numbers is [*parts.values()][-1] else "")
        row[0].set_ylabel(f"{title}\nshare of H(expert)")
    _legend(figure, models)
    figure.suptitle("What experts tell, less what chance gives")
    return figure


def _agreement(models: Sequence[Numbers]) -> Figure:
    """How well clusters of tokens and of documents match domains, with chance."""
    parts = _parts(models)
    figure = Figure((10, 3.2), layout="constrained")
    row = figure.subplots(1, 3)
    kinds = [(kind, part) for kind in ("clusters", "document_clusters") for part in parts]
    names = {"clusters": "tokens", "document_clusters": "documents"}
    labels = [f"{names[kind]},\n{part.lower()}" if len(parts) > 1 else names[kind] for kind, part in kinds]
    for axes, (key, shown) in zip(
        row, {"nmi": "NMI", "ari": "adjusted Rand index", "purity": "purity"}.items(), strict=True
    ):
        found = [[parts[part][n][kind] for kind, part in kinds] for n in range(len(models))]
        values = [[one[key] for one in model] for model in found]
        chance = [[one["permuted"][key][0] for one in model] for model in found]
        _bars(axes, values, labels, chance)
        axes.set_ylim(min(0, axes.get_ylim()[0]), 1)
        axes.set_title(shown)
        axes.tick_params(axis="x", labelsize=7)
    _legend(figure, models, "black lines: the same with documents' domains permuted")
    figure.suptitle("How well clusters match domains")
    return figure


def _parts(models: Sequence[Numbers]) -> dict[str, list[Numbers]]:
    """The numbers of all text, and of prose where all models have them."""
    parts = {"All text": list(models)}
    if all(model["prose"] and model["prose"]["mutual"] for model in models):
        parts["Prose"] = [model["prose"] for model in models]
    return parts


def _bars(
    axes: Axes, values: Sequence[Sequence[float]], labels: Sequence[str], chance: Sequence[Sequence[float]] = ()
) -> None:
    """A group of bars a label, one a model; a black line across each where chance would end it."""
    width = 0.8 / len(values)
    for n, heights in enumerate(values):
        x = np.arange(len(heights)) + (n - (len(values) - 1) / 2) * width
        axes.bar(x, heights, width * 0.92, color=_COLOURS[n % len(_COLOURS)])
        if chance:
            axes.hlines(chance[n], x - width / 2, x + width / 2, color="black", linewidth=1.2)
    axes.set_xticks(range(len(labels)), labels)
    axes.axhline(0, color="black", linewidth=0.6)


def _legend(figure: Figure, models: Sequence[Numbers], note: str = "") -> None:
    bars = [Patch(color=_COLOURS[n % len(_COLOURS)]) for n in range(len(models))]
    names = [shorten(model["name"], 40) for model in models]
    title = {"title": note, "title_fontsize": 8} if note else {}
    figure.legend(bars, names, loc="outside lower center", ncols=min(len(models), 3), frameon=False, **title)


def _heatmap(axes: Axes, matrix: np.ndarray, colours: str, low: float, high: float, aspect: Any = "auto") -> Any:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=2)
    return axes.imshow(matrix, cmap=colours, vmin=low, vmax=high, aspect=aspect, interpolation="nearest")


def _labels(domains: Sequence[str]) -> list[str]:
    return [shorten(domain or "no label", 24) for domain in domains]


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.4g} %"

"""Plotly figures that stay readable on a light or a dark page and on a phone, as HTML fragments."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.colors
import plotly.graph_objects as go
import plotly.io

from emo_jax.analysis.run import Series, thin

GREY = "#8b929c"
BLUE = "#3f78d8"
ORANGE = "#e0742f"
# All of middling lightness: they must be told from white and from near-black.
DOMAIN_COLOURS = (
    *("#3f78d8", "#e0742f", "#3f9c5a", "#c8507f", "#8a63cc", "#2a9fae"),
    *("#b58a1b", "#a0634a", "#6f8f2f", "#7f8bd9", "#d0605c", "#5c7f95"),
)
_LAYER_RAMP = ("#3168d8", "#7f5fd0", "#c24f9a", "#dc5a55", "#dd8a2b")  # early to late
LOAD_COLOURS = ((0, "#2c5fb8"), (0.25, "#8fb0e0"), (0.5, "#eceae6"), (0.75, "#eda274"), (1, "#c2491d"))
NATS_COLOURS = ((0, "#eceae6"), (0.5, "#eda274"), (1, "#c2491d"))
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False}


class Curve(NamedTuple):
    """One line of a figure; `key` names the legend chip that isolates it."""

    name: str
    data: Series
    colour: str
    key: str = ""
    width: float = 1.6
    opacity: float = 1.0
    dash: str = "solid"
    band: bool = False
    """Shade between this curve and the one before it."""


class Rule(NamedTuple):
    """A dashed reference line: at a y `value`, or at a step."""

    value: float
    label: str
    at_step: bool = False


def layer_colours(layers: int) -> list[str]:
    """One colour a layer, from early to late."""
    if layers == 1:
        return [_LAYER_RAMP[0]]
    return plotly.colors.sample_colorscale(list(_LAYER_RAMP), np.linspace(0, 1, layers).tolist())


def line_figure(
    name: str,
    curves: Sequence[Curve],
    *,
    hover: str = ".3f",
    unit: str = "",
    points: int = 2000,
    rules: Sequence[Rule] = (),
    height: int = 250,
    **y_axis: Any,
) -> str:
    """Curves over steps as an HTML fragment.

    Args:
      name: unique on the page; the element's id.
      curves: drawn in this order. Each is thinned to `points`.
      hover: d3 format of a value.
      unit: shown after it.
      points: most points a curve keeps.
      rules: reference lines.
      height: in pixels.
      y_axis: further attributes of Plotly's y axis.
    """
    figure = go.Figure()
    for curve in curves:
        steps, values = thin(curve.data, points)
        sparse = len(values) <= 30 and not curve.band and curve.width > 0
        figure.add_scatter(
            x=steps,
            y=values.astype(np.float32),
            name=html.escape(shorten(curve.name, 28)),
            mode="lines+markers" if sparse else "lines",
            line={"color": curve.colour, "width": curve.width, "dash": curve.dash},
            marker={"size": 5},
            opacity=curve.opacity,
            fill="tonexty" if curve.band else None,
            fillcolor="rgba(139, 146, 156, 0.18)" if curve.band else None,
            hovertemplate=f"%{{y:{hover}}}{f' {unit}' if unit else ''}",
            meta=curve.key or None,
        )
    for rule in rules:
        add = figure.add_vline if rule.at_step else figure.add_hline
        add(
            rule.value,
            line={"color": GREY, "width": 1, "dash": "dash"},
            annotation={"text": rule.label, "font_size": 11},
            annotation_position="top" if rule.at_step else "top right",
        )
    figure.update_layout(hovermode="x unified" if len(curves) <= 12 else "closest")
    figure.update_xaxes(title={"text": "step", "standoff": 6}, tickformat=",d", hoverformat=",d", nticks=7)
    if all(len(curve.data.steps) == 0 or np.ptp(curve.data.steps) < 6 for curve in curves):
        figure.update_xaxes(dtick=1)  # steps are whole numbers
    figure.update_xaxes(unifiedhovertitle_text="step %{x:,d}", spikecolor=GREY, spikethickness=1, spikedash="dot")
    figure.update_yaxes(automargin=True, nticks=6, exponentformat="power", **y_axis)
    return _fragment(name, figure, height)


class Line(NamedTuple):
    """A line over few points, such as sizes of subsets; `low` and `high`, where given, are its spread."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    key: str = ""
    dash: str = "solid"
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def point_figure(
    name: str,
    lines: Sequence[Line],
    *,
    x_title: str,
    hover: str = ".3f",
    height: int = 280,
    falling: bool = True,
    **y_axis: Any,
) -> str:
    """Lines over a few numbers, such as of experts kept, on a logarithmic axis, as an HTML fragment.

    Args:
      name: unique on the page; the element's id.
      lines: drawn in this order.
      x_title: of the axis.
      hover: d3 format of a value.
      height: in pixels.
      falling: the largest number is on the left.
      y_axis: further attributes of Plotly's y axis.
    """
    figure = go.Figure()
    for line in lines:
        y = np.array(line.y)
        spread = {"array": np.array(line.high) - y, "arrayminus": y - np.array(line.low)} if len(line.low) else {}
        figure.add_scatter(
            x=list(line.x),
            y=y,
            name=html.escape(shorten(line.name, 28)),
            mode="lines+markers",
            line={"color": line.colour, "width": 2, "dash": line.dash},
            marker={"size": 6},
            error_y={"symmetric": False, "thickness": 1.2, "width": 3, **spread} if spread else None,
            hovertemplate=f"%{{y:{hover}}}",
            meta=line.key or None,
        )
    ticks = sorted({x for line in lines for x in line.x}, reverse=True)
    figure.update_layout(hovermode="x unified" if len(lines) <= 12 else "closest")
    figure.update_xaxes(
        title={"text": x_title, "standoff": 6},
        type="log",
        autorange="reversed" if falling else True,
        tickvals=ticks,
        ticktext=ticks,
    )
    figure.update_yaxes(automargin=True, nticks=6, **y_axis)
    return _fragment(name, figure, height)


def matrix_heatmap(name: str, values: Sequence[Sequence[float]], labels: Sequence[str], limit: float) -> str:
    """A square matrix of nats, coloured up to `limit`, as an HTML fragment."""
    texts = [f"{shorten(label, 22)}" for label in labels]
    figure = go.Figure(
        go.Heatmap(
            z=np.array(values, dtype=np.float32),
            x=texts,
            y=texts,
            colorscale=NATS_COLOURS,
            zmin=0,
            zmax=limit,
            xgap=1,
            ygap=1,
            hovertemplate="chosen for %{y}, evaluated on %{x}<br>%{z:+.3f} nats<extra></extra>",
            showscale=False,
        )
    )
    figure.update_xaxes(tickangle=-45, automargin=True, showgrid=False)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    return _fragment(name, figure, 150 + 24 * len(labels))


def load_heatmap(name: str, loads: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """Tokens per expert relative to the mean, layers × experts; rows may differ in length."""
    experts = max(map(len, loads))
    load_LR = np.full((len(loads), experts), np.nan, dtype=np.float32)
    for row, load in zip(load_LR, loads, strict=True):
        row[: len(load)] = np.array(load, dtype=np.float32)
    figure = go.Figure(
        go.Heatmap(
            z=load_LR,
            y=[f"layer {label}" for label in labels],
            colorscale=LOAD_COLOURS,
            zmin=0,
            zmax=2,
            xgap=1 if experts <= 64 else 0,
            ygap=1,
            hovertemplate="%{y}, expert %{x}<br>%{z:.2f} × the mean load<extra></extra>",
            showscale=False,
        )
    )
    figure.update_xaxes(title={"text": "routed expert", "standoff": 6}, showgrid=False, zeroline=False)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    return _fragment(name, figure, 60 + min(max(26 * len(loads), 90), 620))


def use_heatmap(name: str, use_ZR: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """Use of experts over an even share, domains × experts, those of a domain side by side, as an HTML fragment."""
    use = np.array(use_ZR, dtype=np.float32)
    order = np.lexsort((-use.max(axis=0), use.argmax(axis=0)))
    figure = go.Figure(
        go.Heatmap(
            z=use[:, order],
            y=[shorten(label, 22) for label in labels],
            customdata=np.broadcast_to(order, use.shape),
            colorscale=NATS_COLOURS,
            zmin=0,
            zmax=4,
            ygap=1,
            hovertemplate="%{y}, expert %{customdata}<br>%{z:.2f} × an even share<extra></extra>",
            showscale=False,
        )
    )
    figure.update_xaxes(title={"text": "routed experts", "standoff": 6}, showticklabels=False, ticks="", showgrid=False)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    return _fragment(name, figure, 70 + 20 * len(use))


def some(layers: int) -> list[int]:
    """Four of so many layers, from the first to the last, where all would be too many to show; all of four or fewer."""
    return np.unique(np.linspace(0, layers - 1, 4).round().astype(int)).tolist()


def shorten(text: str, length: int) -> str:
    """`text`, cut with an ellipsis where it is longer."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _fragment(name: str, figure: go.Figure, height: int) -> str:
    # Colours of text and grid come from the page's style sheet, which knows light from dark.
    figure.update_layout(
        template="none",
        font={"family": _FONT, "size": 12, "color": GREY},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 8, "r": 12, "t": 18, "b": 40},
        showlegend=False,
        hoverlabel={"bgcolor": "#22262e", "bordercolor": "#22262e", "font": {"color": "#f2f3f5", "size": 12}},
    )
    figure.update_xaxes(zeroline=False)
    figure.update_yaxes(zeroline=False, ticklabelstandoff=4)
    return plotly.io.to_html(
        figure,
        config=_CONFIG,
        include_plotlyjs=False,
        full_html=False,
        default_width="100%",
        default_height=f"{height}px",
        div_id=name,
        validate=False,
    )

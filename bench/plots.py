"""Plots of the page: SVG files that come out the same, byte for byte, from the same figures.

A white background, so that they read on light and dark pages; colours that stay apart for the colour-blind (Okabe and
Ito), and markers besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "plots"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#999999"
MARKERS = "os^Dvpx"
LABELS = 34
"""Points below the axes that their numbers and title take; the legend stands under them."""
STYLE: Any = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "font.family": "sans-serif",
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "promptembedder",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one labelled set of points.

    Attributes:
        label: its entry in the legend.
        x, y: as many values each.
        x_range, y_range: lowest and highest value at each point, drawn as an error bar; None: no bar.
        is_background: in grey, behind the others.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    x_range: Sequence[tuple[float, float]] | None = None
    y_range: Sequence[tuple[float, float]] | None = None
    is_background: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes: what stands on them, its curves, and which of `x`, `y`, `xy` are logarithmic."""

    x: str
    y: str
    series: Sequence[Series]
    log: str = ""


def looks(place: int) -> tuple[str, str]:
    """Colour and marker of a series; no two of the first 49 share both."""
    return COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def lines(path: Path, *panels: Panel) -> None:
    """Curves, the panels side by side, each with its legend."""
    _figure(path, panels, marker_only=False)


def points(path: Path, *panels: Panel) -> None:
    """Scattered points with error bars."""
    _figure(path, panels, marker_only=True)


def _figure(path: Path, panels: Sequence[Panel], marker_only: bool) -> None:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**mpl.rcParamsDefault, **STYLE}):
        legend = max(len(panel.series) for panel in panels)
        width = 4.6 * len(panels) if len(panels) > 1 else 6.4
        figure = Figure(figsize=(width, 3.6 + 0.2 * legend), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, panel, marker_only)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _draw(axes: Any, panel: Panel, marker_only: bool) -> None:
    from matplotlib.ticker import LogFormatter
    from matplotlib.transforms import ScaledTranslation

    for place, series in enumerate(panel.series):
        colour, marker = (GREY, ".") if series.is_background else looks(place)
        axes.errorbar(
            series.x,
            series.y,
            xerr=_bars(series.x, series.x_range),
            yerr=_bars(series.y, series.y_range),
            label=series.label,
            color=colour,
            marker=marker,
            linestyle="none" if marker_only else "-",
            capsize=2,
            zorder=1 if series.is_background else 2,
        )
    for name, axis, set_scale in (("x", axes.xaxis, axes.set_xscale), ("y", axes.yaxis, axes.set_yscale)):
        if name in panel.log:
            set_scale("log")
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(LogFormatter())
    if "x" in panel.log and not marker_only:
        axes.set_xticks(sorted({value for series in panel.series for value in series.x}))
        axes.set_xticks([], minor=True)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    below = axes.transAxes + ScaledTranslation(0, -LABELS / 72, axes.figure.dpi_scale_trans)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below)


def _bars(values: Sequence[float], ranges: Sequence[tuple[float, float]] | None) -> list[list[float]] | None:
    """Distances from the values down and up, as matplotlib takes them."""
    if ranges is None:
        return None
    pairs = list(zip(values, ranges, strict=True))
    return [[value - low for value, (low, _) in pairs], [high - value for value, (_, high) in pairs]]

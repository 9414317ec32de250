"""Pictures of a run's history as SVG, by matplotlib (the extra `report`): readable on light and on dark ground."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe.runs.extras import extra
from pe.runs.files import write_text
from pe.runs.history import Record

if TYPE_CHECKING:  # an extra: training does without it
    from matplotlib.figure import Figure

TITLES = {
    "loss": "Loss",
    "score": "Score while training",
    "speed": "Tokens a second",
    "alike": "How alike instructions are (mean cosine)",
}
FROM_ZERO = ("speed", "alike")
"""Where a small change must look small."""
WORDS, COLUMNS = "words", 6
INK, LINE = "#010203", "#2f81c7"
"""The first stands for the page's own colour of text, the second has enough contrast to white and to black."""
SCHEME = (
    "<style>svg{color-scheme:light dark;color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"
)
"""Of a picture by itself; in a page the page says."""
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
STYLE = {
    "axes.edgecolor": INK,
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "font.family": "sans-serif",
    "grid.alpha": 0.15,
    "grid.color": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Chart:
    """A number over the steps: file name, title, and (step, value) of at least one point."""

    name: str
    title: str
    points: list[tuple[int, float]]


def charts(records: Sequence[Record]) -> list[Chart]:
    """What of a history can be drawn over the steps."""
    series = {
        "loss": _series(records, "loss"),
        "score": _series(records, "score"),
        "speed": speeds(records),
        "alike": _series(records, "instructions_alike"),
    }
    return [Chart(name, TITLES[name], points) for name, points in series.items() if points]


def _series(records: Sequence[Record], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


def speeds(records: Sequence[Record]) -> list[tuple[int, float]]:
    """Tokens a second between each record of the loss and the one before."""
    logged = [record for record in records if "loss" in record]
    start = {"tokens": 0, "seconds": 0.0}
    return [
        (now["step"], (now["tokens"] - before["tokens"]) / (now["seconds"] - before["seconds"]))
        for before, now in itertools.pairwise([start, *logged])
        if now["seconds"] > before["seconds"]
    ]


def last_words(records: Sequence[Record]) -> tuple[int, Mapping[str, Any]] | None:
    """Step and words of the newest record that has words (see `pe/measure/words.py`)."""
    return next(((record["step"], record[WORDS]) for record in reversed(records) if record.get(WORDS)), None)


def draw(records: Sequence[Record], folder: Path) -> None:
    """Write `loss.svg`, `score.svg`, `speed.svg`, `alike.svg` and `words.svg`; an earlier one without data is removed.

    Raises:
        MissingPackage: no matplotlib.
    """
    pictures = {chart.name: svg_of(chart) for chart in charts(records)}
    if found := last_words(records):
        pictures[WORDS] = svg_of_words(*found)
    for name in (*TITLES, WORDS):
        path = folder / f"{name}.svg"
        if name in pictures:
            write_text(path, pictures[name].replace(">", f">{SCHEME}", 1))
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    matplotlib = extra("matplotlib", "report")
    from matplotlib.figure import Figure  # no pyplot: a backend chosen by the user stays

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a script that its font lacks; the viewer has another
        yield Figure(figsize=(width, height), layout="constrained")


def svg_of(chart: Chart) -> str:
    """A line over the steps, with its points where they are few.

    Raises:
        MissingPackage: no matplotlib.
    """
    steps, values = zip(*chart.points, strict=True)
    with _figure(6, 3) as figure:
        axis = figure.add_subplot()
        axis.plot(steps, values, color=LINE, marker="o" if len(values) <= 30 else None, markersize=4)
        axis.set_title(chart.title)
        axis.set_xlabel("step")
        axis.locator_params(axis="x", integer=True)
        if chart.name in FROM_ZERO:
            axis.set_ylim(min(0, *values), 1.05 * max(0.1, *values))
        return _svg(figure, chart.name, chart.title)


def svg_of_words(step: int, words: Mapping[str, Any]) -> str:
    """Of each instruction its soft tokens side by side, under each its words: the heavier, the darker.

    Raises:
        MissingPackage: no matplotlib.
    """
    blocks = [
        (instruction if first == 0 else "", tokens[first : first + COLUMNS], min(COLUMNS, len(tokens)))
        for instruction, tokens in words.items()
        for first in range(0, len(tokens), COLUMNS)
    ]
    lines = 2 + sum(2 + max(map(len, tokens)) for _, tokens, _ in blocks)
    title = f"What the prompting LLM writes, after {step} steps"
    with _figure(9, 0.22 * lines) as figure:
        figure.text(0.01, 1 - 0.9 / lines, title, weight="bold")
        line = 2
        for instruction, tokens, columns in blocks:
            figure.text(0.01, 1 - line / lines, printable(textwrap.shorten(instruction, 110)), style="italic")
            for place, token in enumerate(tokens):
                for number, (word, weight) in enumerate(token, start=1):
                    where = (0.02 + 0.97 * place / columns, 1 - (line + number) / lines)
                    figure.text(*where, _cell(printable(word), weight), alpha=0.55 + 0.45 * weight)
            line += max(map(len, tokens)) + 2
        return _svg(figure, WORDS, title)


def _cell(word: str, weight: float) -> str:
    """A word that keeps to its column, and its share where that is worth saying."""
    short = word if len(word) <= 14 else f"{word[:13]}…"
    return f"{short}  {weight:.0%}" if weight >= 0.005 else short


def printable(text: str) -> str:
    """A text with control characters spelled out, which XML does not have."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _svg(figure: Figure, name: str, title: str) -> str:
    """The picture as an element that may stand in a page beside others: its ids are its own."""
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata=NO_METADATA)
    whole = written.getvalue()
    element = whole[whole.index("<svg") :].replace(INK, "currentColor")
    element = element.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", element)

"""Draw how a text becomes an embedding, `docs/flow.svg`: the same bytes at every run.

    python scripts/draw_flow.py [FILE]

The figure has a white ground of its own, so that it reads on light and dark pages.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape

TARGET = Path(__file__).parent.parent / "docs" / "flow.svg"
WIDTH, HEIGHT = 900, 390
LINE = 16
"""Points from one line of a box to the next."""
FILLS = {"data": ("#ffffff", "#555555"), "frozen": ("#dce9f5", "#0072b2"), "trained": ("#fde8cf", "#b35900")}
"""Fill and border by what a box is; text is black on all."""

BOXES = (
    (15, 30, 125, 56, "data", ("instruction",)),
    (180, 30, 165, 56, "trained", ("prompting LLM", "small language model")),
    (385, 30, 125, 56, "data", ("K soft tokens", "the soft prompt")),
    (550, 30, 130, 56, "trained", ("alignment", "one matrix")),
    (720, 30, 165, 56, "trained", ("lens (optional)", "scales dimensions")),
    (15, 165, 125, 56, "data", ("text",)),
    (180, 150, 165, 86, "frozen", ("backbone", "reads the text once,", "without gradient")),
    (515, 150, 165, 86, "frozen", ("the same backbone", "reads the soft tokens", "behind the text")),
    (745, 165, 115, 56, "data", ("embedding", "unit vector")),
    (515, 236, 165, 30, "trained", ("reader: adapters",)),
    (180, 296, 165, 56, "trained", ("weighted skip", "mean, one matrix")),
)
"""Left, top, width, height, kind and lines; the first line is bold."""

ARROWS = (
    ((140, 58), (180, 58)),
    ((345, 58), (385, 58)),
    ((510, 58), (550, 58)),
    ((615, 86), (615, 150)),
    ((140, 193), (180, 193)),
    ((345, 193), (515, 193)),
    ((680, 193), (745, 193)),
    ((262, 236), (262, 296)),
    ((345, 324), (802, 324), (802, 221)),
)
DASHED = (((262, 30), (262, 8), (802, 8), (802, 30)), ((802, 86), (802, 165)))
"""What only a model with a lens has."""

WORDS = (
    (430, 185, "middle", "keys and values"),
    (712, 185, "middle", "mean"),
    (272, 270, "start", "hidden states"),
    (573, 316, "middle", "added"),
    (532, 23, "middle", "hidden state that begins the prompt"),
)
LEGEND = ((395, "frozen", "frozen"), (490, "trained", "trained"), (590, "data", "data"))


def parts() -> Iterator[str]:
    """The elements of the figure, one a line."""
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        ' font-family="Helvetica, Arial, sans-serif" font-size="13">'
    )
    yield "<title>From an instruction and a text to an embedding</title>"
    yield (
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 8 4 0 8z"/></marker>'
    )
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>'
    for dash, lines in (("none", ARROWS), ("5 4", DASHED)):
        for points in lines:
            path = " ".join(f"{x},{y}" for x, y in points)
            tip = f'stroke-dasharray="{dash}" marker-end="url(#tip)"'
            yield f'<polyline points="{path}" fill="none" stroke="#000000" {tip}/>'
    for left, top, width, height, kind, words in BOXES:
        yield box(left, top, width, height, kind)
        first = top + height / 2 - LINE * (len(words) - 1) / 2 + 4
        for number, word in enumerate(words):
            weight = "bold" if number == 0 else "normal"
            yield label(left + width / 2, first + number * LINE, "middle", word, weight)
    for x, y, anchor, word in WORDS:
        yield label(x, y, anchor, word)
    for x, kind, word in LEGEND:
        yield box(x, 362, 16, 16, kind)
        yield label(x + 24, 375, "start", word)
    yield "</svg>"


def box(left: int, top: int, width: int, height: int, kind: str) -> str:
    fill, border = FILLS[kind]
    size = f'x="{left}" y="{top}" width="{width}" height="{height}" rx="{min(6, height // 4)}"'
    return f'<rect {size} fill="{fill}" stroke="{border}"/>'


def label(x: float, y: float, anchor: str, word: str, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}">{escape(word)}</text>'


def figure() -> str:
    """The whole file."""
    return "\n".join(parts()) + "\n"


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET).write_text(figure(), encoding="utf-8")

"""README and `docs/`: links lead somewhere, options exist, figures are those of BENCHMARKS.md."""

from __future__ import annotations

import dataclasses
import re
import runpy
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from pe.config import Recipe
from pe.runs.recipes import REMOVED, _nested_dataclass

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "bench" / "tables").glob("*.md")])
OPTIONS = ROOT / "docs" / "options.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def anchors(page: Path) -> set[str]:
    """Names of a page's headings in links, as GitHub and MkDocs both make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^):#]*\.md)?#([^)]+)\)", page.read_text(encoding="utf-8"))
    targets = ((page.parent / name if name else page, anchor) for name, anchor in links)
    assert [f"{target.name}#{anchor}" for target, anchor in targets if anchor not in anchors(target)] == []


def test_site_has_every_page() -> None:
    """Those that `scripts/site.py` takes; MkDocs looks at links and headings (`make docs`)."""
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    site = runpy.run_path(str(ROOT / "scripts" / "site.py"))
    assert set(re.findall(r"\S+\.md", nav)) == {path for path in site["shown"]() if path.endswith(".md")}


def test_readme_reaches_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "docs").iterdir() if f"(docs/{path.name})" not in readme] == []


def options(kind: type, prefix: str = "") -> Iterator[str]:
    """Every option of a recipe by its dotted name; those of the training sets without theirs."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner, name = _nested_dataclass(hints[field.name]), prefix + field.name
        if inner is None or prefix == "model.templates.":
            yield name
        else:
            yield from options(inner, "" if name == "data" else f"{name}.")


def test_page_has_every_option_and_no_other() -> None:
    page, told = OPTIONS.read_text(encoding="utf-8"), set()
    for cell in re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        stem = first.rpartition(".")[0]
        told |= {first, *(stem + other if other.startswith(".") else other for other in others)}
    assert told == set(options(Recipe)) - set(REMOVED)


def test_readme_repeats_figures_of_the_benchmarks() -> None:
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "BENCHMARKS.md")]
    result = re.search(r"<!-- begin:result -->(.*)<!-- end:result -->", pages[0], re.DOTALL)
    assert result
    said, measured = (set(re.findall(r"\d[\d,.]*\d|\d", text)) for text in (result[1], pages[1]))
    assert said - measured == set()


def test_drawn_flow_is_the_committed_one() -> None:
    draw = runpy.run_path(str(ROOT / "scripts" / "draw_flow.py"))
    assert draw["figure"]() == draw["TARGET"].read_text(encoding="utf-8")

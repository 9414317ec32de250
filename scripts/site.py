"""A hook of MkDocs: the site has this repository's pages and figures, each where it stands in the repository.

MkDocs takes pages from one folder, `docs/`, and these link to others: a hook is what lets every link be the same on
GitHub and on the site. README.md is the site's first page. It also writes the colours of code, light and dark.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHOWN = ("*.md", "docs/*.*", "bench/tables/*.md", "bench/plots/*.svg", "tests/kernels/MUTATIONS.md")
STYLES = {"light": "default", "dark": "github-dark"}
"""Pygments' colours of code by the theme's."""


def shown() -> Iterator[str]:
    """Paths of what the site has, from the repository's root."""
    for pattern in SHOWN:
        yield from sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def code_css() -> str:
    """Rules of a style sheet for code."""
    from pygments.formatters import HtmlFormatter

    rules = (
        HtmlFormatter(style=style).get_style_defs(f"[data-bs-theme={theme}] .codehilite")
        for theme, style in STYLES.items()
    )
    return "\n".join(rules)


def on_files(files: Any, config: Any) -> Any:
    """Put `shown` in place of what MkDocs found in `docs/`, and add the style sheet; files of the theme stay."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in shown():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "code.css", content=code_css()))
    return files

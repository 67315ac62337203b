"""Tables and names in the pages of the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from code_blocks import PAGES, ROOT
from markdown_it import MarkdownIt

FOLDERS = ("qsvft", "tests", "benchmarks", "examples", "docs")


def tables(page: Path) -> Iterator[list[dict[str, str]]]:
    """The tables of a page: each row as {heading: cell}, in Markdown."""
    cells: list[str] = []
    rows: list[list[str]] = []
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        if token.type == "inline":
            cells.append(token.content)
        elif token.type == "tr_open":
            cells = []
        elif token.type == "tr_close":
            rows.append(cells)
        elif token.type == "table_open":
            rows = []
        elif token.type == "table_close":
            yield [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def table_with(page: str, *headings: str) -> list[dict[str, str]]:
    """The one table of a page that has these headings."""
    (found,) = [table for table in tables(ROOT / page) if table and set(headings) <= table[0].keys()]
    return found


def named_paths() -> Iterator[tuple[Path, str]]:
    """Every page, with each file or folder of this repository that stands in it as code."""
    for page in PAGES:
        for name in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", page.read_text(encoding="utf-8")):
            yield page, name

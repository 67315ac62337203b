"""The tables of docs/models.md, made of the tests: `python docs/model_tables.py` writes them anew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("models.md")
sys.path.insert(0, str(PAGE.parents[1] / "tests"))
MARK = "<!-- {}: written by docs/model_tables.py -->\n\n"


def tried(test: Any) -> set[str]:
    """The rows that a test is run for."""
    (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    return set(mark.args[1])


def models() -> list[list[str]]:
    """A row for each family; a cell says "yes" if a test of that name says so, else why there is none."""
    from test_models import COLUMNS, FAMILIES

    rows = [["model", "class", "trains whole", *COLUMNS]]
    for name, family in FAMILIES.items():
        cells = ["yes" if name in tried(test) else str(family.silent) for test in COLUMNS.values()]
        rows.append([name, f"`{family.model}`", ", ".join(f"`{one}`" for one in family.head) or "nothing", *cells])
    return rows


def trainers() -> list[list[str]]:
    """A row for each trainer."""
    from test_trainers import COLUMNS, TRAINERS

    rows = [["trainer", "from", *COLUMNS]]
    for name, way in TRAINERS.items():
        rows.append(
            [f"`{name}`", f"`{way.place}`", *("yes" if name in tried(test) else "" for test in COLUMNS.values())]
        )
    return rows


def markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def page_with_tables(page: str) -> str:
    """The page with both tables as they are made now."""
    for name, rows in (("models", models()), ("trainers", trainers())):
        before, _, after = page.partition(MARK.format(name))
        page = f"{before}{MARK.format(name)}{markdown(rows)}\n\n{after.partition(chr(10) * 2)[2]}"
    return page


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

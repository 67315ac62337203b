"""The table of options in options.md, written from the one place where each option is declared.

python docs/option_table.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qsvft.memory.methods import COUNTED, WRITTEN
from qsvft.options.adapter import OPTIONS
from qsvft.options.option import Option
from qsvft.options.switches import SWITCHES

PAGE = Path(__file__).with_name("options.md")
BEGIN, END = "<!-- written by docs/option_table.py -->\n", "<!-- up to here -->\n"
HEAD = ("option", "default", "allowed", "given in", "what it is")
# Two keywords that are no declared options: what the others are counted for, and on.
BESIDE = (
    ("`bits`", "`4`", "4, 8 or 16", "keyword, command, method", "How the base is held: NF4, int8, or as it is."),
    ("`fit`", "`None`", "a card's size such as '8GiB', a dict, a Recommendation", "keyword", "Let recommend() choose."),
)


def table(config: Iterable[Option], switches: Iterable[Option]) -> str:
    """The whole table in Markdown."""
    rows = [HEAD, tuple("---" for _ in HEAD), *BESIDE]
    rows += [_row(one, "config") for one in config]
    rows += [_row(one, "keyword") for one in switches]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(one: Option, owner: str) -> tuple[str, ...]:
    places = {
        owner: True,
        "command": one.of_factors and one.kind.command is not None,
        "method": one.name in WRITTEN,
        "recommend": one.name in COUNTED,
    }
    given = ", ".join(place for place, there in places.items() if there)
    default = repr(one.default).replace("'", '"')
    return f"`{one.name}`", f"`{default}`", one.allowed, given, one.help


def page_with(text: str, rows: str) -> str:
    """The page with these rows in place of those that it has."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + rows + "\n" + END + after


if __name__ == "__main__":
    written = page_with(PAGE.read_text(encoding="utf-8"), table(OPTIONS.values(), SWITCHES.values()))
    PAGE.write_text(written, encoding="utf-8")

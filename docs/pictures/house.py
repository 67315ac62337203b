"""The rooms of the code and the direction of their imports, as house.svg.

    python docs/pictures/house.py

Rooms are the folders of ``qsvft/``, doors the single files beside them. Each stands above all that it imports; what a
room is for is the first line of its ``__init__.py``. Arrows are read off the code by grimp, imports inside functions
included; one that follows from others (a over b, b over c: a over c) is left out. An arrow that goes up, which there
should be none of, is drawn in red.
"""

from __future__ import annotations

import ast
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import grimp
import networkx
from svg import INK, PALE, Picture, write

PACKAGE = "qsvft"
SOURCE = Path(__file__).resolve().parents[2] / PACKAGE
OUT = "house.svg"
LEFT_OUT = ("version",)  # a number
DOOR, ROOM, FRONT, UP = "#fdf1dc", "#e3edf7", "#ffffff", "#c0392b"
WIDTH, RIGHT, LINE = 930, 840, 17


@dataclass(frozen=True)
class Place:
    """A room or a door: its name, what it is for, and the files in it, by folder ("" for those in it directly)."""

    name: str
    purpose: str
    files: dict[str, list[str]]

    @property
    def is_door(self) -> bool:
        return not self.files

    @property
    def rows(self) -> list[tuple[str, int, str]]:
        """The lines of its files: the folder where one begins, how far they are set in, their names."""
        found = []
        for folder, names in self.files.items():
            lines = textwrap.wrap(", ".join(names), 100 if folder else 112)
            shown = [f"{folder}/" if folder else "", *[""] * len(lines)]
            found += [(start, 80 if folder else 0, line) for start, line in zip(shown, lines, strict=False)]
        return found


def place_of(module: str) -> str:
    """The room or door that a module is in: qsvft.maths.basis -> maths."""
    return module.partition(".")[2].partition(".")[0] or PACKAGE


def imports() -> dict[tuple[str, str], int]:
    """How many imports there are from one place into another."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None, exclude_type_checking_imports=True)
    found: dict[tuple[str, str], int] = defaultdict(int)
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = (place_of(module), place_of(imported))
            if pair[0] != pair[1] and not {*pair} & {*LEFT_OUT}:
                found[pair] += 1
    return dict(sorted(found.items()))


def places() -> dict[str, Place]:
    """Every room and door, by name."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    found = {}
    for name in sorted({place_of(module) for module in graph.modules} - {*LEFT_OUT}):
        folder = SOURCE / name
        files: dict[str, list[str]] = defaultdict(list)
        for path in sorted(folder.rglob("*.py")) if folder.is_dir() else ():
            if path.name != "__init__.py":
                files["/".join(path.relative_to(folder).parts[:-1])].append(path.stem)
        file = folder / "__init__.py" if folder.is_dir() else SOURCE / f"{'__init__' if name == PACKAGE else name}.py"
        found[name] = Place(name, purpose(file), dict(sorted(files.items())))
    return found


def purpose(file: Path) -> str:
    """The first line of a file's docstring, without the name it may begin with."""
    text = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").splitlines()[0]
    return text.replace("``", "").rstrip(".")


def order(found: dict[str, Place], arrows: dict[tuple[str, str], int]) -> list[str]:
    """All places from the top to the bottom, each above what it imports.

    Where there is a choice, what nobody imports comes first, then doors.
    """
    graph = networkx.DiGraph(list(arrows))
    graph.add_nodes_from(found)
    for circle in list(networkx.strongly_connected_components(graph)):
        # Of a circle that is the arrow up: a room that imports a door.
        up = [(a, b) for a, b in arrows if {a, b} <= circle and found[b].is_door and not found[a].is_door]
        graph.remove_edges_from(up)
    inner = {imported for _, imported in graph.edges}
    key = {name: (name in inner, not found[name].is_door, name) for name in found}
    return list(networkx.lexicographical_topological_sort(graph, key=key.__getitem__))


def shown(names: list[str], arrows: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others, and all that go up."""
    down = [(a, b) for a, b in arrows if names.index(a) < names.index(b)]
    reduced = networkx.transitive_reduction(networkx.DiGraph(down))
    return sorted(reduced.edges) + [pair for pair in arrows if pair not in down]


def draw() -> Picture:
    """The picture."""
    found, arrows = places(), imports()
    names = order(found, arrows)
    heights = {name: 34 + LINE * len(found[name].rows) for name in names}
    tops, y = {}, 84.0
    for name in names:
        tops[name] = y
        y += heights[name] + 12
    picture = Picture(WIDTH, int(y) + 14, "The rooms of the code and the direction of their imports")
    picture.text((24, 36), "The house", 20, anchor="start", bold=True)
    picture.text(
        (24, 59),
        "a room imports only from what stands below it; an arrow that follows from others is left out",
        13,
        anchor="start",
        fill=PALE,
    )
    for name in names:
        _place(picture, found[name], tops[name], heights[name])
    _arrows(picture, names, shown(names, arrows), tops, heights)
    return picture


def _arrows(
    picture: Picture,
    names: list[str],
    pairs: list[tuple[str, str]],
    tops: dict[str, float],
    heights: dict[str, float],
) -> None:
    """On the right, the longest outside: from the lower half of a place to the upper half of another."""
    left: dict[str, int] = defaultdict(int)
    reached: dict[str, int] = defaultdict(int)
    for a, b in sorted(pairs, key=lambda pair: (abs(names.index(pair[0]) - names.index(pair[1])), pair)):
        up = names.index(a) > names.index(b)
        start = tops[a] + heights[a] - 7 - 4 * left[a]
        end = tops[b] + (heights[b] - 7 - 4 * left[b] if up else 8 + 6 * reached[b])
        left[a] += 1
        left[b] += up
        reached[b] += not up
        reach = RIGHT + 26 + 0.2 * abs(end - start)
        d = f"M{RIGHT:g},{start:g} C{reach:g},{start:g} {reach:g},{end:g} {RIGHT + 2:g},{end:g}"
        picture.path(d, UP if up else INK, width=1.5)


def _place(picture: Picture, place: Place, top: float, height: float) -> None:
    fill = FRONT if place.name == PACKAGE else DOOR if place.is_door else ROOM
    name = "__init__.py" if place.name == PACKAGE else f"{place.name}.py" if place.is_door else f"{place.name}/"
    picture.box((24, top), (RIGHT - 24, height), fill)
    picture.text((38, top + 22), name, 15, anchor="start", bold=True)
    picture.text((172, top + 22), place.purpose, 12.5, anchor="start", italic=True, fill=PALE)
    for number, (folder, inset, line) in enumerate(place.rows):
        base = top + 41 + LINE * number
        picture.text((38, base), folder, 12, anchor="start", bold=True)
        picture.text((38 + inset, base), line, 12, anchor="start")


if __name__ == "__main__":
    write(draw(), OUT)

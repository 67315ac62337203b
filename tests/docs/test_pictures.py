"""The pictures in docs/ are what their scripts draw, and the scripts draw what the code is."""

from __future__ import annotations

import sys
from pathlib import Path

import networkx
import pytest
from code_blocks import ROOT

grimp = pytest.importorskip("grimp", reason="pictures are drawn where the docs extra is installed, as make test does")
PICTURES = ROOT / "docs" / "pictures"
sys.path.insert(0, str(PICTURES))
import data_path  # noqa: E402
import house  # noqa: E402

SCRIPTS = pytest.mark.parametrize("script", [data_path, house], ids=lambda script: script.OUT)


@SCRIPTS
def test_the_picture_is_the_one_that_its_script_draws(script):
    assert (PICTURES / script.OUT).read_text(encoding="utf-8") == str(script.draw()), "make pictures draws it anew"


@SCRIPTS
def test_a_picture_is_drawn_twice_the_same(script):
    assert str(script.draw()) == str(script.draw())


def test_every_picture_has_a_script_and_is_shown_on_a_page():
    drawn = {script.OUT for script in (data_path, house)}
    assert {path.name for path in PICTURES.glob("*.svg")} == drawn
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    assert [
        path.name for path in PICTURES.iterdir() if path.suffix in (".svg", ".png") and path.name not in pages
    ] == []


def test_every_module_of_the_package_is_in_the_house():
    shown = {
        ".".join(filter(None, (house.PACKAGE, place.name, folder.replace("/", "."), name)))
        for place in house.places().values()
        for folder, names in place.files.items()
        for name in names
    }
    doors = {f"{house.PACKAGE}.{place.name}" for place in house.places().values() if place.is_door}
    graph = grimp.build_graph(house.PACKAGE, cache_dir=None)
    packages = {".".join(("qsvft", *path.parent.relative_to(house.SOURCE).parts)) for path in packages_of(house.SOURCE)}
    assert graph.modules - packages == (shown | doors | {"qsvft.version"}) - {"qsvft.qsvft"}


def packages_of(folder: Path) -> list[Path]:
    return list(folder.rglob("__init__.py"))


def test_the_arrows_lead_wherever_an_import_leads_and_nowhere_else():
    arrows = house.imports()
    names = house.order(house.places(), arrows)
    drawn, all_of_them = networkx.DiGraph(house.shown(names, arrows)), networkx.DiGraph(list(arrows))
    assert networkx.transitive_closure(drawn).edges == networkx.transitive_closure(all_of_them).edges
    assert set(drawn.edges) <= set(arrows)


def test_a_room_stands_above_what_it_imports():
    arrows = house.imports()
    names = house.order(house.places(), arrows)
    assert [(a, b) for a, b in arrows if names.index(a) > names.index(b)] == []


def test_an_import_of_a_door_by_a_room_below_it_is_an_arrow_up():
    door = {name: house.Place(name, "", {}) for name in ("door",)}
    rooms = {name: house.Place(name, "", {"": ["file"]}) for name in ("middle", "cellar")}
    arrows = {("door", "middle"): 1, ("middle", "cellar"): 2, ("door", "cellar"): 1, ("cellar", "door"): 1}
    names = house.order(door | rooms, arrows)
    assert names == ["door", "middle", "cellar"]
    assert house.shown(names, arrows) == [("door", "middle"), ("middle", "cellar"), ("cellar", "door")]


def test_shapes_are_told_apart_by_their_letters():
    assert len(data_path.LETTERS) == 4 and data_path.shape((data_path.TOKENS, data_path.RANK)) == "t × k"

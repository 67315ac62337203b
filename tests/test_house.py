"""The plan of the code holds: imports run one way, without a circle, and the page that shows it says the same."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import grimp
import pytest

import qsvft

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(qsvft.__file__).parent
LONGEST_CHAIN = 18
ROOMS = {"maths", "storage", "lean", "tuner", "checkpoint", "memory", "formats", "cli", "options", "training"}
DOORS = {"public", "chat", "prepare", "loading", "exporting", "info", "use_factors"}


@pytest.fixture(scope="module")
def imports():
    """What each module imports, in functions and for type checkers too."""
    graph = grimp.build_graph("qsvft", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


def test_the_contracts_hold():
    """Those of pyproject.toml: layers, no circles, and who may know torch or PEFT."""
    lint = Path(sys.executable).with_name("lint-imports")
    found = subprocess.run([lint, "--no-cache"], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 broken" in found.stdout


def test_no_chain_of_imports_is_a_circle_or_too_long_to_follow(imports):
    open_modules: set[str] = set()

    @cache
    def chain(module):
        assert module not in open_modules, f"a circle through {module}"
        open_modules.add(module)
        longest = max((chain(other) for other in imports[module]), key=len, default=())
        open_modules.remove(module)
        return module, *longest

    # The command line stands beside the library: it imports it when it has understood what it is asked for.
    library = [module for module in imports if not module.startswith(("qsvft.cli", "qsvft.__main__"))]
    longest = max(map(chain, library), key=len)
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)


def test_there_are_ten_rooms_and_the_doors_and_nothing_lies_about():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == ROOMS
    assert {path.stem for path in PACKAGE.glob("*.py")} == DOORS | {"__init__", "__main__", "version"}


def test_no_two_files_of_tests_have_one_name():
    """A process that a test starts finds the test's functions by the file's name alone (a conftest.py by its place)."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def test_the_table_of_rooms_is_the_contract():
    table = re.findall(r"^\| `([^`|]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.search(r'containers = \["qsvft"\].*?layers = \[(.*?)\]', contract, re.DOTALL)
    assert layers is not None
    rows = [row.replace(".py", "").replace("/", "").split(", ") for row in table]
    assert rows == [line.split(" | ") for line in re.findall(r'"([^"]+)"', layers.group(1))]
    assert {name for row in rows for name in row} == ROOMS | DOORS

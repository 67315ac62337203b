"""Each name of another package that its owner may take away is in one table, is used, and exists."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.version import Version
from pinned import pins
from private_names import PRIVATE_NAMES, SEEN_IN, PrivateName, found

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "qsvft"
# Documented in spite of the underscore: os._exit, and _replace() of a named tuple.
DOCUMENTED = {"_exit", "_replace"}
# Parts of the text of a basis's key or of a parameter's name, and no names.
TEXT = {"_float32", "_float32_", "_randomized_", "_data_", "_original", "_bias"}


class Use(NamedTuple):
    """A private name in a file of the library."""

    name: str
    file: str
    line: int


def private(name: str) -> bool:
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def defined(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The private names that classes define themselves: in their body, or on self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from ((name, each.lineno) for each in node.body for name in _bound(each) if private(name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield from [(node.attr, node.lineno)] if private(node.attr) else []


def _bound(statement: ast.stmt) -> list[str]:
    """What a statement of a class's body gives a name."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def named(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The private names in a module: imported, asked for as attributes, given as keywords, or written as strings."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value.removesuffix(".")]
        yield from ((name, getattr(node, "lineno", 0)) for name in names if private(name))


def overridden(module: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """The private names that a module's classes define and that a base of another package has too."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = [base for base in getattr(import_module(module), node.name).__mro__ if base is not object]
            foreign = [base for base in bases if not base.__module__.startswith("qsvft.")]
            for name, line in defined(node):
                if any(name in {**vars(base), **vars(base).get("__annotations__", {})} for base in foreign):
                    yield name, line


def imported(file: str, tree: ast.AST) -> Iterator[str]:
    """The library's own files that a file imports from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = Path(file).parents[node.level - 1].joinpath(*(node.module or "").split("."))
            yield f"{folder.as_posix()}.py"
            yield from (f"{(folder / alias.name).as_posix()}.py" for alias in node.names)


def uses_in(sources: dict[str, str]) -> list[Use]:
    """What the library names that is neither its own nor documented, and what it overrides.

    Its own is, in a file, what the classes there and in the files that it imports from define. A name of another
    package that is spelled like one of these is not seen.
    """
    trees = {file: ast.parse(source) for file, source in sources.items()}
    inherited = [
        Use(name, file, line)
        for file, tree in trees.items()
        for name, line in overridden("qsvft." + file.removesuffix(".py").replace("/", "."), tree)
    ]
    foreign = {use.name for use in inherited}
    own = {file: {name for name, _ in defined(tree)} - foreign for file, tree in trees.items()}
    return inherited + [
        Use(name, file, line)
        for file, tree in trees.items()
        for known in [own[file].union(*(own.get(other, ()) for other in imported(file, tree)), DOCUMENTED, TEXT)]
        for name, line in named(tree)
        if name not in known and not name.startswith("_qsvft")
    ]


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {path.relative_to(LIBRARY).as_posix(): path.read_text() for path in sorted(LIBRARY.rglob("*.py"))}


@pytest.fixture(scope="module")
def uses(sources) -> list[Use]:
    return uses_in(sources)


def _exists(entry: PrivateName) -> bool:
    try:
        if entry.exists is not None:
            return entry.exists()
        found(entry.name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("entry", PRIVATE_NAMES, ids=lambda entry: entry.name)
def test_each_name_exists(entry):
    have = "" if entry.package == "python" else f" {version(entry.package)}, seen in {SEEN_IN[entry.package]}"
    assert _exists(entry), (
        f"{entry.package}{have}: {entry.name} is gone. It is used in qsvft/{entry.used_in.replace(' ', ', qsvft/')}: "
        f"{entry.why}. What would do without it: {entry.gone_when}."
    )


def test_every_private_name_in_the_code_is_in_the_table(uses):
    known = {(entry.leaf, file) for entry in PRIVATE_NAMES for file in entry.used_in.split()}
    known |= {
        (part, file) for entry in PRIVATE_NAMES for part in entry.name.split(".") for file in entry.used_in.split()
    }
    missing = [f"qsvft/{use.file}:{use.line}: {use.name}" for use in uses if (use.name, use.file) not in known]
    assert not missing, "not in tests/private_names.py:\n" + "\n".join(sorted(missing))


def test_every_name_in_the_table_is_in_the_code(sources, uses):
    seen = {(use.name, use.file) for use in uses}
    # What another package asks an object for stands in no base class of that package, but in ours.
    seen |= {(name, file) for file, source in sources.items() for name, _ in defined(ast.parse(source))}
    for entry in PRIVATE_NAMES:
        for file in entry.used_in.split():
            written = re.search(rf"\b{re.escape(entry.leaf)}\b", sources[file])
            there = (entry.leaf, file) in seen if private(entry.leaf) else written
            assert there, f"{entry.name} is no longer used in qsvft/{file}"


def test_the_table_is_sorted_by_package_and_names_each_once():
    packages = [entry.package for entry in PRIVATE_NAMES]
    assert packages == sorted(packages)
    names = [entry.name for entry in PRIVATE_NAMES]
    assert len(names) == len(set(names))


def test_the_versions_that_the_names_were_seen_in_are_those_that_are_pinned():
    pinned = pins("constraints.txt")
    seen = {name: [Version(version)] for name, version in SEEN_IN.items()}
    assert {name: pinned[name] for name in seen} == seen, "look at the table, and say so in SEEN_IN"


@pytest.mark.parametrize(
    "line",
    [
        "from torch._there import thing",
        "from torch import _there",
        "import torch._there",
        "torch.thing._there",
        "getattr(torch, '_there')",
        "vars(torch)['_there'] = 1",
        "torch.thing(_there=True)",
        "name.removeprefix('_there.')",
        "self._there()",
        "other._there = 1",
    ],
)
def test_the_search_sees_every_way_of_naming(line):
    assert uses_in({"prepare.py": line}) == [Use("_there", "prepare.py", 1)]


@pytest.mark.parametrize("line", ["def _there(): ...\n_there()", "self._there = 1\nself._there", "os._exit(1)"])
def test_the_library_s_own_and_documented_names_are_let_through(line):
    assert uses_in({"prepare.py": line}) == []


def test_the_search_sees_what_a_class_overrides():
    source = "class QSVFTModel:\n    def _prepare_model(self): ...\n    def _decomposition_progress(self): ..."
    assert uses_in({"tuner/model.py": source}) == [Use("_prepare_model", "tuner/model.py", 2)]

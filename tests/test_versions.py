"""What is declared is what is tested: the floors of pyproject.toml are those of constraints-floor.txt, and what
constraints.txt fixes is one version of each package on every Python."""

from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from pinned import lines, pins

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def declared(*extras):
    """What an installed qsvft asks for, for itself and for its extras."""
    found = (Requirement(text) for text in requires("qsvft") or ())
    asked = [{"extra": extra} for extra in extras]
    return [one for one in found if one.marker is None or any(map(one.marker.evaluate, asked))]


@pytest.mark.parametrize("requirement", declared("test"), ids=lambda requirement: requirement.name)
def test_a_package_is_declared_from_the_version_that_make_test_floor_uses(requirement):
    [specifier] = requirement.specifier
    assert specifier.operator == ">="
    assert pins("constraints-floor.txt", "3.10")[requirement.name] == [Version(specifier.version)]


def test_the_floor_fixes_nothing_else_but_what_goes_with_packages_of_that_time():
    names = {requirement.name for requirement in declared("test")}
    assert pins("constraints-floor.txt", "3.10").keys() - names == {"click", "pyparsing"}


@pytest.mark.parametrize("python", PYTHONS)
def test_each_package_that_is_declared_has_one_version_on_every_python_and_within_its_range(python):
    fixed = pins("constraints.txt", python)
    assert {name: found for name, found in fixed.items() if len(found) != 1} == {}
    for requirement in declared("test", "dev", "docs"):
        [version] = fixed[requirement.name]
        assert version in requirement.specifier


def test_a_python_changes_nothing_but_where_a_release_no_longer_takes_it():
    older, ci = pins("constraints.txt", "3.10"), pins("constraints.txt", "3.11")
    assert pins("constraints.txt", "3.12") == pins("constraints.txt", "3.13") == ci
    assert older.keys() == ci.keys()
    assert all(older[name] <= ci[name] for name in ci)


def test_the_version_of_torch_that_the_makefile_reads_is_its_whole_line():
    [torch] = [line for line in lines("constraints.txt") if line.name == "torch"]
    assert torch.marker is None

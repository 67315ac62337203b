"""What is declared is what is tested: the floors of pyproject.toml are those of constraints-floor.txt."""

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def pins(name):
    """The versions that a file of constraints fixes, by package."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {match[1]: Version(match[2]) for line in lines if (match := re.fullmatch(r"([\w.-]+)==([\w.]+)", line))}


def declared():
    """What an installed qsvft asks for, for itself and to be tested."""
    found = (Requirement(text) for text in requires("qsvft") or ())
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": "test"})]


@pytest.mark.parametrize("requirement", declared(), ids=lambda requirement: requirement.name)
def test_a_package_is_declared_from_the_version_that_make_test_floor_uses(requirement):
    [specifier] = requirement.specifier
    assert specifier.operator == ">="
    assert pins("constraints-floor.txt")[requirement.name] == Version(specifier.version)


def test_both_sets_of_versions_are_within_what_is_declared():
    names = {requirement.name for requirement in declared()}
    assert pins("constraints-floor.txt").keys() - names == {
        "click",
        "pyparsing",
    }  # of the time of those that ask for them
    for requirement in declared():
        assert pins("constraints.txt")[requirement.name] in requirement.specifier

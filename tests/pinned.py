"""The versions that the files of constraints fix."""

from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def lines(name):
    """What a file of constraints says, a requirement a line."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def pins(name, python="3.11"):
    """The versions that a file of constraints fixes on a Python, by default that of CI: each package's, in a list."""
    found = {}
    for line in lines(name):
        [specifier] = line.specifier
        assert specifier.operator == "==", line
        if line.marker is None or line.marker.evaluate({"python_version": python}):
            found.setdefault(line.name, []).append(Version(specifier.version))
    return found

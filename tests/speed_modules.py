"""The modules of benchmarks/speed, importable for a while: they import each other by their bare names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SPEED = BENCHMARKS / "speed"
NAMES = {path.stem for folder in (SPEED, BENCHMARKS / "gpu", BENCHMARKS) for path in folder.glob("*.py")}


@contextmanager
def speed_modules() -> Iterator[Callable[[str], Any]]:
    """Gives what imports one by its name. Others' modules of the same names are back afterwards."""
    others = {name: sys.modules.pop(name) for name in NAMES & sys.modules.keys()}
    try:
        with patch.object(sys, "path", [str(SPEED), *sys.path]):
            yield import_module
    finally:
        for name in NAMES & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(others)

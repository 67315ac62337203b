"""Scripts of benchmarks/ and examples/, importable for a while: they import each other by their bare names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
BENCHMARKS, EXAMPLES = ROOT / "benchmarks", ROOT / "examples"
SPEED, GPU, QUALITY = (BENCHMARKS / name for name in ("speed", "gpu", "quality"))
NAMES = {path.stem for folder in (SPEED, GPU, QUALITY, BENCHMARKS, EXAMPLES) for path in folder.glob("*.py")}


@contextmanager
def script_modules(*folders: Path) -> Iterator[Callable[[str], Any]]:
    """Gives what imports one by its name from the first folder with it. Others so named are back afterwards."""
    others = {name: sys.modules.pop(name) for name in NAMES & sys.modules.keys()}
    try:
        with patch.object(sys, "path", [*map(str, folders), *sys.path]):
            yield import_module
    finally:
        for name in NAMES & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(others)

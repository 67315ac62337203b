"""Every attack of this folder, and what is said of it: ``PYTHONPATH=tests python tests/attacks/run_attacks.py``.

Each does to files what a fault or an enemy would, and has the words that refuse it; all are tests as well. What must
never be let through is in ``SECURITY.md``.
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

HERE = Path(__file__).resolve().parent
NAMES = sorted({path.stem for path in HERE.glob("*.py")} - {"run_attacks", "scene", "test_attacks"})


def script(name: str) -> Any:
    """The module of an attack."""
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    return importlib.import_module(name)


def main() -> int:
    """Run and print; 1 if one was let through."""
    logging.disable(logging.WARNING)
    table, let_through = Table("attack", "what is said of it", title="Attacks", show_lines=True), 0
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as place:
            try:
                said = script(name).attack(Path(place))
            except AssertionError as error:
                said, let_through = str(error), let_through + 1
        table.add_row(escape(script(name).__doc__), escape(said))
    Console().print(table)
    return int(let_through > 0)


if __name__ == "__main__":
    raise SystemExit(main())

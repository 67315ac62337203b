"""``qsvft run -- COMMAND ...``: any Python program, with the method registered before it begins."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import bad_input


def run(
    command: Annotated[
        list[str],
        typer.Argument(help="A script, a command (lm_eval), or -m and a module; then its arguments."),
    ],
) -> None:
    """Start a Python program that knows qsvft's adapters: qsvft run -- lm_eval --model hf ..."""
    with bad_input():
        path, arguments = found(command)
    sys.argv[:] = [command[0] if path is None else str(path), *arguments]
    sys.path.insert(0, "" if path is None else str(path.parent))
    import qsvft

    from .. import public

    vars(qsvft).update({name: getattr(public, name) for name in public.__all__})  # as where no command was started
    if path is None:
        runpy.run_module(command[command.index("-m") + 1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(path), run_name="__main__")


def found(command: list[str]) -> tuple[Path | None, list[str]]:
    """The program's file, None for a module, and its arguments."""
    first, *rest = command[1:] if Path(command[0]).name.startswith("python") and len(command) > 1 else command
    if first == "-m" and rest:
        return None, rest[1:]
    path = Path(first) if Path(first).is_file() else Path(shutil.which(first) or "")
    if not path.is_file():
        raise ValueError(f"{first}: found no such script or command; expected a Python program")
    if not _is_python(path):
        raise ValueError(
            f"{path}: is no Python program; expected one, which can be given the method in its own process. "
            "Of a launcher, let it start qsvft: accelerate launch -m qsvft run -- script.py."
        )
    return path, rest


def _is_python(path: Path) -> bool:
    if path.suffix in (".py", ".pyw"):
        return True
    with path.open("rb") as file:
        head = file.readline(200)
    return head.startswith(b"#!") and b"python" in head

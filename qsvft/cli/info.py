"""``qsvft info DIRECTORY``: what a prepared directory or an adapter is, whether it is whole, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import bad_input
from .library import library


def info(
    directory: Annotated[Path, typer.Argument(help="A prepared directory, or one with an adapter.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every tensor, and compare its values with those that were written.")
    ] = False,
) -> None:
    """Say what a directory holds, whether it is whole, and how to load it. Exit code 2: it is not."""
    with library(), bad_input():
        from ..info import info as lines_of

        lines = lines_of(directory, verify)
    width = max(len(name) for name, _ in lines) + 1
    for name, text in lines:
        typer.echo(f"{name + ':':<{width}} {text}")

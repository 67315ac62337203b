"""Errors as one line on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup


def complain(message: str) -> None:
    """Print one line to stderr, whatever the message's own lines."""
    typer.echo(f"qsvft: {' '.join(message.split())}", err=True)


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn what the library refuses, and what the file system does, into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        complain(str(error) or type(error).__name__)
        raise typer.Exit(2) from error


class OneLineErrors(TyperGroup):
    """A command group whose usage errors take one line, without the usage in front."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line; see click's ``Command.main``."""
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except typer.Abort:
            complain("interrupted")
            raise SystemExit(130) from None
        except Exception as error:
            # Click's usage errors; typer brings its own copy of click, so the class is not importable from one place.
            if not hasattr(error, "format_message"):
                raise
            complain(error.format_message())
            raise SystemExit(getattr(error, "exit_code", 2)) from None
        raise SystemExit(code if isinstance(code, int) else 0)

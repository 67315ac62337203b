"""The library's declared options as options of a command."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Optional, TypeVar

import typer

from ..options.option import Option

F = TypeVar("F", bound=Callable[..., Any])


def takes_options(options: Iterable[Option]) -> Callable[[F], F]:
    """Give a command that takes ``**options`` an option of its own for each that a command line can say.

    One that is not given is None, or an empty list; lists are repeated options.
    """
    shown = [one for one in options if one.kind.command is not None]

    def decorate(command: F) -> F:
        signature = inspect.signature(command, eval_str=True)
        *named, _ = signature.parameters.values()
        parameters = [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(one))
            for one in shown
        ]
        command.__signature__ = signature.replace(parameters=[*named, *parameters])  # type: ignore[attr-defined]
        # typer reads the types from here.
        command.__annotations__ = {one.name: one.annotation for one in (*named, *parameters)}
        return command

    return decorate


def _annotation(one: Option) -> Any:
    return Annotated[Optional[one.kind.command], typer.Option(help=one.help)]  # noqa: UP045

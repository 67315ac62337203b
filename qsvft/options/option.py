"""Options, each declared once: a dataclass field that carries what its readers need.

    rank: int | None = option(None, INTEGER, "Directions per layer; None for the default.",
                              "an integer of at least 1", lambda value: ..., of_factors=True, counted=True)

From there it reaches :func:`qsvft.prepare` and :func:`qsvft.from_pretrained`, ``qsvft prepare``'s command line (what a
prepared directory depends on), ``--method`` of ``qsvft profile`` and :func:`qsvft.recommend` (what the ledger counts),
the validation, and the table in ``docs/options.md``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

_KEY = "qsvft"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kind:
    """How an option is written as text.

    Attributes:
        command: its type on a command line; None where it cannot be given there.
        expected: what a text must be, in words.
        read: the value of a text; raises ValueError. None where no text says it.
    """

    command: Any
    expected: str = ""
    read: Callable[[str], Any] | None = None


def _whole_number(text: str) -> int:
    if not text.isdigit():
        raise ValueError(text)
    return int(text)


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


INTEGER = Kind(int, "a whole number of at least 1", _whole_number)
NUMBER = Kind(float)
SWITCH = Kind(bool, "true or false", _switch)
WORD = Kind(str, "a word", str)
NAMES = Kind(list[str])
NUMBERS = Kind(list[int])
TABLE = Kind(None)


@dataclass(frozen=True)
class Option:
    """A declared option.

    Attributes:
        name: of the field.
        default: where it is not given.
        kind: how it is written.
        help: what it is, in a line.
        allowed: its values in words.
        check: whether a value is one of them.
        of_factors: whether a prepared directory depends on it.
        counted: whether the ledger counts it.
    """

    name: str
    default: Any
    kind: Kind
    help: str
    allowed: str
    check: Callable[[Any], bool]
    of_factors: bool
    counted: bool

    def refuse(self, value: object, owner: str = "") -> None:
        """Raise ValueError for a value that is not allowed, naming the option."""
        if not self.check(value):
            raise ValueError(f"{owner}{self.name}: expected {self.allowed}, got {value!r}")


def option(
    default: Any,
    kind: Kind,
    help: str,
    allowed: str,
    check: Callable[[Any], bool],
    *,
    of_factors: bool = False,
    counted: bool = False,
) -> Any:
    """A dataclass field for an option; see :class:`Option`. A default that is a dict or a list is copied."""
    metadata = {"help": help, _KEY: (kind, allowed, check, of_factors, counted)}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def declared(owner: Any) -> dict[str, Option]:
    """The options of a dataclass by their names, in the order in which they are declared."""
    found = {}
    for one in fields(owner):
        if _KEY in one.metadata:
            kind, allowed, check, of_factors, counted = one.metadata[_KEY]
            default = one.default_factory() if callable(one.default_factory) else one.default
            found[one.name] = Option(one.name, default, kind, one.metadata["help"], allowed, check, of_factors, counted)
    return found


def is_integer(value: object, least: int | None = None) -> bool:
    """Whether a value is an integer (and no bool) of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def is_number(value: object) -> bool:
    """Whether a value is an integer or a float, finite, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def one_of(values: tuple[Any, ...]) -> tuple[str, Callable[[Any], bool]]:
    """The words and the check of an option that is one of some values; True is not 1 here."""
    return f"one of {', '.join(map(repr, values))}", lambda value: any(
        type(value) is type(each) and value == each for each in values
    )


def shows(*owners: Any) -> Callable[[F], F]:
    """Decorate a function that takes the options of dataclasses as ``**options``: its signature shows each of them."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        *named, rest = signature.parameters.values()
        assert rest.kind is inspect.Parameter.VAR_KEYWORD
        shown = [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default)
            for owner in owners
            for one in declared(owner).values()
        ]
        function.__signature__ = signature.replace(parameters=[*named, *shown, rest])  # type: ignore[attr-defined]
        return function

    return decorate

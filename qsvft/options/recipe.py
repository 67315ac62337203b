"""A recipe: all that a training is made of, from a YAML file and a command line, read and checked without torch."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .adapter import OPTIONS
from .run import RUN_OPTIONS, RunOptions
from .switches import SWITCHES
from .trainer_arguments import trainer_arguments

OUR_OWN = {
    "output_dir": "output",
    "resume_from_checkpoint": "output, where a run that was begun goes on",
    "model_init_kwargs": "model, revision, dtype, bits",
}
"""Arguments of a trainer that are said in other words here."""

SHARED = ("seed", "gradient_checkpointing")
"""Names that the trainer has as well: one value for both."""


@dataclass(frozen=True)
class Recipe:
    """What was given; everything else is at its default.

    Attributes:
        run: what is trained, on what, and where.
        adapter: fields of :class:`qsvft.QSVFTConfig`.
        switches: see :class:`qsvft.options.switches.Switches`.
        arguments: of TRL's ``SFTConfig`` or ``DPOConfig``.
        given: all that was given, in one table, as a recipe file says it.
    """

    run: RunOptions
    adapter: dict[str, Any] = field(default_factory=dict)
    switches: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)


def read_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
    **options: Any,
) -> Recipe:
    """Read a recipe, check every name and every value that can be checked before there is a model.

    Args:
        source: a YAML file, or the table that one holds.
        sets: texts ``NAME=VALUE`` that count more than the file, the value as YAML.
        **options: options that count more than both; None is not given.

    Raises:
        ValueError: no such file, no YAML, an unknown name (with the nearest known one), a value out of its range, no
            model, data set or output.
    """
    where, table = _table(source)
    table.update(_said(sets))
    table.update({name: value for name, value in options.items() if value is not None and value != []})
    method = table.get("method", "sft")
    RUN_OPTIONS["method"].refuse(method, where)
    theirs = trainer_arguments(method)
    for name in table:
        _check_name(where, name, theirs)
    for name in ("model", "dataset", "output"):
        if not table.get(name) and not (name == "model" and table.get("adapter")):
            raise ValueError(f"{where}{name}: found none; expected {RUN_OPTIONS[name].allowed}. Give --{name}.")
    for known in (RUN_OPTIONS, OPTIONS, SWITCHES):
        for name, one in known.items():
            if name in table:
                one.refuse(table[name], where)
    return Recipe(
        RunOptions(**{name: value for name, value in table.items() if name in RUN_OPTIONS}),
        {name: value for name, value in table.items() if name in OPTIONS},
        {name: value for name, value in table.items() if name in SWITCHES},
        {name: value for name, value in table.items() if name in SHARED or name not in _OURS},
        table,
    )


_OURS = {*RUN_OPTIONS, *OPTIONS, *SWITCHES}


def _table(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """What errors begin with, and what was found."""
    if source is None:
        return "", {}
    if isinstance(source, Mapping):
        return "recipe: ", dict(source)
    path = Path(source)
    try:
        found = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror or error}; expected a recipe, a YAML file of options such as 'model: ...'"
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path}: is no YAML ({' '.join(str(error).split())}); expected lines 'option: value'"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path}: found a {type(found).__name__}; expected lines 'option: value'")
    return f"{path}: ", found


def _said(sets: Iterable[str]) -> dict[str, Any]:
    said = {}
    for text in sets:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set {text}: expected NAME=VALUE, such as --set warmup_ratio=0.1")
        try:
            said[name.strip().replace("-", "_")] = load_yaml(value)
        except yaml.YAMLError as error:
            raise ValueError(
                f"--set {text}: {value!r} is no YAML; expected a value such as 0.1, true or [a, b]"
            ) from error
    return said


def _check_name(where: str, name: str, theirs: frozenset[str]) -> None:
    if name in OUR_OWN:
        raise ValueError(f"{where}{name}: is said in another way here; expected {OUR_OWN[name]}")
    if name in _OURS or name in theirs or not theirs:
        return
    near = difflib.get_close_matches(name, [*_OURS, *theirs], 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"{where}{name}: is no option of qsvft or of TRL's trainer.{hint}")


class _Loader(yaml.SafeLoader):
    """YAML in which 2e-2 is a number, as in every other language."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load_yaml(text: str) -> Any:
    """The value that a YAML text says."""
    return yaml.load(text, Loader=_Loader)

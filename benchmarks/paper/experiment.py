"""An experiment: a model, what it is trained on by which methods, and what it is asked; read from YAML and checked.

``like: OTHER`` begins with another file's table: tables in it are gone through name by name, ``null`` takes one away.
A file whose name begins with "_" is no experiment but what several begin with.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qsvft.options.choices import BASE_BITS
from qsvft.options.recipe import load_yaml

FOLDER = Path(__file__).with_name("experiments")
KINDS = ("language", "sentences", "images")
FULL, HEAD, OURS = "full", "head", "QSVFT"
WHOLE = (FULL, HEAD)
"""Ways that save the model itself, and no adapter of it."""
NEEDED = ("about", "kind", "model", "train", "asked", "methods")


@dataclass(frozen=True)
class Data:
    """Rows to train on.

    Attributes:
        dataset: a hub id, a directory or a file.
        config, split: of a data set of the hub; a file has the split "train".
        templates: the columns prompt and completion made of others, as ``qsvft train`` has it (language).
        first_line_of: a column that templates may name in two parts, ``first_line`` and ``rest``.
        templates_with_rest: in place of ``templates`` where there is a rest.
        columns: which columns are the text (one or two) or the image, and which the label.
        first, per_class: of the rows the first, of each class the first so many.
        seed: by which rows are drawn, in place of the first.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    templates: Mapping[str, str] | None = None
    first_line_of: str | None = None
    templates_with_rest: Mapping[str, str] | None = None
    columns: Mapping[str, Any] | None = None
    first: int | None = None
    per_class: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Asked(Data):
    """Rows that a trained model is asked.

    Attributes:
        score: how an answer is judged, a name of :data:`benchmarks.paper.scores.SCORES` or of GLUE's tasks.
        max_new_tokens, num_beams: of an answer, at most; and of the search, one is greedy.
        stop: an answer ends before the first of these.
        choices: a pattern whose group holds a prompt's choices, apart by "/"; the likeliest is then scored as well.
        says: how a choice is said.
    """

    score: str = "accuracy"
    max_new_tokens: int = 512
    num_beams: int = 1
    stop: Sequence[str] = ()
    choices: str | None = None
    says: str = "{choice}"


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: as the tables call it.
        way: "full", "head" (alone), or PEFT's name of a method: LORA, BOFT, VERA, QSVFT.
        bits: how the base is held: 16, 8 or 4.
        dtype: of its weights.
        calibration: batches that U and V come from (QSVFT).
        options: of its config.
        training: arguments of the trainer that are its own, its learning rate first of all.
        paper: what the paper has of it: ``trained`` as it writes the number, and a number by the name of what is asked.
        counts: why the paper's ``trained`` is another number than is counted here.
    """

    name: str
    way: str
    bits: int = 16
    dtype: str = "bfloat16"
    calibration: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    counts: str | None = None

    @property
    def folder(self) -> str:
        """Its name as a folder's."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Experiment:
    """See the module.

    Attributes:
        name: of its file.
        about: what it is, in a line.
        kind: "language" (asked in words), "sentences" or "images" (a class, or a number, for each).
        model: a hub id or a directory.
        shapes: what decides its sizes, where the hub is not at hand: a preset of ``qsvft profile``, or a config's
            model_type and fields.
        train, asked: data, and by name what is asked after.
        training: arguments of the trainer.
        methods: in the paper's order, ours last.
        published: the paper's rows of methods that no package here has, as a method's ``paper``.
        seeds: of the runs.
        notes: what is to be known of the numbers.
    """

    name: str
    about: str
    kind: str
    model: str
    train: Data
    asked: Mapping[str, Asked]
    methods: Mapping[str, Method]
    shapes: str | Mapping[str, Any] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    notes: Sequence[str] = ()


def names() -> list[str]:
    """The experiments that there are."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def read_experiment(name: str, change: Callable[[dict[str, Any]], None] | None = None) -> Experiment:
    """The experiment of a name, or of a file of one's own.

    Args:
        change: made to its table before it is checked.

    Raises:
        ValueError: no such experiment, an unknown field, a value that a field cannot have; the message names the
            file and the field.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    table = _table(path)
    if change is not None:
        change(table)
    missing = [one for one in NEEDED if not table.get(one)]
    if missing:
        raise ValueError(f"{path}: found no {' and no '.join(missing)}; expected {', '.join(NEEDED)}")
    where = f"{path}: "
    if table["kind"] not in KINDS:
        raise ValueError(f"{where}kind: found {table['kind']!r}; expected {', '.join(KINDS)}")
    table["train"] = _of(Data, table["train"], f"{where}train: ")
    table["asked"] = {one: _of(Asked, fields, f"{where}asked: {one}: ") for one, fields in table["asked"].items()}
    table["methods"] = {
        one: _of(Method, {"name": one, **fields}, f"{where}methods: {one}: ")
        for one, fields in table["methods"].items()
    }
    for method in table["methods"].values():
        if method.bits not in BASE_BITS:
            raise ValueError(f"{where}methods: {method.name}: bits: found {method.bits!r}; expected 16, 8 or 4")
        if method.calibration and method.way != OURS:
            raise ValueError(f"{where}methods: {method.name}: calibration: only {OURS} has it; expected 0")
    found = _of(Experiment, {"name": path.stem, **table}, where)
    assert isinstance(found, Experiment)
    return found


def _table(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        found = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.stem, names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"{path.stem}: there is no such experiment; expected {', '.join(names())}.{hint}") from None
    except Exception as error:  # of the disk, or of YAML
        raise ValueError(f"{path}: {' '.join(str(error).split())}; expected a YAML table") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found a {type(found).__name__}; expected a YAML table")
    like = found.pop("like", None)
    if like is None:
        return found
    other = path.with_name(f"{like}.yaml")
    if other in (*seen, path):
        raise ValueError(f"{path}: like: {like} goes round in a circle; expected an experiment that stands by itself")
    return merged(_table(other, (*seen, path)), found)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """One table over another: tables in both are gone through, ``None`` takes away, all else is the upper's."""
    found = copy.deepcopy(dict(below))
    for name, value in above.items():
        if value is None:
            found.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(found.get(name), Mapping):
            found[name] = merged(found[name], value)
        else:
            found[name] = copy.deepcopy(value)
    return found


def _of(kind: Any, fields: Any, where: str) -> Any:
    """A dataclass of a table, its names checked, and that a table, a text or a number stands where one has to."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where}found {fields!r}; expected a table")
    known = {one.name: one for one in dataclasses.fields(kind)}
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{where}{name}: there is no such field; expected {', '.join(known)}.{hint}")
        _check(where, name, value, str(known[name].type))
    missing = [
        one.name
        for one in known.values()
        if one.name not in fields and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}found no {' and no '.join(missing)}; expected it")
    return kind(**fields)


_SIMPLE = {"str": (str, "a text"), "int": (int, "a whole number")}


def _check(where: str, name: str, value: Any, annotation: str) -> None:
    if value is None and annotation.endswith("| None"):
        return
    for text, (kind, words) in _SIMPLE.items():
        if annotation in (text, f"{text} | None"):
            if isinstance(value, bool) or not isinstance(value, kind):
                raise ValueError(f"{where}{name}: found {value!r}; expected {words}")
            return
    if annotation.startswith("Mapping") and not isinstance(value, Mapping):
        raise ValueError(f"{where}{name}: found {value!r}; expected a table")

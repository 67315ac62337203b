"""The names of the arguments of TRL's trainers, read off its sources, so that a wrong one is found without torch."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_CLASSES = {
    "sft": (("trl", "trainer/sft_config.py", "SFTConfig"), ("trl", "trainer/base_config.py", "_BaseConfig")),
    "dpo": (("trl", "trainer/dpo_config.py", "DPOConfig"), ("trl", "trainer/base_config.py", "_BaseConfig")),
}
_OF_ALL = ("transformers", "training_args.py", "TrainingArguments")


@cache
def trainer_arguments(method: str) -> frozenset[str]:
    """The fields of ``SFTConfig`` or ``DPOConfig``; empty where the sources are laid out in another way.

    Args:
        method: "sft" or "dpo".
    """
    found = [_fields(*place) for place in (*_CLASSES[method], _OF_ALL)]
    return frozenset().union(*found) if all(found) else frozenset()


def _fields(package: str, file: str, name: str) -> set[str]:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return set()
    path = Path(spec.submodule_search_locations[0], file)
    if not path.is_file():
        return set()
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    bodies = [node.body for node in classes if node.name == name]
    annotated = [line for body in bodies for line in body if isinstance(line, ast.AnnAssign)]
    return {line.target.id for line in annotated if isinstance(line.target, ast.Name) and not _is_hidden(line)}


def _is_hidden(line: ast.AnnAssign) -> bool:
    """Whether a field is none of ``__init__``."""
    words = line.value.keywords if isinstance(line.value, ast.Call) else []
    return any(word.arg == "init" and getattr(word.value, "value", None) is False for word in words)

"""The directory of a run: whether one was begun there, by which recipe, and where it goes on."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from ..options.recipe import Recipe, load_yaml
from ..storage.whole_files import write_whole
from .checkpoints import STATE, last_whole
from .data import place_of

RECIPE, LOCK = "recipe.yaml", ".qsvft-training.lock"


def begun(folder: Path, recipe: Recipe) -> Path | None:
    """The checkpoint to go on from, None for a new run.

    Raises:
        ValueError: the directory holds something else: files that no run wrote, a run that came to its end, or one of
            another recipe.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder}: found a file; expected a directory, or nothing")
    if not folder.is_dir() or {path.name for path in folder.iterdir()} <= {LOCK}:
        return None
    if not (folder / RECIPE).is_file():
        raise ValueError(f"output {folder}: found files of something else; expected an empty directory, or none")
    if (folder / STATE).is_file():
        raise ValueError(
            f"output {folder}: found a run that came to its end; expected another place. To train on from what it "
            f"gave: --adapter {folder} --output ANOTHER."
        )
    before = load_yaml((folder / RECIPE).read_text(encoding="utf-8")) or {}
    now = load_yaml(recipe_of(recipe))
    reached = last_whole(folder)
    if reached is None:
        return None
    other = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if other:
        shown = ", ".join(f"{name}={before.get(name)!r}" for name in other)
        raise ValueError(
            f"output {folder}: found a run with {shown}; expected the same recipe, to go on with it. Give the same, or "
            "another output."
        )
    return reached


def begin(folder: Path, recipe: Recipe) -> None:
    """Write the recipe, with which the run goes on and can be done again: ``qsvft train recipe.yaml --output ...``."""
    write_whole(folder / RECIPE, recipe_of(recipe).encode())


def recipe_of(recipe: Recipe, places: bool = True) -> str:
    """A recipe as YAML; files and directories with their whole place, or by their last name alone."""
    table = {
        name: sorted(value) if isinstance(value, (set, frozenset)) else value
        for name, value in recipe.given.items()
        if name not in ("output", "cache_dir")
    }
    for name in ("model", "dataset", "eval_dataset", "adapter"):
        if table.get(name) is not None:
            place = place_of(str(table[name]))
            table[name] = place if places or not os.path.isabs(place) else os.path.basename(place)
    return str(yaml.safe_dump(table, allow_unicode=True))

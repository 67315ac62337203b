"""``qsvft train``: a base and a data set become an adapter; see :func:`qsvft.train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..options.adapter import OPTIONS
from ..options.recipe import read_recipe
from ..options.run import OFTEN_GIVEN, RUN_OPTIONS
from ..options.switches import SWITCHES
from .errors import bad_input, complain
from .library import library
from .options import takes_options


@takes_options([*RUN_OPTIONS.values(), *OFTEN_GIVEN.values(), *OPTIONS.values(), *SWITCHES.values()])
def train(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML file of options, by the names below.")] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE: any argument of TRL's SFTConfig or DPOConfig; repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    **options: Any,
) -> None:
    """Train an adapter on a data set. Interrupted, it goes on when the same is asked for again.

    What it will take is said first. Exit code 1: it began and failed; 2: it could not begin.
    """
    with bad_input():
        read = read_recipe(recipe, set or (), **options)
    with library(), bad_input():
        from ..training.train import TrainingError, train

        try:
            train(read, dry_run=dry_run, say=typer.echo)
        except TrainingError as error:
            complain(str(error))
            raise typer.Exit(130 if error.interrupted else 1) from error

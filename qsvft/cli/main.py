"""``qsvft``: the commands, gathered."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import __version__
from .errors import OneLineErrors
from .evaluate import evaluate
from .export import export_command
from .generate import generate
from .info import info
from .prepare import prepare
from .profile import profile
from .run import run
from .train import train

app = typer.Typer(
    name="qsvft", cls=OneLineErrors, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.command("eval")(evaluate)
app.command("export")(export_command)
app.command("generate")(generate)
app.command("info")(info)
app.command("prepare")(prepare)
app.command("profile")(profile)
app.command("run", context_settings={"ignore_unknown_options": True})(run)
app.command("train")(train)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qsvft {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """SVFT fine-tuning of quantised models."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())

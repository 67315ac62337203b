"""``qsvft``: the commands, gathered."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import __version__
from .errors import OneLineErrors
from .export import export_command
from .info import info
from .merge import merge
from .prepare import prepare
from .profile import profile

app = typer.Typer(
    name="qsvft", cls=OneLineErrors, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.command("export")(export_command)
app.command("info")(info)
app.command("merge")(merge)
app.command("prepare")(prepare)
app.command("profile")(profile)


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

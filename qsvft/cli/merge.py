"""``qsvft merge ADAPTER TARGET``: a trained adapter and its base become an ordinary dense checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import bad_input
from .library import library


def merge(
    adapter: Annotated[str, typer.Argument(help="A directory with an adapter, or a hub id.")],
    target: Annotated[Path, typer.Argument(help="The directory to make.")],
    base: Annotated[str | None, typer.Option(help="The base, if not the one that the adapter names.")] = None,
    factors: Annotated[
        Path | None, typer.Option(help="A prepared directory with the factors that the adapter was trained with.")
    ] = None,
    device_map: Annotated[str | None, typer.Option(help="Where the base goes: cpu, cuda, auto.")] = None,
) -> None:
    """Merge an adapter into its base: a dense checkpoint that needs neither qsvft nor PEFT."""
    with library(), bad_input():
        from ..merging import merge_adapter

        merge_adapter(adapter, target, base=base, factors=factors, device_map=device_map)
    typer.echo(f"merged: {target}")

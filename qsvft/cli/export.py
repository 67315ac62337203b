"""``qsvft export ADAPTER TARGET``: a trained adapter as a LoRA that other programs take, or as a model without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..options.choices import EXPORT_DTYPES, FORMATS, ONTO, RANKS
from .errors import bad_input
from .library import library


def export_command(
    adapter: Annotated[str, typer.Argument(help="A directory with an adapter, or a hub id.")],
    target: Annotated[Path, typer.Argument(help="The directory to make.")],
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "lora",
    rank: Annotated[
        int | None,
        typer.Option(help=f"Of a LoRA: {', '.join(map(str, RANKS))}; left out, the least that holds the whole change."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="A prepared directory or the checkpoint, if not the one that the adapter names."),
    ] = None,
    onto: Annotated[
        str, typer.Option(help=f"One of {', '.join(ONTO)}: the base as the adapter had it, or before it was rounded.")
    ] = "held",
    dtype: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(EXPORT_DTYPES)}; left out, bfloat16 of a LoRA, the base's of a model."),
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(help="A checkout of llama.cpp, whose converters write GGUF; or $LLAMA_CPP.")
    ] = None,
) -> None:
    """Write an adapter in a form that PEFT, vLLM and llama.cpp take: a LoRA, or the dense model that it makes."""
    with library(), bad_input():
        from ..exporting import export

        done = export(
            adapter,
            target,
            format=format,
            rank=rank,
            base=base,
            onto=onto,
            dtype=dtype,
            llama_cpp=llama_cpp,
            report=_show,
        )
    typer.echo(f"written: {done.folder}")


def _show(found: object) -> None:
    typer.echo(str(found))

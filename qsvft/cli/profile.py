"""``qsvft profile MODEL``: the memory of one training step of each method, before there is a GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options.choices import CARDS_GIB, DEFAULT_METHODS, METHODS, OPTIMIZERS, PRESETS
from .errors import bad_input, complain
from .library import library

if TYPE_CHECKING:
    from ..memory import MemoryReport


def profile(
    model: Annotated[str, typer.Argument(help=f"A preset ({', '.join(PRESETS)}), a directory or a hub id.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"name, name:rank or name:key=value,...; repeatable. Names: {', '.join(METHODS)}. "
            f"Default: {', '.join(DEFAULT_METHODS)}."
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 1,
    no_checkpointing: Annotated[bool, typer.Option("--no-checkpointing", help="Keep all activations.")] = False,
    optimizer: Annotated[str, typer.Option(help=f"One of {', '.join(OPTIMIZERS)}.")] = "adamw",
    card: Annotated[
        list[float] | None,
        typer.Option(
            help="A card's GiB; repeatable. Given once, the settings for this card are shown too. Default: 8 12 16 24."
        ),
    ] = None,
    max_seq_len: Annotated[
        float | None, typer.Option(metavar="GIB", help="Also find the longest sequence that fits a card of this size.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Also run each step here and compare.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write a line a method.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the peaks as stacked bars (png, pdf, svg).")] = None,
    timeline: Annotated[Path | None, typer.Option(help="Draw the live bytes over the step (png, pdf, svg).")] = None,
) -> None:
    """Predict the peak memory of one training step of each method. Needs no weights and no GPU."""
    with library():
        from ..memory import profile as profile_step
        from ..memory.measured import add_measurements, check_room, present_device
        from ..memory.profiler import checked_methods, resolve

        with bad_input():
            _check_files(json, csv, plot, timeline)
            methods = checked_methods(method if method else DEFAULT_METHODS)
            if measure:
                name, config = resolve(model)
                check_room(name, config, present_device())
            report = profile_step(
                model,
                methods,
                batch_size,
                seq_len,
                not no_checkpointing,
                optimizer,
                cards=card if card else CARDS_GIB,
                max_seq_len_gib=max_seq_len,
                progress=True,
            )
            if measure:
                add_measurements(report, config, methods, present_device())
        if card and len(card) == 1:
            _recommend(model, report)
        _show(report)
        with bad_input():
            _write(report, json, csv, plot, timeline)
    if not report.ran:
        complain("none of the methods could run")
        raise typer.Exit(1)


def _check_files(json: Path | None, csv: Path | None, plot: Path | None, timeline: Path | None) -> None:
    """Refuse an output file before the work rather than after it."""
    from ..memory.plot import check_plot
    from ..storage.whole_files import check_file_writable

    given = [path for path in (json, csv, plot, timeline) if path is not None]
    for path in given:
        check_file_writable(path)
    for picture in (plot, timeline):
        if picture is not None:
            check_plot(picture)
    places = [os.path.realpath(path) for path in given]
    twice = next((path for path, place in zip(given, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise ValueError(f"cannot write {str(twice)!r} twice; give each output a file of its own")


def _recommend(model: str, report: MemoryReport) -> None:
    """Enter the settings for the only card; where there are none to count, the tables still stand."""
    from ..memory import recommend

    fixed = {} if report.gradient_checkpointing else {"gradient_checkpointing": False}
    try:
        report.recommendation = recommend(
            model,
            report.cards[0],
            report.seq_len,
            report.batch_size,
            optimizer=report.optimizer,
            progress=True,
            **fixed,
        )
    except ValueError as error:
        complain(f"no recommendation: {error}")


def _show(report: MemoryReport) -> None:
    from rich.console import Console

    from ..memory.table import WIDTH, tables

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for part in tables(report):
        console.print(part, highlight=False)
    if report.recommendation is not None:
        console.print(f"\n{report.recommendation}", highlight=False, markup=False, soft_wrap=True)


def _write(report: MemoryReport, json: Path | None, csv: Path | None, plot: Path | None, timeline: Path | None) -> None:
    if json is not None:
        report.write_json(json)
    if csv is not None:
        report.write_csv(csv)
    if plot is not None:
        report.plot(plot)
    if timeline is not None:
        report.plot_timeline(timeline)

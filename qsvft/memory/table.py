"""The report as tables for a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .cards import CONTEXT_BYTES, FRAGMENTATION, GIB, unit_of
from .ledger import CATEGORIES
from .rows import RIVALS, Figures, Row

WIDTH = 160
"""Columns where the output is no terminal, so that nothing is folded."""


def tables(report: Figures) -> Iterator[RenderableType]:
    """The report's parts, in the order they are read."""
    yield Text(_heading(report), style="bold")
    if report.ran:
        yield _summary(report)
        yield _live_at_peak(report)
    if any(row.measured is not None for row in report.rows):
        yield _measured(report)
    for row in report.rows:
        if row.error is not None:
            yield Text(f"{row.method} could not run: {row.error}", style="red")
    yield Text(_allowance(report), style="dim")


def as_text(report: Figures) -> str:
    """The tables as plain text."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    for part in tables(report):
        console.print(part, highlight=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _heading(report: Figures) -> str:
    checkpointing = "with" if report.gradient_checkpointing else "without"
    return (
        f"{report.model}: peak memory of one training step, batch {report.batch_size} x {report.seq_len} tokens, "
        f"{checkpointing} gradient checkpointing, {report.optimizer}"
    )


def _allowance(report: Figures) -> str:
    counted = "counted without values on meta tensors" if report.device == "meta" else f"ran on {report.device}"
    lines = [
        f"The step was {counted}; 1 GiB = 2**30 bytes. A method fits a card if its peak, {FRAGMENTATION:.0%} of it for "
        f"the allocator's fragmentation and {CONTEXT_BYTES / GIB:g} GiB for the CUDA context do: what an "
        "H200 took at most, held to the memory of small cards."
    ]
    if report.max_seq_len_gib is not None and report.position_limit is not None:
        lines.append(f"The model's config gives {report.position_limit} as its longest sequence.")
    return "\n".join(lines)


def _unit(report: Figures) -> tuple[str, int]:
    return unit_of(row.peak_bytes for row in report.ran)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    return table


def _summary(report: Figures) -> Table:
    unit, size = _unit(report)
    table = _table("")
    rivals = [rival for rival in RIVALS if any(row.method == rival for row in report.ran)]
    table.add_column(f"peak\n{unit}", justify="right")
    table.add_column("trainable\nparameters", justify="right")
    for rival in rivals:
        table.add_column(f"smaller\nthan {rival}", justify="right")
    for card in report.cards:
        table.add_column(f"fits\n{card:g} GiB", justify="right")
    if report.max_seq_len_gib is not None:
        table.add_column(f"longest\non {report.max_seq_len_gib:g} GiB", justify="right")
    table.add_column("peak stands in", no_wrap=True)
    for row in report.ran:
        smaller = report.times_smaller(row)
        cells = [f"{row.peak_bytes / size:.2f}", f"{row.trainable_parameters:,}"]
        cells += [f"{smaller[rival]:.2f}x" for rival in rivals]
        cells += ["yes" if card in report.fits_gib(row) else "-" for card in report.cards]
        if report.max_seq_len_gib is not None:
            cells.append(_length(row))
        table.add_row(Text(row.method), *cells, Text(_place(row)))
    return table


def _length(row: Row) -> str:
    if row.max_seq_len is None:
        return "?"
    return f"{row.max_seq_len:,}" if row.max_seq_len else "none"


def _place(row: Row) -> str:
    """The phase and the module, without the prefixes that wrappers add."""
    module = row.peak_module
    for prefix in ("base_model.model.", "model."):
        module = module.removeprefix(prefix)
    return f"{row.peak_phase}, {module}" if module else row.peak_phase


def _live_at_peak(report: Figures) -> Table:
    unit, size = _unit(report)
    table = _table(f"Live at the peak, {unit}")
    for name in CATEGORIES:
        first, _, rest = name.partition(" ")
        table.add_column(f"{first}\n{rest}", justify="right")
    for row in report.ran:
        table.add_row(Text(row.method), *(f"{row.categories[name] / size:.2f}" for name in CATEGORIES))
    return table


def _measured(report: Figures) -> Table:
    unit, size = _unit(report)
    device = next(row.measured.device for row in report.rows if row.measured is not None)
    how = "max_memory_allocated" if device.startswith("cuda") else "the ledger on real tensors"
    table = _table(f"Predicted and measured on {device} ({how}), {unit}")
    for heading in ("predicted", "measured", "difference", "reserved"):
        table.add_column(heading, justify="right")
    for row in report.ran:
        found = row.measured
        if found is None:
            continue
        if found.error is not None:
            table.add_row(Text(row.method), f"{row.peak_bytes / size:.3f}", Text(f"could not run: {found.error}"))
            continue
        share = (found.peak_bytes - row.peak_bytes) / row.peak_bytes
        reserved = "-" if found.reserved_bytes is None else f"{found.reserved_bytes / size:.3f}"
        cells = (f"{row.peak_bytes / size:.3f}", f"{found.peak_bytes / size:.3f}", f"{share:+.2%}", reserved)
        table.add_row(Text(row.method), *cells)
    return table

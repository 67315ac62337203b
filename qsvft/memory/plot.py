"""The report as pictures: peaks as stacked bars, live bytes over the step as stacked areas.

Readable in black and white: each category has a hatch of its own beside its colour.
"""

from __future__ import annotations

import io
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..storage.whole_files import check_file_writable, write_whole
from .cards import unit_of, usable_bytes
from .ledger import CATEGORIES
from .rows import Figures, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
DPI = 150
_STYLE = {
    "base weights": ("#d9d9d9", ""),
    "other weights": ("#bdbdbd", "//"),
    "factors": ("#9ecae1", "xx"),
    "trainable": ("#fdd0a2", "\\\\"),
    "gradients": ("#fdae6b", "--"),
    "optimizer": ("#f7fcb9", "++"),
    "saved activations": ("#a1d99b", ".."),
    "logits and loss": ("#fcbba1", "||"),
    "temporaries": ("#dadaeb", "oo"),
}


def check_plot(path: str | os.PathLike[str]) -> None:
    """Find out before the work starts whether a plot can be written.

    Raises:
        ValueError: one line: matplotlib is missing, the ending is unknown, or the file cannot be written.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"cannot plot to {str(path)!r}: expected a file ending in {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib; found none. pip install matplotlib")
    check_file_writable(path)


def draw_bars(report: Figures, path: str | os.PathLike[str]) -> None:
    """Write the peak of each method as a bar of its categories, with the cards' limits as lines.

    A card's line stands at the largest peak that fits it, its allowance taken off.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    rows = report.ran
    unit, size = unit_of(row.peak_bytes for row in rows)
    figure = Figure(figsize=(4.4 + 0.95 * max(len(report.rows), 3), 5.6), layout="constrained")
    axes = figure.add_subplot()
    _bars(axes, report, size)
    top = max((row.peak_bytes for row in rows), default=1) / size
    _card_lines(axes, report, size)
    axes.set_ylim(0, 1.12 * max([top, *(usable_bytes(card) / size for card in _drawn_cards(report))]))
    axes.set_ylabel(f"peak of one training step, {unit}")
    axes.set_title(_title(report), fontsize=10, loc="left")
    _plain(axes)
    _legend(figure, axes)
    _save(figure, path)


def _bars(axes: Axes, report: Figures, size: int) -> None:
    places = range(len(report.rows))
    bottoms = [0.0] * len(report.rows)
    for name in CATEGORIES:
        colour, hatch = _STYLE[name]
        heights = [row.categories.get(name, 0) / size for row in report.rows]
        axes.bar(
            places, heights, 0.66, bottoms, label=name, color=colour, hatch=hatch, edgecolor="#333333", linewidth=0.6
        )
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, row, height in zip(places, report.rows, bottoms, strict=True):
        text = f"{height:.2f}" if row.error is None else "did\nnot run"
        # A white ground keeps the number readable where a card's line runs through it.
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
        axes.annotate(
            text,
            (place, height),
            (0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            bbox=ground,
            zorder=5,
        )
    turn = any(len(row.method) > 12 for row in report.rows)
    labels = [row.method for row in report.rows]
    axes.set_xticks(places, labels, rotation=25 if turn else 0, ha="right" if turn else "center", fontsize=9)
    axes.set_xlim(-0.6, len(report.rows) - 0.4)


def _drawn_cards(report: Figures) -> list[float]:
    """The cards whose line lies among the bars, or not far above them."""
    top = max((row.peak_bytes for row in report.ran), default=0)
    return [card for card in report.cards if 0 < usable_bytes(card) <= 1.3 * top]


def _card_lines(axes: Axes, report: Figures, size: int) -> None:
    for card in _drawn_cards(report):
        height = usable_bytes(card) / size
        axes.axhline(height, color="black", linestyle=(0, (5, 3)), linewidth=1.1, zorder=3)
        axes.annotate(
            f"{card:g} GiB card: {height:.1f}",
            (1, height),
            (4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=8,
            annotation_clip=False,
        )


def draw_timeline(report: Figures, path: str | os.PathLike[str]) -> None:
    """Write the live bytes over the step, by category, one panel a method.

    The horizontal axis counts bytes allocated and freed, so that a few large tensors are seen and a thousand small
    ones do not hide them.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    rows = report.ran
    unit, size = unit_of(row.peak_bytes for row in rows)
    across = 2 if len(rows) > 1 else 1
    down = max(math.ceil(len(rows) / across), 1)
    figure = Figure(figsize=(1.9 + 4.8 * across, 0.9 + 2.7 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    panels = [panel for line in grid for panel in line]
    for panel, row in zip(panels, rows, strict=False):
        _panel(panel, row, size)
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    figure.supylabel(f"live, {unit} (each panel on a scale of its own)", fontsize=10)
    figure.supxlabel("one training step, measured in bytes allocated and freed", fontsize=10)
    figure.suptitle(_title(report), fontsize=10)
    if rows:
        _legend(figure, panels[0])
    _save(figure, path)


def _panel(axes: Axes, row: Row, size: int) -> None:
    places = [point.moved_bytes / size for point in row.timeline]
    series = [[point.live[name] / size for point in row.timeline] for name in CATEGORIES]
    colours = [_STYLE[name][0] for name in CATEGORIES]
    areas = axes.stackplot(
        places, series, colors=colours, labels=CATEGORIES, edgecolor="#333333", linewidth=0, step="post"
    )
    for area, name in zip(areas, CATEGORIES, strict=True):
        area.set_hatch(_STYLE[name][1])
    totals = [sum(point.live.values()) for point in row.timeline]
    axes.step(places, [total / size for total in totals], where="post", color="black", linewidth=0.6)
    at = totals.index(max(totals))
    axes.plot([places[at]], [totals[at] / size], marker="v", color="black", markersize=5, clip_on=False, zorder=4)
    axes.set_title(f"{row.method}: {row.peak_bytes / size:.2f}", fontsize=9, loc="left")
    axes.set_xlim(0, places[-1] or 1)
    axes.set_ylim(0, 1.25 * row.peak_bytes / size)
    axes.set_xticks([])
    _phase_marks(axes, places, [point.phase for point in row.timeline])
    _plain(axes)


def _phase_marks(axes: Axes, places: list[float], phases: list[str]) -> None:
    starts = [at for at, phase in enumerate(phases) if at == 0 or phases[at - 1] != phase]
    for start, end in zip(starts, [*starts[1:], len(phases) - 1], strict=True):
        if start:
            axes.axvline(places[start], color="black", linestyle=":", linewidth=1)
        if places[end] - places[start] > 0.16 * places[-1]:
            middle = (places[start] + places[end]) / 2
            axes.annotate(
                phases[start], (middle, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=8
            )


def _title(report: Figures) -> str:
    checkpointing = "with" if report.gradient_checkpointing else "without"
    return (
        f"Memory of one training step: {report.model}, batch {report.batch_size} x {report.seq_len} tokens, "
        f"{checkpointing} checkpointing, {report.optimizer}"
    )


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#cccccc", linewidth=0.6)


def _legend(figure: Figure, axes: Axes) -> None:
    """The categories beside the plot, from top to bottom as they are stacked."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=9, handlelength=2.4,
        handleheight=1.6,
    )  # fmt: skip


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix.lower()[1:], dpi=DPI)
    write_whole(path, content.getvalue())

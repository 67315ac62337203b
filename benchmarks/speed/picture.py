"""The growth as a picture: a panel an axis, time and bytes over the size, both axes logarithmic."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from growth import AXES

from qsvft.storage.whole_files import write_whole

MARKS = "osv^D*PXph<"
FORMATS = (".png", ".svg", ".pdf")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time above, held bytes below, a column an axis, a line a method; in grey where the mathematics' exponent leads.

    Args:
        rows: the rows of growth.
        path: ends in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    found = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure = Figure(figsize=(3.4 * len(found), 7), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False)
    names = list(dict.fromkeys(row["method"] for row in rows))
    for column, axis in enumerate(found):
        for row in rows:
            if row["axis"] == axis:
                _lines(panels[:, column], row, MARKS[names.index(row["method"]) % len(MARKS)])
        for panel, unit in zip(panels[:, column], ("ms a step", "bytes held"), strict=True):
            panel.set(xscale="log", yscale="log", xlabel=axis, ylabel=unit)
            panel.set_xticks(sizes := next(row["sizes"] for row in rows if row["axis"] == axis), map(str, sizes))
            panel.minorticks_off()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=120)
    write_whole(path, content.getvalue())


def _lines(panels: Any, row: dict[str, Any], mark: str) -> None:
    sizes = row["sizes"]
    time = next(one for one in row["rows"] if one["unit"] == "ms")
    held = [one["values"] for one in row["rows"] if one["unit"] == "bytes"]
    panels[0].plot(sizes, time["values"], marker=mark, label=row["method"])
    panels[0].plot(sizes, [time["values"][0] * (x / sizes[0]) ** time["asked"] for x in sizes], color="0.8", zorder=0)
    if held:
        panels[1].plot(sizes, [sum(values) for values in zip(*held, strict=True)], marker=mark, label=row["method"])

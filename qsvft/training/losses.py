"""The losses of a run, as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..storage.whole_files import write_whole

_TRAINED, _HELD_OUT = "#8fa3b8", "#c2410c"


def draw_losses(history: Sequence[Mapping[str, Any]], target: Path, title: str) -> None:
    """Draw the losses of a trainer's log against its steps; those on the rows held out as points.

    Args:
        history: ``trainer.state.log_history``.
        target: a file whose name ends in png, pdf or svg; written whole.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, colour, label, mark in (("loss", _TRAINED, "trained on", ""), ("eval_loss", _HELD_OUT, "held out", "o")):
        found = [(row["step"], row[key]) for row in history if key in row]
        if found:
            steps, losses = zip(*found, strict=True)
            axes.plot(steps, losses, color=colour, label=label, marker=mark, markersize=4)
    axes.set(xlabel="steps", ylabel="loss (nats a token)", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    held = io.BytesIO()
    figure.savefig(held, format=target.suffix[1:], dpi=150)
    write_whole(target, held.getvalue())

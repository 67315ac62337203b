"""The profiler's report: printed as tables, as JSON and CSV, and as pictures."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass
from typing import Any, Protocol

from ..storage.whole_files import write_whole
from .cards import CONTEXT_BYTES, FRAGMENTATION, needed_bytes
from .ledger import CATEGORIES, PHASES
from .plot import draw_bars, draw_timeline
from .rows import RIVALS, Figures, Measurement, Row
from .table import as_text


class Advice(Protocol):
    """Settings for a card, as :func:`qsvft.recommend` gives them: printed, and as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for ``json.dumps``."""


@dataclass
class MemoryReport(Figures):
    """The memory of one training step, by method. ``print(report)`` shows it as tables.

    Attributes:
        recommendation: the settings for a card, where they were asked for.
    """

    recommendation: Advice | None = None

    def __str__(self) -> str:
        return as_text(self)

    def to_dict(self) -> dict[str, Any]:
        """The report without its timelines, as JSON knows it."""
        record: dict[str, Any] = {
            "model": self.model,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "gradient_checkpointing": self.gradient_checkpointing,
            "optimizer": self.optimizer,
            "device": self.device,
            "versions": self.versions,
            "allowance": {"context_bytes": CONTEXT_BYTES, "fragmentation": FRAGMENTATION, "measured": True},
            "cards_gib": list(self.cards),
        }
        if self.max_seq_len_gib is not None:
            record["max_seq_len_gib"] = self.max_seq_len_gib
        record["rows"] = [self._row_record(row) for row in self.rows]
        if self.recommendation is not None:
            record["recommendation"] = self.recommendation.to_dict()
        return record

    def _row_record(self, row: Row) -> dict[str, Any]:
        if row.error is not None:
            return {"method": row.method, "error": row.error}
        record: dict[str, Any] = {
            "method": row.method,
            "peak_bytes": row.peak_bytes,
            "categories": row.categories,
            "phase_peaks": row.phase_peaks,
            "peak_phase": row.peak_phase,
            "peak_module": row.peak_module,
            "trainable_parameters": row.trainable_parameters,
            "times_smaller": self.times_smaller(row),
            "needed_bytes": needed_bytes(row.peak_bytes),
            "fits_gib": self.fits_gib(row),
        }
        if row.max_seq_len is not None:
            record["max_seq_len"] = row.max_seq_len or None
        if row.measured is not None:
            record["measured"] = _measured_record(row.measured, row.peak_bytes)
        return record

    def write_json(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_dict` to a file, whole or not at all."""
        write_whole(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line a method to a file, whole or not at all. Bytes, not GiB."""
        text = io.StringIO()
        lines = [self._csv_line(row) for row in self.rows]
        writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        write_whole(path, text.getvalue().encode())

    def _csv_line(self, row: Row) -> dict[str, object]:
        ran = row.error is None
        smaller = self.times_smaller(row)
        measured = None if row.measured is None or row.measured.error else row.measured.peak_bytes
        return {
            "method": row.method,
            "peak_bytes": row.peak_bytes if ran else None,
            **{name: row.categories.get(name) for name in CATEGORIES},
            **{f"{phase} peak": row.phase_peaks.get(phase) for phase in PHASES},
            "peak_phase": row.peak_phase,
            "peak_module": row.peak_module,
            "trainable_parameters": row.trainable_parameters if ran else None,
            **{f"times smaller than {rival}": smaller.get(rival) for rival in RIVALS},
            "fits_gib": " ".join(f"{card:g}" for card in self.fits_gib(row)),
            "max_seq_len": row.max_seq_len,
            "measured_bytes": measured,
            "error": row.error,
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the peaks as stacked bars; PNG, PDF or SVG by the file's ending. Needs matplotlib."""
        draw_bars(self, path)

    def plot_timeline(self, path: str | os.PathLike[str]) -> None:
        """Draw the live bytes over the step; PNG, PDF or SVG by the file's ending. Needs matplotlib."""
        draw_timeline(self, path)


def _measured_record(measured: Measurement, predicted: int) -> dict[str, Any]:
    if measured.error is not None:
        return {"device": measured.device, "error": measured.error}
    record: dict[str, Any] = {
        "device": measured.device,
        "peak_bytes": measured.peak_bytes,
        "difference_bytes": measured.peak_bytes - predicted,
        "ledger_bytes": measured.ledger_bytes,
    }
    if measured.reserved_bytes is not None:
        record["reserved_bytes"] = measured.reserved_bytes
    return record

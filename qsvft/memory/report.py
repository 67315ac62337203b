"""What the profiler found: a row a method, which cards it fits, and the same as JSON and CSV.

Bytes are bytes and 1 GiB is 2**30 of them. A row's categories are what is live at its peak; they add up
to the peak exactly.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .ledger import CATEGORIES, PHASES, Event, Ledger

if TYPE_CHECKING:
    from .fit.recommend import Recommendation

GIB = 2**30
CARDS_GIB: tuple[float, ...] = (8, 12, 16, 24)

CONTEXT_BYTES = 3 * GIB // 4
"""What a process holds on a card beside its tensors: 0.75 GiB.

The CUDA context and the loaded kernels of torch, cuBLAS and bitsandbytes take 0.3 to 0.5 GiB, cuBLAS
workspaces some tens of MiB, a desktop on the same card the rest. Assumed, not measured on a card.
"""

FRAGMENTATION = 0.04
"""Share of the peak that the caching allocator holds beyond the live tensors.

Blocks are split and rounded (to 2 MiB above 1 MiB), and free blocks of the wrong size cannot be used.
Training steps repeat the same sizes, which keeps the share small. Assumed, not measured on a card.
"""

RIVALS = ("svft", "lora", "qlora")
TIMELINE_POINTS = 1200


@dataclass
class Measurement:
    """One real step of a method: bytes by the ledger, and by CUDA's allocator where there is one."""

    device: str
    ledger_bytes: int = 0
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    error: str | None = None

    @property
    def peak_bytes(self) -> int:
        """``torch.cuda.max_memory_allocated``, or the ledger's peak where there is no CUDA."""
        return self.ledger_bytes if self.allocated_bytes is None else self.allocated_bytes


@dataclass
class Point:
    """The live bytes by category at one point of a step, after ``moved_bytes`` were allocated and freed."""

    moved_bytes: int
    phase: str
    live: dict[str, int]


@dataclass
class Row:
    """One method's step. With ``error`` set the method could not run, and the rest is empty.

    ``timeline`` holds about 1200 points of the step in order, the highest one of each stretch.
    ``max_seq_len`` is 0 where not even the shortest sequence fits, None where it was not asked for.
    """

    method: str
    peak_bytes: int = 0
    categories: dict[str, int] = field(default_factory=dict)
    phase_peaks: dict[str, int] = field(default_factory=dict)
    peak_phase: str = ""
    peak_module: str = ""
    trainable_parameters: int = 0
    timeline: list[Point] = field(default_factory=list, repr=False)
    max_seq_len: int | None = None
    measured: Measurement | None = None
    error: str | None = None


def row_of(method: str, ledger: Ledger, trainable: int) -> Row:
    """Read a ledger off into a row."""
    peaks = ledger.peaks()
    total = peaks["total"]
    return Row(
        method=method,
        peak_bytes=total.nbytes,
        categories=total.categories,
        phase_peaks={phase: peaks[phase].nbytes for phase in PHASES},
        peak_phase=total.phase,
        peak_module=total.module,
        trainable_parameters=trainable,
        timeline=thinned(ledger),
    )


def thinned(ledger: Ledger, points: int = TIMELINE_POINTS) -> list[Point]:
    """The highest point of each stretch of a step, so that a long step stays small and its peak is kept."""
    events = ledger.events[: _end_of_step(ledger.events)]
    stretch = sum(abs(event.nbytes) for event in events if event.phase in PHASES) / points
    live = dict.fromkeys(CATEGORIES, 0)
    kept: list[Point] = []
    total = highest = moved = 0
    for event in events:
        live[event.allocation.category] += event.nbytes
        total += event.nbytes
        if event.phase not in PHASES:
            continue
        if not kept or event.phase != kept[-1].phase or moved - kept[-1].moved_bytes >= stretch:
            kept.append(Point(moved, event.phase, dict(live)))
            highest = total
        elif total > highest:
            kept[-1].live = dict(live)
            highest = total
        moved += abs(event.nbytes)
    return kept


def _end_of_step(events: list[Event]) -> int:
    """Where the step ends: what is only freed after the optimizer's last allocation is the taking down."""
    end = len(events)
    while end and events[end - 1].phase == "optimizer" and events[end - 1].nbytes < 0:
        end -= 1
    return end


def needed_bytes(peak_bytes: int) -> int:
    """What a card has to have for a peak: the peak, fragmentation and the CUDA context."""
    return peak_bytes + round(FRAGMENTATION * peak_bytes) + CONTEXT_BYTES


def usable_bytes(card_gib: float) -> int:
    """The largest peak that fits a card of ``card_gib`` GiB, up to rounding."""
    return int((card_gib * GIB - CONTEXT_BYTES) / (1 + FRAGMENTATION))


def fits(peak_bytes: int, card_gib: float) -> bool:
    """Whether a peak fits a card of ``card_gib`` GiB, allowance included."""
    return needed_bytes(peak_bytes) <= card_gib * GIB


@dataclass
class MemoryReport:
    """The memory of one training step, by method. ``print(report)`` shows it as tables.

    Attributes:
        model: what was profiled.
        batch_size, seq_len: sequences a step, tokens a sequence.
        device: "meta" where the bytes were counted without values, else where the step ran.
        cards: card sizes in GiB that ``fits`` is stated for.
        rows: one for each method, in the order asked for.
        max_seq_len_gib: the card in GiB that ``Row.max_seq_len`` is stated for, or None.
        position_limit: the longest sequence that the model's config says it is made for, or None.
        recommendation: the settings for a card, where they were asked for.
    """

    model: str
    batch_size: int
    seq_len: int
    gradient_checkpointing: bool
    optimizer: str
    device: str
    versions: dict[str, str]
    rows: list[Row]
    cards: tuple[float, ...] = CARDS_GIB
    max_seq_len_gib: float | None = None
    position_limit: int | None = None
    recommendation: Recommendation | None = None

    @property
    def ran(self) -> list[Row]:
        """The rows of the methods that could run."""
        return [row for row in self.rows if row.error is None]

    def fits_gib(self, row: Row) -> list[float]:
        """The cards, in GiB, that a row fits with the allowance."""
        return [card for card in self.cards if row.error is None and fits(row.peak_bytes, card)]

    def times_smaller(self, row: Row) -> dict[str, float]:
        """How many times smaller a row's peak is than that of each rival in the report."""
        peaks = {other.method: other.peak_bytes for other in self.ran}
        if row.error is not None:
            return {}
        return {rival: peaks[rival] / row.peak_bytes for rival in RIVALS if rival in peaks}

    def __str__(self) -> str:
        from .table import as_text

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
            "allowance": {"context_bytes": CONTEXT_BYTES, "fragmentation": FRAGMENTATION, "measured": False},
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
        from .plot import draw_bars

        draw_bars(self, path)

    def plot_timeline(self, path: str | os.PathLike[str]) -> None:
        """Draw the live bytes over the step; PNG, PDF or SVG by the file's ending. Needs matplotlib."""
        from .plot import draw_timeline

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


def unit_of(sizes: Iterable[int]) -> tuple[str, int]:
    """GiB, or MiB where nothing reaches a GiB: the unit's name and its bytes."""
    return ("GiB", GIB) if max(sizes, default=0) >= GIB else ("MiB", 2**20)


def check_cards(cards: Sequence[float], what: str = "card") -> tuple[float, ...]:
    """Card sizes in GiB, each once and in order; whole ones as int.

    Raises:
        ValueError: a size that is no positive number.
    """
    for card in cards:
        if isinstance(card, bool) or not isinstance(card, (int, float)) or not 0 < card < 2**20:
            raise ValueError(f"{what}: expected a size in GiB above 0, got {card!r}")
    return tuple(sorted({int(card) if card == int(card) else card for card in cards}))


# --- files ----------------------------------------------------------------------------------------


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out before the work starts whether :func:`write_whole` can write a file.

    Raises:
        ValueError: one line with the path and what stands in the way.
    """
    final = os.path.realpath(path)
    folder = os.path.dirname(final)
    if os.path.exists(final) and not os.path.isfile(final):
        raise ValueError(f"cannot write {str(path)!r}: it exists and is no regular file")
    if not os.path.isdir(folder):
        raise ValueError(f"cannot write {str(path)!r}: there is no directory {folder!r}")
    if not os.access(folder, os.W_OK | os.X_OK) or (os.path.exists(final) and not os.access(final, os.W_OK)):
        raise ValueError(f"cannot write {str(path)!r}: permission denied")


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically: a reader, or a crash, finds the old content or the new, never a part."""
    check_writable(path)
    final = os.path.realpath(path)
    staging = os.path.join(os.path.dirname(final), f".{os.path.basename(final)[:200]}.{os.getpid()}")
    try:
        with open(staging, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, final)
    finally:
        if os.path.exists(staging):
            os.unlink(staging)

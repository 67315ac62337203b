"""What the profiler found, as data: a row a method, and which cards it fits.

Bytes are bytes and 1 GiB is 2**30 of them. A row's categories are what is live at its peak; they add up
to the peak exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..options.choices import CARDS_GIB
from .cards import fits
from .ledger import CATEGORIES, PHASES, Event, Ledger

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


@dataclass
class Figures:
    """The memory of one training step, by method.

    Attributes:
        model: what was profiled.
        batch_size, seq_len: sequences a step, tokens a sequence.
        device: "meta" where the bytes were counted without values, else where the step ran.
        cards: card sizes in GiB that ``fits`` is stated for.
        rows: one for each method, in the order asked for.
        max_seq_len_gib: the card in GiB that ``Row.max_seq_len`` is stated for, or None.
        position_limit: the longest sequence that the model's config says it is made for, or None.
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

"""The rows as tables: on the terminal, and as results.md beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from results import read
from rich.console import Console
from rich.table import Table

GIB, MIB = 2**30, 2**20
COLUMNS = (
    "model",
    "tokens",
    "method",
    "predicted",
    "allocated",
    "difference",
    "reserved",
    "step ms (p20 to p80)",
    "tokens/s",
    "x qlora",
)
Header = dict[str, Any]
Line = dict[str, Any]


def newest(path: Path) -> tuple[Header | None, list[Line]]:
    """The header of the newest run in a file, and the latest row of each case of its commit and fingerprint."""
    found = list(read(path))
    headers = [row for row in found if row.get("kind") == "run"]
    if not headers:
        return None, []
    last = headers[-1]
    rows = [r for r in found if "case" in r and all(r.get(k) == last.get(k) for k in ("commit", "fingerprint"))]
    return last, list({row["case"]: row for row in rows}.values())


def write_summary(folder: Path) -> None:
    """Print the tables and write results.md; say so where there is nothing yet."""
    found = {stage: newest(folder / f"{stage}.jsonl") for stage in ("tests", "memory", "speed")}
    header = next((h for h, _ in reversed(found.values()) if h is not None), None)
    if header is None:
        print(f"no results in {folder}")
        return
    lines, notes = table(found["memory"][1], found["speed"][1])
    unit = "MiB" if header["rehearsal"] else "GiB"
    text = [title(header), "", *about(header)]
    older = {stage: h["commit"] for stage, (h, _) in found.items() if h and h["commit"] != header["commit"]}
    text += [f"- {stage}: commit {number}" for stage, number in older.items()]
    text += [""]
    if lines:
        text += [f"Bytes in {unit}; batch 1, gradient checkpointing. {LEGEND}", ""]
        text += [f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(['---', '---:', '---', *['---:'] * 7])}|"]
        text += [f"| {' | '.join(line)} |" for line in lines]
        text += ["", *[f"- {note}" for note in notes], *([""] if notes else [])]
    text += [*tests_text(found["tests"][1])]
    (folder / "results.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    shown = Table(title=title(header).lstrip("# "))
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in ("model", "method") else "right")
    for line in lines:
        shown.add_row(*line)
    console = Console(width=140)
    if lines:
        console.print(shown)
    for note in (*notes, *tests_text(found["tests"][1])):
        console.print(note, markup=False, highlight=False)


LEGEND = (
    "Predicted is the ledger's peak on the meta device, allocated and reserved are the allocator's peaks over one step "
    "(eager AdamW, no autocast). Times are steps under bf16 autocast with fused AdamW; x qlora is the ratio to qlora's "
    "median in the same run. The singular vectors of svft and qsvft are random numbers of the right shape."
)


def title(header: Header) -> str:
    kind = "rehearsal, not a measurement" if header["rehearsal"] else header["machine"]["card"]
    return f"# GPU suite: {kind}"


def about(header: Header) -> list[str]:
    machine, versions = header["machine"], header["versions"]
    card = f"{machine['card']}"
    if "driver" in machine:
        card += f", {machine['memory_bytes'] / GIB:.1f} GiB, driver {machine['driver']}, CUDA {machine['cuda']}"
    installed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return [f"- {card}; {machine['system']}", f"- {installed}", f"- commit {header['commit']}, run {header['run']}"]


def table(memory: list[Line], speed: list[Line]) -> tuple[list[list[str]], list[str]]:
    """The lines of the table, and a note for each case without numbers."""
    by_case: dict[str, dict[str, Line]] = {}
    for stage, rows in (("memory", memory), ("speed", speed)):
        for row in rows:
            by_case.setdefault(row["case"], {})[stage] = row
    models = list(dict.fromkeys(row["model"] for row in (*memory, *speed)))
    any_row = {case: next(iter(rows.values())) for case, rows in by_case.items()}
    order = sorted(by_case, key=lambda case: (models.index(any_row[case]["model"]), any_row[case]["seq_len"]))
    lines = [_line(any_row[case], **by_case[case]) for case in order]
    notes = [
        f"{stage}: {case}: {row['status']}: {row['reason']}"
        for case in order
        for stage, row in by_case[case].items()
        if "reason" in row
    ]
    return lines, notes


def _line(row: Line, memory: Line | None = None, speed: Line | None = None) -> list[str]:
    memory, speed = memory or {}, speed or {}
    unit = MIB if row["rehearsal"] else GIB
    predicted, difference = row.get("predicted_bytes"), memory.get("difference_bytes")
    share = "" if difference is None else f"{difference / predicted:+.2%}"
    median = speed.get("median_ms")
    return [
        row["model"],
        str(row["seq_len"]),
        row["method"],
        _size(predicted, unit),
        _size(memory.get("allocated_bytes"), unit),
        share,
        _size(memory.get("reserved_bytes"), unit),
        "" if median is None else f"{median:.1f} ({speed['p20_ms']:.1f} to {speed['p80_ms']:.1f})",
        "" if median is None else f"{speed['tokens_per_s']:.0f}",
        "" if speed.get("times_qlora") is None else f"{speed['times_qlora']:.2f}",
    ]


def _size(nbytes: int | None, unit: int) -> str:
    return "" if nbytes is None else f"{nbytes / unit:.3f}"


def tests_text(rows: list[Line]) -> list[str]:
    """How many tests ended how, and those that failed."""
    if not rows:
        return []
    counts = {status: sum(row["status"] == status for row in rows) for status in ("passed", "failed", "skipped")}
    text = [f"Tests: {', '.join(f'{count} {status}' for status, count in counts.items())}."]
    return text + [f"- failed: {row['case']}: {row['reason']}" for row in rows if row["status"] == "failed"]

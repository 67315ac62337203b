"""The rows as tables: on the terminal, and as results.md beside them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cases import GIB, QLORA, search_case, step_case
from results import FAILED, FILE, RAN, Row, read
from rich.console import Console

MIB = 2**20
Table = tuple[Sequence[str], list[list[str]]]


def newest(path: Path) -> tuple[Row | None, list[Row]]:
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
    header, rows = newest(folder / FILE)
    if header is None:
        print(f"no results in {folder}")
        return
    text = [title(header), "", *about(header), ""]
    for heading, table in tables(rows):
        text += [f"## {heading}", "", *as_markdown(table), ""]
    text += notes(rows)
    (folder / "results.md").write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")
    Console(width=200, highlight=False).print("\n".join(text), markup=False)


def title(header: Row) -> str:
    kind = "rehearsal, not a measurement" if header["rehearsal"] else header["machine"]["card"]
    return f"# On a card: {kind}"


def about(header: Row) -> list[str]:
    machine, versions = header["machine"], header["versions"]
    card = f"{machine['card']}"
    if "driver" in machine:
        card += f", {machine['memory_bytes'] / GIB:.1f} GiB, driver {machine['driver']}, CUDA {machine['cuda']}"
    installed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return [f"- {card}; {machine['system']}", f"- {installed}", f"- commit {header['commit']}, run {header['run']}"]


def tables(rows: list[Row]) -> Iterable[tuple[str, Table]]:
    """Each stage's table under its heading, as far as there are rows."""
    made = (
        ("The card and the CPU, relative differences", tiny(rows)),
        ("A training step", steps(rows)),
        ("The longest sequence", longest(rows)),
        ("Decomposing a weight", decompositions(rows)),
        ("Decomposing a model", models(rows)),
    )
    return ((heading, table) for heading, table in made if table[1])


def as_markdown(table: Table) -> list[str]:
    columns, lines = table
    left = {"model", "method", "form", "way", "matrix", "variant"}
    rule = "|".join("---" if column in left else "---:" for column in columns)
    return [f"| {' | '.join(columns)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]


def of(rows: list[Row], stage: str) -> list[Row]:
    return [row for row in rows if row["stage"] == stage and row["status"] in (RAN, FAILED)]


def tiny(rows: list[Row]) -> Table:
    found = [row for row in of(rows, "tiny") if "differences" in row]
    kinds = list(found[0]["differences"]) if found else []
    lines = [[row["case"].split(" | ")[1], *(f"{row['differences'][kind]:.0e}" for kind in kinds)] for row in found]
    bounds = [["bound", *(f"{found[0]['bounds'][kind]:.0e}" for kind in kinds)]] if found else []
    return ("form", *kinds), lines + bounds


STEP_COLUMNS = (
    *("model", "tokens", "method", "predicted", "allocated", "difference", "reserved"),
    *("step ms (p20 to p80)", "tokens/s", "x qlora"),
)


def steps(rows: list[Row]) -> Table:
    """Bytes in GiB, in a rehearsal in MiB. Ratios are to qlora's median of the same run."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["stage"] in ("memory", "speed") and row["status"] == RAN:
            by_case.setdefault(step_case(row["model"], row["method"], row["seq_len"]), {})[row["stage"]] = row
    known = {row["case"]: row for row in of(rows, "predictions") if row["status"] == RAN}
    base = {
        (row["model"], row["seq_len"], row["run"]): row["median_ms"]
        for row in of(rows, "speed")
        if row["method"] == QLORA and row["status"] == RAN
    }
    lines = []
    for case, measured in by_case.items():
        row = next(iter(measured.values()))
        memory, speed = measured.get("memory", {}), measured.get("speed", {})
        predicted = known.get(f"predictions | {case}", {}).get("predicted_bytes")
        unit = MIB if row["rehearsal"] else GIB
        allocated, median = memory.get("allocated_bytes"), speed.get("median_ms")
        reference = base.get((row["model"], row["seq_len"], speed.get("run")))
        lines.append(
            [
                *(row["model"], str(row["seq_len"]), row["method"]),
                *(_size(predicted, unit), _size(allocated, unit)),
                "" if None in (predicted, allocated) else f"{allocated / predicted - 1:+.2%}",
                _size(memory.get("reserved_bytes"), unit),
                "" if median is None else f"{median:.1f} ({speed['p20_ms']:.1f} to {speed['p80_ms']:.1f})",
                "" if median is None else f"{speed['tokens_per_s']:.0f}",
                "" if None in (median, reference) else f"{median / reference:.2f}",
            ]
        )
    return STEP_COLUMNS, lines


def longest(rows: list[Row]) -> Table:
    known = {row["case"]: row for row in of(rows, "predictions") if row["status"] == RAN}
    lines = []
    for row in of(rows, "longest"):
        if row["status"] == RAN:
            case = search_case(row["model"], row["method"], row["card_bytes"])
            predicted = known.get(f"predictions | {case}", {}).get("predicted_tokens")
            least = row["shortest_that_does_not"]
            card = f"{row['card_bytes'] / GIB:g} GiB"
            fits = f"{row['longest_that_fits']}{'' if least else ' or more'}"
            lines.append([row["model"], card, row["method"], _text(predicted), fits, _text(least)])
    return ("model", "card", "method", "predicted", "fits", "does not fit"), lines


def decompositions(rows: list[Row]) -> Table:
    lines = []
    for row in of(rows, "decomposition"):
        if row["status"] == RAN and "decompose_s" in row:
            shape = "{} x {}".format(*row["shape"])
            scale = "" if row["scale_s"] is None else f"{row['scale_s']:.2f}"
            numbers = [f"{row['decompose_s']:.2f}", scale, f"{row['orthogonality']:.0e}", f"{row['error']:.2g}"]
            lines.append([shape, row["way"], str(row["rank"]), *numbers])
    return ("matrix", "way", "rank", "s", "scale, s", "orthogonality", "error"), lines


def models(rows: list[Row]) -> Table:
    lines = [
        [row["way"], str(row["layers"]), f"{row['minutes']:.2f}"]
        for row in of(rows, "decomposition")
        if "minutes" in row
    ]
    return ("way", "layers", "minutes"), lines


def notes(rows: list[Row]) -> list[str]:
    """What the tables leave out: the CPU's agreement, tests, and the reason of every case without a result."""
    text = []
    for row in of(rows, "decomposition"):
        if "bf16_equal" in row:
            share, moved = row["bf16_equal"], row["map_change"]
            text.append(
                f"- {row['way']}: {share:.4%} of the CPU's bf16 entries are the same; a map moves by {moved:.0e}"
            )
    tests = [row for row in rows if row["stage"] == "tests"]
    counts = {status: sum(row["status"] == status for row in tests) for status in ("passed", "failed", "skipped")}
    if tests:
        text.append(f"- tests: {', '.join(f'{count} {status}' for status, count in counts.items())}")
    unhappy = [row for row in rows if "reason" in row and row["status"] != "skipped"]
    return text + [f"- {row['case']}: {row['status']}: {row['reason']}" for row in unhappy]


def _size(nbytes: int | None, unit: int) -> str:
    return "" if nbytes is None else f"{nbytes / unit:.3f}"


def _text(number: int | None) -> str:
    return "" if number is None else str(number)

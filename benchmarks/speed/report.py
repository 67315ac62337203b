"""The results as tables that a person reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
RIGHT = ("ms", "ratio", "floor", "GFLOP", "MB", "tokens/s", "found", "asked", "p20 to p80", "of it", "of the floor")


def show(rows: Sequence[Row], console: Console) -> None:
    """Every table that there are rows for."""
    for table in tables(rows):
        console.print(table)


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Layers and steps, floors, growth; then what failed."""
    by_stage: dict[str, list[Row]] = {}
    for row in rows:
        by_stage.setdefault(row["stage"] if row["status"] == "ran" else "failed", []).append(row)
    for stage in ("layer", "step", "compiled", "grouped"):
        for row in by_stage.get(stage, ()):
            yield _methods(row)
    for row in by_stage.get("roof", ()):
        table = _table("the machine's roof, measured", "what", "found")
        table.add_row("bf16 products", f"{row['flops'] / 1e9:,.0f} GFLOP/s")
        table.add_row("copies", f"{row['bandwidth'] / 1e9:,.1f} GB/s")
        yield table
    for stage in ("floor", "floor of a step"):
        for row in by_stage.get(stage, ()):
            yield _floor(row)
    if "growth" in by_stage:
        yield _growth(by_stage["growth"])
    if "failed" in by_stage:
        table = _table("without a result", "case", "why")
        for row in by_stage["failed"]:
            table.add_row(row["case"], row.get("reason", row["status"]))
        yield table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in RIGHT else "left")
    return table


def _methods(row: Row) -> Table:
    table = _table(row["case"], "method", "ms", "p20 to p80", "ratio", "p20 to p80")
    for name, one in row["methods"].items():
        table.add_row(
            name,
            f"{one['median_ms']:.2f}",
            f"{one['p20_ms']:.2f} to {one['p80_ms']:.2f}",
            f"{one['ratio']:.3f}",
            f"{one['ratio_p20']:.3f} to {one['ratio_p80']:.3f}",
        )
    for name, reason in row["refused"].items():
        table.add_row(name, "", reason)
    return table


def _floor(row: Row) -> Table:
    table = _table(row["case"], "part", "when", "GFLOP", "MB", "ms", "floor", "of the floor")
    for part in row["parts"]:
        table.add_row(
            part["part"],
            part.get("when", ""),
            f"{part['flops'] / 1e9:.2f}",
            f"{part['bytes'] / 1e6:.1f}",
            f"{part['median_ms']:.2f}",
            f"{part['floor_ms']:.2f}",
            "" if part["over"] is None else f"{part['over']:.2f}",
        )
    whole = row["whole"]
    if "between_ms" in whole:
        table.add_row("between the parts", "", "", "", f"{whole['between_ms']:.2f}", "", "")
    table.add_section()
    values = (f"{whole[key]:.2f}" for key in ("median_ms", "floor_ms", "over"))
    table.add_row("whole", "", "", "", *values)
    if "operators" in row:
        same = "as written" if row["flops_done"] == row["flops_counted"] else f"written {row['flops_done']:,}"
        operators = ", ".join(f"{count} {name}" for name, count in row["operators"].items())
        table.caption = f"run: {row['flops_counted']:,} flops ({same}); operators: {operators}"
    return table


def _growth(rows: Sequence[Row]) -> Table:
    table = _table("growth: exponents", "method", "along", "of", "found", "asked")
    for row in rows:
        for one in row["rows"]:
            of = f"{one['of']}, {one['unit']}"
            table.add_row(row["method"], row["axis"], of, f"{one['exponent']:.2f}", f"{one['asked']:.2f}")
    return table

"""The page on the paper: its tables are the experiments' numbers, cell by cell."""

from __future__ import annotations

import json
import sys

import pytest
from code_blocks import ROOT
from pages import tables

from benchmarks.paper.experiment import names, read_experiment

sys.path.insert(0, str(ROOT / "docs"))
import paper_tables

PAGE = paper_tables.PAGE.read_text(encoding="utf-8")
SHOWN = paper_tables.tables()
PRINTED = [
    pytest.param(columns, id=name)
    for name, columns in SHOWN.items()
    if any(method.paper for method in read_experiment(columns[0].experiment).methods.values())
]


def table_of(columns):
    """The table of the page with these columns whose first rows are of these methods."""
    methods = list(read_experiment(columns[0].experiment).methods)
    headings = {"method", "trained, by the paper", *(one.heading for one in columns)}
    for found in tables(paper_tables.PAGE):
        rows = {row["method"]: row for row in found if "method" in row}
        if headings <= found[0].keys() and list(rows)[: len(methods)] == methods and counts(columns) == said(rows):
            return rows
    raise AssertionError(f"no table of {columns}")


def counts(columns):
    methods = read_experiment(columns[0].experiment).methods.values()
    return [method.paper.get("trained", "") for method in methods]


def said(rows):
    return [row["trained, by the paper"] for row in rows.values() if row["ours"] != "no package"]


@pytest.mark.parametrize("columns", PRINTED)
def test_a_cell_is_the_papers_number_in_the_experiments_file(columns):
    rows = table_of(columns)
    for column in columns:
        for method in read_experiment(column.experiment).methods.values():
            cell, number = rows[method.name][column.heading], method.paper.get(column.asked)
            assert cell == ("" if number is None else f"{number:.2f}"), f"{method.name}: {column.heading}"


def test_each_experiment_is_in_a_table_and_pica_in_those_of_the_same_models():
    shown = {column.experiment for columns in SHOWN.values() for column in columns}
    assert shown == {name for name in names() if not name.startswith("pica")}
    for model in ("gemma-2b", "gemma-7b", "llama-3-8b"):
        (columns,) = [columns for name, columns in SHOWN.items() if name == f"table-1-{model}"]
        rows = table_of(columns)
        for name, numbers in read_experiment(f"pica-{model}").published.items():
            assert [rows[name][one] for one in ("GSM8K", "MATH")] == [
                f"{numbers[one]:.2f}" for one in ("GSM8K", "MATH")
            ]
            assert rows[name]["ours"] == "no package"


def test_the_means_of_commonsense_are_the_ones_that_the_paper_prints():
    printed = {
        "table-2-gemma-7b": [84.19, 83.69, 83.00, 82.59, 79.70, 81.46, 80.85, 83.35],
        "table-8-gemma-2b": [67.45, 62.43, 64.40, 49.22, 50.23, 55.81, 55.52, 55.81, 65.86],
    }
    for name, means in printed.items():
        rows = table_of(SHOWN[name])
        found = [float(row["mean"]) for row in rows.values() if row["mean"]]
        assert found == means


def test_the_tables_are_those_that_the_experiments_make():
    assert paper_tables.page_with_tables(PAGE) == PAGE, "python docs/paper_tables.py writes them anew"


def test_nothing_is_measured_that_no_file_has():
    measured = list(paper_tables.RESULTS.glob("*/results.json"))
    cells = [row["ours"] for found in tables(paper_tables.PAGE) if "ours" in found[0] for row in found]
    assert cells and (set(cells) <= {"not run", "no package"}) == (not measured)


def test_what_was_measured_stands_in_the_order_of_the_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_tables, "RESULTS", tmp_path)
    columns = SHOWN["table-1-gemma-2b"]
    folder = tmp_path / "table-1-gemma-2b"
    folder.mkdir()
    runs = [
        {"method": "LoRA r=1", "scores": {"GSM8K": {"accuracy": value}, "MATH": {"accuracy": 3.0}}}
        for value in (40.0, 41.0)
    ] + [{"method": "LoRA r=32", "scores": {"GSM8K": {"accuracy": 50.0}}}]
    (folder / "results.json").write_text(json.dumps(runs), encoding="utf-8")
    ours = {row[0]: row[-1] for row in paper_tables.rows(columns)}
    assert ours["LoRA r=1"] == "40.50 / 3.00"
    assert ours["LoRA r=32"] == "50.00 / not run"
    assert ours["qsvft"] == "not run"


def test_a_table_without_a_mark_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"found no mark of table-6; expected <!-- table-6: written by"):
        paper_tables.page_with_tables(PAGE.replace("<!-- table-6:", "<!-- table-7:"))

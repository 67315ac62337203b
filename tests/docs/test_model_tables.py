"""The tables of models and trainers say what the tests try, cell by cell."""

from __future__ import annotations

import sys

import pytest
import test_models
import test_trainers
from code_blocks import ROOT
from pages import table_with
from test_architectures import ARCHITECTURES

sys.path.insert(0, str(ROOT / "docs"))
import model_tables

PAGE = model_tables.PAGE.read_text(encoding="utf-8")
TABLES = {"model": test_models, "trainer": test_trainers}


@pytest.mark.parametrize("heading", TABLES)
def test_each_yes_has_a_test_and_each_test_a_yes(heading):
    rows = table_with("docs/models.md", heading)
    for column, test in TABLES[heading].COLUMNS.items():
        said = {row[heading].strip("`") for row in rows if row[column] == "yes"}
        assert said == model_tables.tried(test), column
        assert all(row[column] for row in rows), f"{column}: an empty cell says why"


@pytest.mark.parametrize("heading", TABLES)
def test_each_test_of_its_file_is_a_column(heading):
    tests = {name for name in vars(TABLES[heading]) if name.startswith("test_")}
    assert {test.__name__ for test in TABLES[heading].COLUMNS.values()} == tests


def test_the_tables_are_those_that_the_tests_make():
    assert model_tables.page_with_tables(PAGE) == PAGE, "python docs/model_tables.py writes them anew"


def test_the_page_names_the_language_models_of_one_flow():
    (said,) = [part for part in PAGE.split("\n\n") if part.startswith("Language models")]
    assert said.partition("`): ")[2].rstrip(".").replace("\n", " ").split(", ") == [*ARCHITECTURES]

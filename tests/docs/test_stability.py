"""What docs/stability.md promises is what there is: names, commands, and files of an earlier version."""

import json
import re

from code_blocks import ROOT
from pages import table_with
from typer.main import get_command

import qsvft
from qsvft.checkpoint.prepared.quantizer import FORMAT_VERSION
from qsvft.cli.main import app
from qsvft.version import __version__

PAGE = "docs/stability.md"


def in_code(cell):
    return re.findall(r"`([^`]+)`", cell)


def test_the_names_of_the_page_are_the_public_ones():
    names = [name for row in table_with(PAGE, "name", "what it is") for name in in_code(row["name"])]
    assert len(names) == len(set(names))
    assert set(names) == set(qsvft.__all__)
    assert [name for name in names if not hasattr(qsvft, name)] == []


def test_the_commands_of_the_page_are_those_there_are():
    [column] = [heading for heading in table_with(PAGE, "command")[0] if heading != "command"]
    rows = {in_code(row["command"])[0]: row[column] for row in table_with(PAGE, "command", column)}
    assert rows.keys() == {f"qsvft {name}" for name in get_command(app).commands}
    by_itself = {name for name, codes in rows.items() if codes.startswith("1 ")}
    assert by_itself == {"qsvft profile", "qsvft train"}


def test_files_of_the_format_that_is_promised_are_kept_and_read_by_a_test():
    row = next(row["file"] for row in table_with(PAGE, "file", "promise") if "prepared" in row["file"])
    assert f"format version {FORMAT_VERSION}" in row
    kept = ROOT / "tests" / "from_before" / "prepared" / "config.json"
    assert json.loads(kept.read_text())["quantization_config"]["format_version"] == FORMAT_VERSION


def test_the_changelog_says_what_is_released():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## (\d+\.\d+\.\d+) - \d{4}-\d{2}-\d{2}$", text, re.MULTILINE)
    assert "## Unreleased" in text or released[:1] == [__version__]
    assert f"say {__version__}" in text or __version__ in released

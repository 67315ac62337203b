"""An option is declared once: one made up there is found everywhere."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftConfig

import qsvft
from qsvft import QSVFTConfig
from qsvft.options.adapter import FACTOR_FIELDS, OPTIONS
from qsvft.options.option import declared
from qsvft.options.switches import SWITCHES, Switches

PACKAGE = Path(qsvft.__file__).parent
FIELD = """
    made_up: int = option(
        7, INTEGER, "Made up.", "an even or a lucky number", lambda value: value == 7 or value % 2 == 0,
        of_factors=True, counted=True,
    )


OPTIONS ="""
ASK = """
import inspect, json
import qsvft
from typer.testing import CliRunner
from qsvft.cli.main import app
from qsvft.options.switches import Switches
from qsvft.memory import parse_method
from qsvft.memory.fit.ladder import FIXABLE
from qsvft.memory.fit.recommend import recommend
from qsvft.options.adapter import FACTOR_FIELDS

def refused(value):
    try:
        qsvft.QSVFTConfig(made_up=value)
    except ValueError as error:
        return str(error)

found = recommend("tiny", 8, 32, made_up=6)
print(json.dumps({
    "prepare": inspect.signature(qsvft.prepare).parameters["made_up"].default,
    "from_pretrained": inspect.signature(qsvft.from_pretrained).parameters["made_up"].default,
    "command": CliRunner().invoke(app, ["prepare", "--help"], terminal_width=300).output,
    "method": parse_method("qsvft:made_up=4").options,
    "fixable": "made_up" in FIXABLE,
    "recommended": found.method,
    "prepared for": "made_up" in FACTOR_FIELDS,
    "refused": refused(9),
    "saved": qsvft.QSVFTConfig(made_up=8).to_dict()["made_up"],
}))
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """What a copy of the library says whose config has one more field."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, folder / "qsvft", ignore=shutil.ignore_patterns("__pycache__"))
    config = folder / "qsvft" / "options" / "adapter.py"
    text = config.read_text(encoding="utf-8")
    assert text.count("\n\n\nOPTIONS =") == 1
    config.write_text(text.replace("\n\n\nOPTIONS =", FIELD), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASK],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_option_made_up_in_one_place_is_found_in_all(asked):
    assert asked.returncode == 0, asked.stderr
    answers = json.loads(asked.stdout.splitlines()[-1])
    assert answers["prepare"] == answers["from_pretrained"] == 7
    assert re.search(r"--made-up (<int>|INTEGER) +Made up\.", answers["command"])
    assert answers["method"] == {"made_up": 4}
    assert answers["fixable"] and "made_up=6" in answers["recommended"]
    assert answers["prepared for"] is True
    assert answers["refused"] == "QSVFTConfig.made_up: expected an even or a lucky number, got 9"
    assert answers["saved"] == 8


def test_every_field_that_a_user_sets_is_a_declared_option():
    own = set(QSVFTConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert own - set(OPTIONS) == {"base"}  # filled in by the library
    assert set(Switches.__dataclass_fields__) == set(SWITCHES)


@pytest.mark.parametrize("owner", [QSVFTConfig, Switches])
def test_every_default_is_allowed_and_every_option_has_its_words(owner):
    for name, one in declared(owner).items():
        one.refuse(one.default)
        assert one.help.endswith(".") and one.allowed, name
    assert set(FACTOR_FIELDS) <= set(OPTIONS)


@pytest.mark.parametrize("door", [qsvft.prepare, qsvft.from_pretrained])
def test_a_door_shows_every_option_with_its_default(door):
    shown = inspect.signature(door).parameters
    for name, one in {**OPTIONS, **SWITCHES}.items():
        assert shown[name].default == one.default
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY

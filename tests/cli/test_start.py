"""The command answers at once what needs no model, and imports the library when it has understood the rest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import qsvft
from qsvft.memory.methods import written_methods
from qsvft.memory.presets import _PRESETS
from qsvft.options.choices import METHODS, PRESETS
from qsvft.options.started import is_the_command

BIN = Path(sys.executable).parent
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "numpy")

# What the installed command does, and then which of the slow packages it has imported.
COMMAND = """
import atexit, json, sys
sys.argv = ["/some/bin/qsvft", *sys.argv[1:]]
atexit.register(lambda: print("\\n" + json.dumps(sorted(sys.modules))))
from qsvft.cli.main import app
app()
"""


def imported_by(*arguments):
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, check=False)
    return done, set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["nonsense"], 2),
        (["--nonsense"], 2),
        *[([command, "--help"], 0) for command in ("export", "info", "prepare", "profile")],
        (["prepare", "source"], 2),
        (["prepare", "source", "target", "--bits", "four"], 2),
        (["profile", "llama-3-8b", "--nonsense"], 2),
    ],
)
def test_help_and_wrong_arguments_import_nothing_slow(arguments, code):
    done, modules = imported_by(*arguments)
    assert done.returncode == code, done.stderr
    assert modules.isdisjoint(HEAVY)


def test_what_is_understood_imports_the_library_and_registers_the_method():
    done, modules = imported_by("info", "/no/such/directory")
    assert done.returncode == 2
    assert done.stderr == (
        "qsvft: /no/such/directory: found no such directory; expected one that qsvft or PEFT wrote\n"
    )
    assert modules.issuperset({*HEAVY, "qsvft.tuner.registration"})


def test_the_package_in_a_program_registers_the_method_when_it_is_imported():
    program = "import qsvft, peft; print(peft.PEFT_TYPE_TO_CONFIG_MAPPING['QSVFT'] is qsvft.QSVFTConfig)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize(
    ("started", "words", "command"),
    [
        ("/usr/bin/qsvft", ["python", "/usr/bin/qsvft"], True),
        ("qsvft.exe", ["python", "qsvft.exe"], True),
        ("-m", ["python", "-W", "ignore", "-m", "qsvft", "train"], True),
        ("-m", ["python", "-m", "pytest", "-m", "qsvft"], False),
        ("qsvft/train.py", ["python", "qsvft/train.py"], False),
        ("", ["python"], False),
        ("-c", ["python", "-c", "..."], False),
    ],
)
def test_the_command_is_told_from_programs_that_import_the_package(monkeypatch, started, words, command):
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(sys, "orig_argv", words)
    assert is_the_command() is command


def test_an_interpreter_without_arguments_is_no_command(monkeypatch):
    monkeypatch.delattr(sys, "argv")
    assert not is_the_command()


def test_python_m_qsvft_is_the_command():
    done = subprocess.run([sys.executable, "-m", "qsvft", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"qsvft {qsvft.__version__}\n"


def test_the_names_are_those_of_what_is_built():
    """They stand apart from it, so that a command line knows them without torch."""
    assert tuple(written_methods()) == METHODS
    assert tuple(_PRESETS) == PRESETS

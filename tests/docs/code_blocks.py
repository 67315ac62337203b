"""The code blocks of a page, and how a reader would run them: in order, in one directory.

Python blocks share one namespace. Shell blocks are run by bash, with ``qsvft`` and ``python`` of this environment on
the PATH, or in this process where they are commands of ``qsvft`` alone. Big models are replaced by the shipped one
(:data:`STAND_INS`), and commands that would take minutes, or the network, are checked in another way
(:data:`CHECKED_OTHERWISE`); everything else runs as it is written.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from qsvft.cli.main import app
from qsvft.options.recipe import load_yaml, read_recipe

RUN_BY_A_TEST = ("train", "info run", "eval run", "generate run", "export run")
"""Commands that take a base, rows and an adapter."""

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
BASE_MODEL = ROOT / "examples" / "base-model"

STAND_INS = {
    "meta-llama/Llama-2-7b-hf": str(BASE_MODEL),
    "path-or-hub-id": str(BASE_MODEL),
    "llama-3-8b --": "tiny --",  # a preset of `qsvft profile`
    '"llama-3-8b"': '"tiny"',
}
"""What stands in a page for a model of billions of parameters, and what the test takes in its place."""

FILES = {
    "texts.txt": "copy: banana\nreverse: apple\nsort: pear\n",
    "data.jsonl": '{"prompt": "shift: ab", "completion": "bc"}\n{"prompt": "shift: xy", "completion": "yz"}\n',
}
"""What a page takes for granted in the reader's directory."""


@dataclass(frozen=True)
class Block:
    """A code block of a page: its language, its text, and the number of its first line."""

    page: Path
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """All code blocks, in order; an indented one has the language ``""``, as a fenced one without a name."""
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [
        Block(page, token.info.strip(), token.content, token.map[0] + (2 if token.type == "fence" else 1))
        for token in tokens
        if token.type in ("fence", "code_block")
    ]


class Reader:
    """Somebody who copies the blocks of a page one after the other, in a directory of his own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__main__"}
        for name, text in FILES.items():
            (folder / name).write_text(text, encoding="utf-8")

    def run(self, block: Block) -> None:
        """Run a block as its language says.

        Raises:
            KeyError: a language that is neither run nor plain text.
        """
        LANGUAGES[block.language](self, block)

    def python(self, block: Block) -> None:
        """In this process, so that a warning is an error; the page's lines are those of a traceback."""
        code = "\n" * (block.line - 1) + with_stand_ins(block.text)
        exec(compile(code, str(block.page), "exec"), self.names)

    def shell(self, block: Block) -> None:
        """In one go; commands that are checked in another way are, and left out."""
        kept = [command for command in commands(with_stand_ins(block.text)) if not checked_otherwise(command)]
        if all(command.startswith("qsvft ") for command in kept):
            for command in kept:
                done = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
                assert done.exit_code == 0, f"{block}: exit status {done.exit_code}\n{done.output[-3000:]}"
            return
        scripts = sysconfig.get_path("scripts")
        environment = {
            **os.environ,
            "PATH": os.pathsep.join((scripts, os.environ["PATH"])),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "\n".join(kept)],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}: exit status {done.returncode}\n{done.stdout[-3000:]}"

    def data(self, block: Block) -> None:
        """JSON that a reader of files would meet."""
        json.loads(block.text)

    def recipe(self, block: Block) -> None:
        """A recipe of ``qsvft train``: its names and values are right."""
        read_recipe(load_yaml(block.text))

    def nothing(self, block: Block) -> None:
        """Plain text: formulas, names, output."""


LANGUAGES: dict[str, Callable[[Reader, Block], None]] = {
    "python": Reader.python,
    "sh": Reader.shell,
    "json": Reader.data,
    "yaml": Reader.recipe,
    "text": Reader.nothing,
}


def inline_commands(page: Path) -> list[str]:
    """Commands that stand within a sentence."""
    spans = (child for token in MarkdownIt().parse(page.read_text(encoding="utf-8")) for child in token.children or ())
    return [
        span.content for span in spans if span.type == "code_inline" and span.content.startswith(("python ", "make "))
    ]


def with_stand_ins(text: str) -> str:
    for name, other in STAND_INS.items():
        text = text.replace(name, other)
    return text


def commands(text: str) -> list[str]:
    """The commands of a shell block, one each, with their lines joined; comments alone are left out."""
    joined = text.replace("\\\n", " ").splitlines()
    return [line for line in joined if shlex.split(line, comments=True)]


class _ArgumentsParsed(BaseException):
    """A script's arguments are understood; no more of it is to run."""


@contextmanager
def _stopping_at_the_arguments():
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *arguments):
        parse(self, *arguments)
        raise _ArgumentsParsed

    with patch.object(argparse.ArgumentParser, "parse_args", stop):
        yield


def arguments_parse(words: list[str]) -> None:
    """Run a script of this repository until it has understood its arguments."""
    script = ROOT / words[1]
    before = list(sys.path)
    sys.path.insert(0, str(script.parent))
    try:
        with _stopping_at_the_arguments(), patch.object(sys, "argv", [str(script), *words[2:]]):
            runpy.run_path(str(script), run_name="__main__")
    except _ArgumentsParsed:
        return
    finally:
        sys.path[:] = before
    raise AssertionError(f"{shlex.join(words)}: it parses no arguments")


def is_an_experiment(words: list[str]) -> None:
    """Let the experiments of the paper read what they are asked to run; without a name they only say something."""
    from benchmarks.paper.__main__ import chosen, options

    told = options(words[3:])
    for name in told.experiments:
        chosen(name, told)


def is_a_launch(words: list[str]) -> None:
    """Let accelerate read its file and arguments, and the script its own."""
    arguments = launch_command_parser().parse_args(words[2:])
    assert load_config_from_file(str(ROOT / arguments.config_file)).num_processes == 2
    arguments_parse(["python", arguments.training_script, *arguments.training_script_args])


def is_a_target(words: list[str]) -> None:
    """Let make say what it would do."""
    done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def is_a_project(words: list[str]) -> None:
    """Let pip say what it would install from the root of the repository, without what that depends on."""
    offline = ("--dry-run", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    command = [sys.executable, "-m", *words, *offline, "--disable-pip-version-check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Would install qsvft" in done.stdout, done.stdout + done.stderr


def is_executable(words: list[str]) -> None:
    """A script of this repository that needs a card."""
    assert os.access(ROOT / words[0], os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / words[0])], check=True)


def understood(words: list[str]) -> None:
    """The command line takes a command of qsvft's with these arguments, which are not carried out."""
    group = typer.main.get_command(app)
    group.commands[words[1]].make_context(words[1], words[2:]).close()


CHECKED_OTHERWISE: tuple[tuple[str, Callable[[list[str]], None], str], ...] = (
    ("make ", is_a_target, "sets up environments and runs this suite, or minutes of training"),
    ("pip install", is_a_project, "downloads gigabytes"),
    ("python benchmarks/", arguments_parse, "takes minutes; tests/test_benchmarks.py runs them at toy size"),
    ("python examples/", arguments_parse, "takes a minute; `make demo` runs it"),
    ("python -m benchmarks.paper", is_an_experiment, "takes a card, models and hours; tests/paper/ runs it small"),
    ("accelerate launch", is_a_launch, "needs two cards; tests/distributed/ runs it on processors"),
    *((f"qsvft {one}", understood, "tests/cli/test_train_command.py runs it") for one in RUN_BY_A_TEST),
    ("benchmarks/gpu/", is_executable, "needs a card; tests/test_gpu_suite.py rehearses it"),
)
"""How a command begins, how it is checked in place of running it, and why it is not run."""


def checked_otherwise(command: str) -> bool:
    """Check a command in the way that the table says; False if it is to run."""
    for beginning, check, _ in CHECKED_OTHERWISE:
        if command.startswith(beginning):
            check(shlex.split(command, comments=True))
            return True
    return False

"""From a base and a file of rows to an adapter that was measured, talked with and exported: five commands."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rows_of import give_template, write_rows
from small_models import save_llama
from typer.testing import CliRunner

from qsvft.cli.main import app
from qsvft.cli.run import found
from qsvft.training.checkpoints import last_whole

QSVFT = Path(sys.executable).with_name("qsvft")
# A lora in a process that never heard of qsvft.
WITHOUT_QSVFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
assert model.peft_config["default"].peft_type == "LORA" and "qsvft" not in sys.modules
print("loaded")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, its data, and a cache of their own."""
    folder = tmp_path_factory.mktemp("commands")
    give_template(save_llama(folder / "base"))
    write_rows(folder, "messages")
    return folder


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("QSVFT_CACHE", str(place / "cache"))


def run(*arguments, given=None):
    return CliRunner().invoke(app, [*map(str, arguments)], input=given)


def ended_well(*arguments, given=None):
    done = run(*arguments, given=given)
    assert done.exit_code == 0, done.output
    return done.stdout


FILES = ["--model", "base", "--dataset", "messages.jsonl"]
TRAIN = ["train", *FILES, "--rank", "8", "--max-steps", "3", "--save-steps", "1"]


def test_five_commands_from_a_base_to_an_exported_adapter(place):
    """Each says what it does; they are those of docs/training.md."""
    said = ended_well(*TRAIN, "--output", "run")
    assert "memory:  a peak of" in said and "time:    roughly" in said and "trained: run, 3 steps in" in said
    said = ended_well("info", "run")
    assert "base" in said and "to load: qsvft.load('run')" in said
    said = ended_well("eval", "run", "--dataset", "messages.jsonl", "--limit", 3)
    assert "loss " in said and "perplexity " in said and "tokens of 6 rows" in said
    said = ended_well("generate", "run", "--max-new-tokens", 3, given="w8 w9\n/new\nw9\n/quit\nw1\n")
    assert len([line for line in said.splitlines() if line.strip()]) == 2
    assert "written: lora" in ended_well("export", "run", "lora")
    plain = [sys.executable, "-W", "ignore", "-c", WITHOUT_QSVFT, place / "base", place / "lora"]
    assert subprocess.run(plain, capture_output=True, text=True, check=True).stdout == "loaded\n"


def test_a_killed_command_goes_on_when_it_is_given_again(place):
    words = [QSVFT, *TRAIN, "--output", "killed", "--set", "max_steps=300"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "step 3 of" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    reached = last_whole(place / "killed")
    assert reached is not None
    recipe = place / "killed" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("max_steps: 300", "max_steps: 3"))
    said = ended_well(*TRAIN, "--output", "killed")
    assert f"goes on after step {reached.name.rpartition('-')[-1]}, from" in said


def test_a_dry_run_says_what_it_will_take_and_writes_nothing(place):
    said = ended_well(*TRAIN, "--output", "dry", "--dry-run")
    assert "memory:  a peak of" in said and not (place / "dry").exists()


def test_a_recipe_from_a_file_is_the_same_as_its_options(place):
    (place / "recipe.yaml").write_text("model: base\ndataset: messages.jsonl\noutput: file\nrank: 8\n")
    said = ended_well("train", "recipe.yaml", "--dry-run", "--set", "max_steps=7", "--learning-rate", "1e-3")
    assert "steps:   7 of 1 x 8 rows, learning rate 0.001" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "qsvft: model: found none; expected a directory or a hub id. Give --model."),
        (["train", "nothing.yaml"], "qsvft: nothing.yaml: No such file or directory; expected a recipe"),
        (["train", "--set", "rnak=3"], "qsvft: rnak: is no option of qsvft or of TRL's trainer. Did you mean rank?"),
        (["train", "--rank", "0"], "qsvft: "),
        (["eval", "run"], "qsvft: found neither --dataset and --tasks; expected one of them"),
        (["eval", "run", "--dataset", "x", "--tasks", "y"], "qsvft: found both --dataset and --tasks"),
        (["run", "no-such-program"], "qsvft: no-such-program: found no such script or command"),
        (["run", "/bin/sh"], "qsvft: /bin/sh: is no Python program; expected one"),
        (["generate", "run", "--max-new-tokens", "0"], "qsvft: Invalid value for '--max-new-tokens'"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(words) and done.stderr.count("\n") == 1


def test_a_run_that_fails_is_one_line_and_code_1():
    done = run(*TRAIN, "--output", "nan", "--learning-rate", 1e30, "--set", "max_grad_norm=0.0")
    assert done.exit_code == 1
    assert "is NaN or Inf; expected finite numbers" in done.stderr.splitlines()[-1]


def test_tasks_say_what_is_missing(monkeypatch):
    monkeypatch.setattr("qsvft.training.tasks.find_spec", lambda name: None)
    done = run("eval", "run", "--tasks", "arc_easy")
    assert done.exit_code == 2
    expected = "found no lm-eval; expected it to be installed. pip install lm_eval, or give --dataset."
    assert done.stderr == f"qsvft: --tasks: {expected}\n"


SCRIPT = """
import json, sys
from peft import PEFT_TYPE_TO_CONFIG_MAPPING
import qsvft
print(json.dumps([sys.argv, "QSVFT" in PEFT_TYPE_TO_CONFIG_MAPPING, callable(qsvft.prepare), __name__]))
raise SystemExit(7)
"""


def test_a_program_runs_with_the_method_registered_and_its_exit_code(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    words = [QSVFT, "run", "--", "python", path, "--flag", "-x"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout) == [[str(path), "--flag", "-x"], True, True, "__main__"]
    assert done.returncode == 7


def test_a_program_is_a_script_a_command_or_a_module(tmp_path, monkeypatch):
    script, tool = tmp_path / "script.py", tmp_path / "tool"
    script.touch()
    tool.write_text("#!/usr/bin/env python3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert found([str(script), "a"]) == (script, ["a"])
    assert found(["python3", str(script), "--help"]) == (script, ["--help"])
    assert found(["tool", "-x"]) == (tool, ["-x"])
    assert found(["-m", "module", "a"]) == (None, ["a"])
    assert found(["python", "-m", "module", "a"]) == (None, ["a"])

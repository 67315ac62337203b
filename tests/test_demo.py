"""The demo, as the README has it run: it learns, and what it saves is what it trained."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "finetune.py"


def test_the_demo_learns_a_task_that_is_new_to_its_model_and_reloads_it_bit_for_bit(tmp_path):
    path = tmp_path / "figures.json"
    command = [sys.executable, "-W", "error", str(SCRIPT), "--output", str(tmp_path / "adapter"), "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text())
    assert found["accuracy_before"] == 0.0
    assert found["accuracy_after"] >= 0.95 and found["accuracy_merged"] >= 0.95
    assert found["max_logit_difference"]["reloaded"] == 0.0
    assert found["trainable_parameters"] == 114_688
    assert f"{found['accuracy_after']:.1%}" in done.stdout


@pytest.mark.parametrize("line", ["{", '{"prompt": "a"}', '["a"]', '{"prompt": "a", "completion": ""}'])
def test_a_bad_line_of_ones_own_examples_is_named(tmp_path, line, monkeypatch):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--dataset", str(data)])
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    with pytest.raises(SystemExit, match=re.escape(f"error: {data}, line 2: ")):
        runpy.run_path(str(SCRIPT), run_name="__main__")

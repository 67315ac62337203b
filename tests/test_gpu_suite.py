"""The GPU suite's own code: the rehearsal runs, cut-offs lose nothing, and what cannot run says so in a line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
MODULES = ("cases", "predictions", "recorder", "results", "stages", "steps", "summary")
METHODS = (
    "qlora",
    "qsvft",
    "qsvft:factor_bits=4",
    "qsvft:basis=hadamard",
    "floor",
    "svft",
)
pytestmark = pytest.mark.filterwarnings("ignore")


def run(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(FOLDER / "run.sh"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture
def suite(monkeypatch):
    """The suite's modules by name, importable for one test."""
    monkeypatch.syspath_prepend(FOLDER)
    for name in MODULES:
        sys.modules.pop(name, None)
    yield __import__
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder of one whole rehearsal by the command."""
    folder = tmp_path_factory.mktemp("rehearsal")
    done = run("--rehearse", "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def cases(path):
    return [line for line in lines(path) if "case" in line]


def test_a_rehearsal_runs_every_stage_and_marks_its_rows(rehearsal):
    for stage in ("tests", "memory", "speed", "decomposition"):
        header, *rows = lines(rehearsal / f"{stage}.jsonl")
        assert header["kind"] == "run"
        assert {"torch", "peft", "bitsandbytes", "qsvft"} <= header["versions"].keys()
        assert header["machine"]["card"] == "cpu"
        assert rows and all(row["rehearsal"] and row["commit"] == header["commit"] for row in rows)
        assert not [row for row in rows if row["status"] == "failed"]
    for row in cases(rehearsal / "memory.jsonl"):
        assert row["status"] == "ran"
        assert row["allocated_bytes"] == row["predicted_bytes"]
        assert row["factors"] == ("random" if "svft" in row["method"] else "none")
    for row in cases(rehearsal / "speed.jsonl"):
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["times_qlora"] == pytest.approx(1) if row["method"] == "qlora" else row["times_qlora"] > 0
    text = (rehearsal / "results.md").read_text()
    assert "not a measurement" in text
    assert all(f"| {method} |" in text for method in METHODS)


def test_a_run_goes_on_where_a_cut_off_left_it(rehearsal, suite):
    path = rehearsal / "memory.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"{") + 40])  # the last row is half-written
    stages = suite("stages")
    again = ["--rehearse", "--output", str(rehearsal), "memory"]
    assert stages.main(again) == 0
    found = [row for row in map(_parsed, path.read_text().splitlines()) if row and "case" in row]
    assert [row["method"] for row in found] == list(METHODS)
    assert found[-1]["run"] != found[0]["run"]
    size = path.stat().st_size
    assert stages.main(again) == 0
    assert path.stat().st_size == size


def _parsed(line):
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def test_a_stage_whose_time_is_up_says_so_and_leaves_the_rest(suite, tmp_path, monkeypatch, capsys):
    stages = suite("stages")
    monkeypatch.setattr(stages, "SOFT_LIMIT_S", -1)
    assert stages.main(["--rehearse", "--output", str(tmp_path), "memory"]) == 3
    assert "time is up" in capsys.readouterr().out
    assert not (tmp_path / "memory.jsonl").exists()


def test_cases_that_do_not_fit_fail_or_run_out_of_memory_have_their_reason(suite, tmp_path, monkeypatch):
    stages, steps = suite("stages"), suite("steps")

    def peak(self, scenario, seq_len, other):
        del scenario, seq_len, other
        outcomes.append(None)
        raise torch.OutOfMemoryError("CUDA out of memory.") if len(outcomes) == 1 else RuntimeError("no such kernel")

    outcomes = []
    monkeypatch.setattr(steps.Rehearsal, "peak", peak)
    monkeypatch.setattr(steps.Rehearsal, "free_bytes", lambda self: 600_000)  # more than floor and svft need
    assert stages.main(["--rehearse", "--output", str(tmp_path), "memory"]) == 1
    found = {row["method"]: row for row in cases(tmp_path / "memory.jsonl")}
    assert {name: row["status"] for name, row in found.items()} == {
        **dict.fromkeys(METHODS[:4], "not run"),
        "floor": "out of memory",
        "svft": "failed",
    }
    assert "8 %" in found["qlora"]["reason"]
    assert found["svft"]["reason"] == "RuntimeError: no such kernel"
    assert "no such kernel" in (tmp_path / "results.md").read_text()


def test_the_cards_code_reads_the_allocator_and_the_events(suite, monkeypatch):
    """With stand-ins for torch.cuda; the tests in tests/cuda run it on a card."""
    suite("stages")
    steps, plan = suite("steps"), suite("cases").REHEARSAL
    from qsvft.memory.methods import parse_method
    from qsvft.memory.presets import model_config

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("event")

        def elapsed_time(self, other):
            return 5.0

    calls = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3000, 4000))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: calls.append("clear"), raising=False)
    scenario = steps.build(model_config("tiny"), parse_method("qsvft"), "cpu")
    card = steps.Card()
    found = card.peak(scenario, 16, 100)
    assert (found["allocated_bytes"], found["reserved_bytes"], found["other_bytes"]) == (900, 2000, 100)
    assert calls == ["synchronize", "empty_cache", "reset_peak_memory_stats", "synchronize"]
    assert card.times(scenario, 16, plan) == [5.0] * plan.least
    assert calls.count("event") == plan.least + 1
    assert card.free_bytes() == 3000


def test_a_rehearsed_step_is_the_one_the_ledger_counts(suite):
    """The card is measured over the suite's own step, so that has to allocate what the prediction counts."""
    suite("stages")
    steps = suite("steps")
    from qsvft.memory.held import held_tensors
    from qsvft.memory.ledger import Ledger
    from qsvft.memory.methods import parse_method
    from qsvft.memory.presets import model_config
    from qsvft.memory.scenario import count_step

    method = parse_method("qsvft")
    predicted = count_step(model_config("tiny"), method, 1, 64)[0].peaks()["total"].nbytes
    scenario = steps.build(model_config("tiny"), method, "cpu")
    stepper = steps.Stepper(scenario, 64, fused=False, autocast=False)
    stepper.step()
    ledger = Ledger()
    for tensor, category in held_tensors(scenario.model):
        ledger.register(tensor, category)
    for state in stepper.optimizer.state.values():
        for value in state.values():
            ledger.register(value, "optimizer")
    ledger.register(stepper.tokens, "temporaries")
    ledger.phase = "forward"
    with ledger, ledger.watch(scenario.model, scenario.head):
        stepper.step()
    assert ledger.high_water() == pytest.approx(predicted, rel=1e-3)


def test_a_card_s_name_becomes_a_safe_folder(suite):
    safe_name = suite("results").safe_name
    assert safe_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert safe_name("../RTX/4090 ") == "rtx-4090"
    assert safe_name("") == "unknown"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["benchmark"], "unknown stage 'benchmark'; expected tests, memory, speed, decomposition or summary"),
        (["--fast"], "unknown option '--fast'"),
        (["--wheels"], "--wheels needs a directory"),
        (["--wheels", "/nowhere", "tests"], "no wheels in '/nowhere'"),
        (["memory"], "torch finds no CUDA device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_run_is_refused_in_one_line(arguments, reason):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if "kernels" not in line]
    assert line.startswith("run.sh: ")
    assert reason in line

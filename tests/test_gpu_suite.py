"""The card's command, rehearsed: every stage runs, and whatever ends it loses one case at most."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from script_modules import BENCHMARKS, EXAMPLES, GPU, ROOT, script_modules

SMALLEST = "qsvft:factor_bits=4,quantize_embeddings=8"
STEPS = [("qlora", 32), (SMALLEST, 32), ("svft", 32), ("qlora", 16), ("floor:chunked_loss=true", 16)]
STEPS += [("qlora without checkpointing", 16)]
pytestmark = pytest.mark.filterwarnings("ignore")


def command(*arguments):
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    line = [str(GPU / "card.sh"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=3000, env=environment)


@pytest.fixture
def suite():
    """The suite's modules by name, importable for one test."""
    with script_modules(GPU, EXAMPLES, BENCHMARKS) as module:
        yield module


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The folder of one whole rehearsal by the command."""
    folder = tmp_path_factory.mktemp("rehearsal")
    done = command("--rehearse", "--output", folder, "--commit", "abc123")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def rows(folder, stage=None):
    found = []
    for line in (folder / "results.jsonl").read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found if stage is None else [row for row in found if row.get("stage") == stage]


def stages_main(suite, folder, *stages, started=None, seconds=3000.0):
    """One process of the command, in this one."""
    started = started or time.time()
    arguments = [*stages, "--rehearse", "--output", folder, "--started", started, "--ends", started + seconds]
    return suite("stages").main(list(map(str, arguments)))


def a_suite(suite, folder, started=1e9, seconds=3000.0):
    """What the stages share, on the CPU."""
    results, steps, predictions = suite("results"), suite("steps"), suite("predictions")
    run = results.Run.begin({"card": "cpu"}, True, started, "abc123")
    found = results.Rows(folder, run)
    plan, jobs = suite("cases").REHEARSAL, predictions.Predictions(found, 0)
    return suite("suite").Suite(folder, steps.Rehearsal(), plan, run, found, jobs, started, time.time() + seconds)


def test_a_rehearsal_runs_every_stage_in_order_and_marks_its_rows(rehearsal):
    header, *found = rows(rehearsal)
    assert header["kind"] == "run" and header["commit"] == "abc123"
    assert {"torch", "peft", "bitsandbytes", "qsvft"} <= header["versions"].keys()
    begun = [row["case"] for row in found if row["stage"] == "stage"]
    assert begun == [f"stage | {name}" for name in ("tiny", "steps", "longest", "clock", "decomposition", "tests")]
    assert all(row["rehearsal"] and row["run"] == header["run"] for row in found)
    assert {row["status"] for row in found} == {"ran", "skipped"}
    assert not (rehearsal / "at-hand.json").exists()
    assert "not a measurement" in (rehearsal / "results.md").read_text()
    # What a way back with few places would have to bring.
    here = ["clock", "clock.log", "results.jsonl", "results.md", "tests.log"]
    assert sorted(path.name for path in rehearsal.iterdir()) == here


def test_the_device_s_training_is_held_against_the_cpu_s(rehearsal):
    (row,) = rows(rehearsal, "tiny")
    assert row["differences"].keys() == row["bounds"].keys() == {"loss", "M", "logits", "reloaded", "merged"}
    assert row["differences"]["M"] == 0 < row["differences"]["merged"] < row["bounds"]["merged"]
    assert row["loss_after"] < row["loss_before"]


def test_a_step_has_its_bytes_its_time_and_its_prediction(rehearsal):
    predicted = {row["case"].removeprefix("predictions | "): row for row in rows(rehearsal, "predictions")}
    memory, speed = rows(rehearsal, "memory"), rows(rehearsal, "speed")
    assert [(row["method"], row["seq_len"]) for row in memory] == STEPS == [(r["method"], r["seq_len"]) for r in speed]
    for row in memory:
        assert row["allocated_bytes"] == predicted[row["case"].removeprefix("memory | ")]["predicted_bytes"]
        assert row["factors"] == ("random" if "svft" in row["method"] else "none")
    for row in speed:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["tokens_per_s"] == pytest.approx(1000 * row["seq_len"] / row["median_ms"])
    table = (rehearsal / "results.md").read_text()
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| tiny | 32 |")]
    ratios = {line[2]: line[-1] for line in lines}
    assert ratios["qlora"].startswith("1.00") and ratios.keys() == {"qlora", SMALLEST, "svft"}


def test_the_longest_sequence_is_enclosed_and_its_prediction_beside_it(rehearsal):
    larger, smaller = rows(rehearsal, "longest")
    assert larger["longest_that_fits"] == 512 and larger["shortest_that_does_not"] is None
    assert smaller["longest_that_fits"] == 256 and smaller["shortest_that_does_not"] == 384
    predicted = [row for row in rows(rehearsal, "predictions") if "card_bytes" in row]
    assert [row["card_bytes"] for row in predicted] == [larger["card_bytes"], smaller["card_bytes"]]


def test_decompositions_are_extrapolated_to_a_model_and_compared_with_the_cpu(rehearsal):
    found = rows(rehearsal, "decomposition")
    timed = [row for row in found if "decompose_s" in row]
    assert {tuple(row["shape"]) for row in timed} == {(96, 96), (96, 160), (160, 96)}
    assert {row["rank"] for row in timed} == {96, 12}
    for row in timed:
        assert row["decompose_s"] == min(row["runs_s"][1:])
        assert row["orthogonality"] < (1e-4 if "float32" in row["way"] else 1e-9)
    (model,) = [row for row in found if row.get("minutes") and row["way"] == "exact, one side"]
    parts = [row["decompose_s"] + row["scale_s"] for row in timed if row["way"] == "exact, one side"]
    seconds = sum(count * part for count, part in zip((4, 2, 1), parts, strict=True))
    assert model["minutes"] == pytest.approx(model["layers"] * seconds / 60)
    assert [row["bf16_equal"] for row in found if "bf16_equal" in row] == [1.0, 1.0]


def test_the_marked_tests_alone_are_run(rehearsal):
    found = rows(rehearsal, "tests")
    assert len(found) > 50 and all("tests/cuda/" in row["case"] for row in found)
    assert {row["reason"] for row in found} == {"Skipped: needs a CUDA device"}
    assert "needs a CUDA device" in (rehearsal / "tests.log").read_text()


def test_another_call_goes_on_where_a_cut_off_left_it(suite, tmp_path, monkeypatch):
    plan = suite("cases").REHEARSAL
    monkeypatch.setattr(suite("stages"), "REHEARSAL", replace(plan, passes=plan.passes[1:]))
    assert stages_main(suite, tmp_path, "steps") == 0
    path = tmp_path / "results.jsonl"
    whole, before = path.read_bytes(), rows(tmp_path, "memory")
    path.write_bytes(whole[: whole.rindex(b'{"stage": "speed"') + 40])  # the last row is half-written
    assert stages_main(suite, tmp_path, "steps", started=time.time() + 5) == 0
    assert rows(tmp_path, "memory") == before
    again = [row for row in rows(tmp_path, "speed") if row["run"] != before[0]["run"]]
    # The one that was lost, and what its ratio is taken to.
    assert [(row["method"], row["seq_len"]) for row in again] == [STEPS[-3], STEPS[-1]]
    size = len(rows(tmp_path, "speed"))
    assert stages_main(suite, tmp_path, "steps", started=time.time() + 10) == 0
    assert len(rows(tmp_path, "speed")) == size


def test_when_time_is_up_nothing_is_begun(suite, tmp_path, capsys):
    assert stages_main(suite, tmp_path, "tiny", seconds=1) == 3
    assert "time is up" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_stage_that_runs_out_of_its_seconds_hands_on_and_has_what_is_left_at_the_end(suite, tmp_path, monkeypatch):
    stages, shared = suite("stages"), a_suite(suite, tmp_path, started=time.time())
    monkeypatch.setattr(stages, "BUDGETS", {"start": 0, "first": 0.03, "second": 300})
    monkeypatch.setattr(stages, "LEAST_S", 0.0)
    order = []

    def first(suite):
        order.append("first")
        while len(order) == 1:
            time.sleep(0.01)

    assert stages.run_stages(shared, {"first": first, "second": lambda suite: order.append("second")}) == 0
    assert order == ["first", "second", "first"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_start_that_takes_the_first_stage_s_seconds_moves_it_to_the_end(suite, tmp_path):
    seconds = suite("cases").BUDGETS["tiny"] * suite("cases").PATIENCE
    shared, order = a_suite(suite, tmp_path, started=time.time() - seconds - 1), []
    wanted = {name: lambda _, name=name: order.append(name) for name in ("tiny", "steps")}
    assert suite("stages").run_stages(shared, wanted) == 0
    assert order == ["steps", "tiny"]


def test_what_fails_or_runs_out_of_memory_has_its_reason_and_the_next_case_goes_on(suite, tmp_path):
    shared = a_suite(suite, tmp_path)

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def failing():
        raise RuntimeError("no such kernel")

    for case, measure in (("a", out_of_memory), ("b", failing), ("c", lambda: {"value": 1})):
        shared.attempt("memory", case, {}, measure)
    found = {row["case"]: row for row in rows(tmp_path, "memory")}
    assert [row["status"] for row in found.values()] == ["out of memory", "failed", "ran"]
    assert found["b"]["reason"] == "RuntimeError: no such kernel"
    assert suite("stages").run_stages(shared, {}) == 4


def test_after_a_cuda_error_the_process_ends_behind_the_case(suite, tmp_path):
    shared = a_suite(suite, tmp_path)

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(suite("suite").ContextLost):
        shared.attempt("memory", "a", {}, lost)
    assert [row["status"] for row in rows(tmp_path, "memory")] == ["failed"]
    again = a_suite(suite, tmp_path)
    assert again.rows.done("a")  # in this run; another tries it again
    assert not a_suite(suite, tmp_path, started=2e9).rows.done("a")


def test_a_case_that_a_process_died_with_is_said_and_not_tried_again_in_the_run(suite, tmp_path):
    dying = f"""
import sys
sys.path[:0] = [{str(GPU)!r}]
import os
from pathlib import Path
from results import Rows, Run
rows = Rows(Path({str(tmp_path)!r}), Run.begin({{"card": "cpu"}}, True, 1e9, "abc123"))
with rows.at_hand("memory", "a"):
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", dying]).returncode == 9
    shared = a_suite(suite, tmp_path)
    suite("stages").run_stages(shared, {})
    assert [(row["case"], row["status"]) for row in rows(tmp_path, "memory")] == [("a", "lost")]
    assert shared.rows.done("a") and not a_suite(suite, tmp_path, started=2e9).rows.done("a")
    assert not (tmp_path / "at-hand.json").exists()


def test_a_process_that_dies_is_started_again(suite, tmp_path, capsys):
    seen = tmp_path / "seen"
    dying = f"""
import os, signal
with open({str(seen)!r}, "a") as file:
    file.write("x")
if os.path.getsize({str(seen)!r}) < 3:
    os.kill(os.getpid(), signal.SIGKILL)
raise SystemExit(4)
"""
    assert suite("card").watch([sys.executable, "-c", dying], time.time() + 300) == 4
    assert seen.read_text() == "xxx"
    assert capsys.readouterr().out.count("ended with status -9") == 2


def test_a_process_that_dies_every_time_is_given_up(suite, tmp_path):
    seen = tmp_path / "seen"
    dying = f"open({str(seen)!r}, 'a').write('x'); raise SystemExit(75)"
    assert suite("card").watch([sys.executable, "-c", dying], time.time() + 300) == 1
    assert seen.read_text() == "xxxx"


def test_when_time_is_up_the_process_is_ended_with_its_children(suite, tmp_path):
    child = "import time; time.sleep(1000)"
    parent = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {child!r}])
with open({str(tmp_path / "pid")!r}, "w") as file:
    file.write(str(child.pid))
os.rename({str(tmp_path / "pid")!r}, {str(tmp_path / "child")!r})
time.sleep(1000)
"""
    card = suite("card")
    while not (tmp_path / "child").exists():  # on a busy machine the parent may need longer to start its child
        assert card.watch([sys.executable, "-c", parent], time.time() + 1.5) == 3
    assert not _runs(int((tmp_path / "child").read_text()))


def _runs(pid):
    """Whether a process is alive; one that ended and that nobody waited for is not."""
    for _ in range(200):  # the kernel takes a moment to end it
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


def test_the_stages_seconds_fit_into_the_command_s(suite):
    cases = suite("cases")
    assert sum(cases.BUDGETS.values()) + 2 * cases.RESERVE <= cases.LIMIT <= 8 * 60


@pytest.fixture
def cuda(monkeypatch):
    """Stand-ins for torch.cuda; gives the calls. The tests in tests/cuda run the same on a card."""

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
    for name, value in (("max_memory_allocated", 1000), ("max_memory_reserved", 2000), ("memory_reserved", 1500)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3000, 2**33))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", calls.append)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: calls.append("clear"), raising=False)
    return calls


def scenario(steps, method="qsvft"):
    from qsvft.memory.presets import model_config

    return steps.build(model_config("tiny"), method, "cpu")


def test_the_card_s_code_reads_the_allocator_and_the_events(suite, cuda):
    steps, plan = suite("steps"), suite("cases").REHEARSAL
    card, built = steps.Card(), scenario(steps)
    found = card.peak(built, 16, 100)
    assert (found["allocated_bytes"], found["reserved_bytes"], found["other_bytes"]) == (900, 2000, 100)
    assert found["context_bytes"] == 2**33 - 3000 - 1500
    assert cuda == ["synchronize", "empty_cache", "reset_peak_memory_stats", "synchronize"]
    assert card.times(built, 16, plan) == [5.0] * plan.least
    assert cuda.count("event") == plan.least + 1


def test_the_card_is_made_small_for_a_search_and_whole_again_whatever_happens(suite, cuda):
    steps = suite("steps")
    card = steps.Card()
    with pytest.raises(RuntimeError, match="broken"), card.limited(2**32):
        raise RuntimeError("broken")
    fractions = [call for call in cuda if isinstance(call, float)]
    assert fractions == [(2**32 - steps.CONTEXT_BYTES) / 2**33, 1.0]
    with card.limited(2**34):
        pass
    assert cuda[-2:] == [1.0, 1.0]


def test_a_length_that_runs_out_of_memory_does_not_fit_and_leaves_nothing(suite, cuda, monkeypatch):
    steps = suite("steps")
    card, stepper = steps.Card(), steps.Stepper(scenario(steps, "qlora"), fused=False, autocast=False)
    assert card.fits(stepper, 16)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(stepper.optimizer, "step", full)
    assert not card.fits(stepper, 16)
    assert all(parameter.grad is None for parameter in stepper.model.parameters())
    assert cuda[-1] == "empty_cache"


@pytest.mark.parametrize("guess", [1, 128, 700, 2048, 30000, 10**6])
@pytest.mark.parametrize("limit", [0, 127, 128, 500, 2999, 17000, 32767, 32768, 10**6])
def test_the_longest_sequence_is_enclosed_from_any_guess_in_few_tries(suite, guess, limit):
    longest, most = suite("steps").longest, 32768
    low, high, tried = longest(lambda n: n <= limit, guess, most)
    assert low <= limit and low % 128 == 0 and len(tried) == len(set(tried)) <= 16
    if high is None:
        assert low == most
    else:
        assert limit < high <= most and high - low <= max(128, 0.02 * high)


def test_a_good_guess_of_the_longest_sequence_takes_three_tries(suite):
    longest = suite("steps").longest
    assert all(len(longest(lambda n: n <= 20000, guess, 32768)[2]) <= 3 for guess in (19700, 20000, 20300))


def test_no_method_is_decomposed_for_real(suite, monkeypatch):
    """Of a 7B model that takes longer than a card is there for."""

    def refuse(*_, **__):
        raise AssertionError("a weight is decomposed")

    for name in ("eigh", "qr", "svd", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    steps, cases = suite("steps"), suite("cases")
    for method in (*cases.COMPARED, *cases.OTHERS):
        scenario(
            steps, method.replace("rank=256", "rank=16").replace("rank=1024", "rank=32").replace("rank=128", "rank=8")
        )


def test_a_rehearsed_step_is_the_one_the_ledger_counts(suite):
    """The card is measured over the suite's own step, so that has to allocate what the prediction counts."""
    steps = suite("steps")
    from qsvft.memory.held import held_tensors
    from qsvft.memory.ledger import Ledger

    predicted = suite("predictions").peak("tiny", "qsvft", 64)["predicted_bytes"]
    built = scenario(steps)
    stepper = steps.Stepper(built, fused=False, autocast=False)
    tokens = stepper.tokens(64)
    stepper.step(tokens)
    ledger = Ledger()
    for tensor, category in held_tensors(built.model):
        ledger.register(tensor, category)
    for state in stepper.optimizer.state.values():
        for value in state.values():
            ledger.register(value, "optimizer")
    ledger.register(tokens, "temporaries")
    ledger.phase = "forward"
    with ledger, ledger.watch(built.model, built.head):
        stepper.step(tokens)
    assert ledger.high_water() == pytest.approx(predicted, rel=1e-3)


def test_predictions_of_other_processes_are_those_of_this_one(suite, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(GPU), str(ROOT))))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    predictions, shared = suite("predictions"), a_suite(suite, tmp_path)
    beside, card = predictions.Predictions(shared.rows, 1), 13 * 2**26  # 64 MiB more than what is set aside for CUDA
    beside.ask([("tiny", "qlora", 32), ("tiny", "no such method", 32)], [("tiny", "qlora", card)])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    hidden = beside._processes().submit(os.getenv, "CUDA_VISIBLE_DEVICES")
    assert hidden.result(300) == ""
    for _, future in list(beside._open.values()):
        future.exception(300)
    beside.close()
    step, wrong, search = rows(tmp_path, "predictions")
    assert step["predicted_bytes"] == predictions.peak("tiny", "qlora", 32)["predicted_bytes"]
    assert wrong["status"] == "failed" and "unknown method" in wrong["reason"]
    assert search["predicted_tokens"] == predictions.longest("tiny", "qlora", card)["predicted_tokens"] > 0


def test_where_no_predictions_can_be_counted_the_card_is_measured_all_the_same(suite, tmp_path, monkeypatch, capsys):
    def refuse(self, steps, searches):
        raise OSError("no more processes")

    monkeypatch.setattr(suite("predictions").Predictions, "ask", refuse)
    plan = suite("cases").REHEARSAL
    monkeypatch.setattr(suite("stages"), "REHEARSAL", replace(plan, passes=plan.passes[1:]))
    assert stages_main(suite, tmp_path, "steps") == 0
    assert "predictions: not counted here: no more processes" in capsys.readouterr().out
    assert len(rows(tmp_path, "memory")) == 3 and not rows(tmp_path, "predictions")


def test_a_device_that_computes_something_else_has_failed(suite, tmp_path, monkeypatch):
    tiny = suite("tiny")
    honest = tiny.train

    def train(prepared, adapter, device):
        found = honest(prepared, adapter, "cpu")
        if device == "another":
            found.M *= 1.01
        return found

    monkeypatch.setattr(tiny, "train", train)
    found = tiny.compare(tiny._source(tmp_path), tmp_path, "another", {"rank": 16})
    assert found["status"] == "failed" and found["reason"] == "M differs by 1.0e-02"


@pytest.fixture
def model_in_pieces(suite, tmp_path):
    """The shipped model in two folders, its weights in two pieces."""
    pieces = suite("pieces")
    base, first, second = ROOT / "examples" / "base-model", tmp_path / "first", tmp_path / "second"
    *parts, record = pieces.split(base / "model.safetensors", first, 4_000_000)
    second.mkdir()
    parts[1].rename(second / parts[1].name)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (second / name).write_bytes((base / name).read_bytes())
    assert record.exists() and len(parts) == 2
    return first, second


def test_pieces_are_joined_bit_for_bit_and_what_is_missing_or_damaged_is_refused(suite, tmp_path, model_in_pieces):
    pieces, (first, second) = suite("pieces"), model_in_pieces
    whole = pieces.join([first, second], tmp_path / "whole")
    original = ROOT / "examples" / "base-model" / "model.safetensors"
    assert (whole / original.name).read_bytes() == original.read_bytes()
    assert sorted(path.name for path in whole.iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    with pytest.raises(ValueError, match=r"piece-2-of-2: found in none of .*; bring that piece too"):
        pieces.join([first], tmp_path / "half")
    (piece,) = second.glob("*.piece-*")
    *most, last = piece.read_bytes()
    piece.write_bytes(bytes([*most, last ^ 1]))
    with pytest.raises(ValueError, match="another SHA-256"):
        pieces.join([first, second], tmp_path / "damaged")


def test_a_slim_wheel_holds_one_card_s_library_and_everything_else(suite, tmp_path):
    names = ["bitsandbytes/__init__.py", "bitsandbytes-1.dist-info/METADATA"]
    libraries = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda121", "cuda130", "rocm70")]
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*names, *libraries):
            archive.writestr(name, name)
    slim = suite("slim_wheel").slim(wheel, tmp_path / "slim", "130")
    with zipfile.ZipFile(slim) as archive:
        assert archive.namelist() == [*names, libraries[0], libraries[2]]
        assert archive.read(libraries[2]).decode() == libraries[2]
    with pytest.raises(ValueError, match="has no library for cuda140, only cuda121, cuda130, rocm70"):
        suite("slim_wheel").slim(wheel, tmp_path / "slim", "140")


def test_a_card_s_name_becomes_a_safe_folder(suite):
    safe_name = suite("results").safe_name
    assert safe_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert safe_name("../RTX/4090 ") == "rtx-4090"
    assert safe_name("") == "unknown"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["speed"], "unknown stage 'speed'; expected tiny, steps, longest, clock, decomposition, tests, summary"),
        (["summary", "tests"], "summary stands alone"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_asked_for_wrongly_is_refused_in_one_line(suite, capsys, arguments, reason):
    assert suite("card").main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith("card.sh: ") and reason in line


def test_a_package_that_is_missing_is_named(suite, capsys, monkeypatch):
    monkeypatch.setattr(suite("card"), "NEEDED", ("torch", "no_such_package"))
    assert suite("card").main([]) == 2
    assert "no_such_package not installed here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--wheels"], "--wheels needs a directory"),
        (["--wheels", "/nowhere", "tests"], "no wheels in '/nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_run_is_refused_in_one_line(arguments, reason, tmp_path):
    done = command("--output", tmp_path, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("card.sh: ") and reason in line
    assert not list(tmp_path.iterdir())


def test_without_a_card_nothing_is_measured(suite, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["steps", "--output", str(tmp_path), "--started", "0", "--ends", str(time.time() + 100)]
    assert suite("stages").main(arguments) == 2
    assert "torch finds no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""The clock of benchmarks/speed: turns and ratios, formulas beside what runs, and results that are whole."""

import json
from types import SimpleNamespace

import pytest
import torch
from script_modules import SPEED, script_modules

pytestmark = pytest.mark.filterwarnings("ignore")  # other packages' own, which the command does not show either


@pytest.fixture(scope="module")
def speed():
    with script_modules(SPEED) as module:
        yield module


SMALL = ("--short", "--shapes", "tiny", "--models", "tiny", "--tokens", "32")


def run(speed, output, *arguments):
    """The command in this process: its status, and what it wrote."""
    status = speed("run").main([*arguments, "--output", str(output)])
    return status, json.loads((output / "speed.json").read_text())


@pytest.fixture(scope="module")
def results(speed, tmp_path_factory):
    """What a run of everything but growth at toy size wrote."""
    output = tmp_path_factory.mktemp("speed")
    status, found = run(speed, output, "layers", "models", "floor", *SMALL, "--methods", "qsvft", "svft-authors")
    assert status == 0
    return SimpleNamespace(output=output, rows=found["rows"], run=found["run"])


# The clock


def test_a_ratio_is_of_two_times_out_of_one_round(speed):
    times = {"unit": [1.0, 10.0, 100.0], "other": [2.0, 20.0, 50.0]}
    found = speed("clock").summary(times, "unit")["other"]
    assert found["ratio"] == 2.0 and found["median_ms"] == 20.0  # 20 / 10, and not by chance: another round
    times["other"] = [30.0, 20.0, 100.0]
    assert speed("clock").summary(times, "unit")["other"]["ratio"] == 2.0  # of the medians it would be 3


def test_everything_has_its_turn_in_every_round_and_another_one_begins_each(speed):
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    times = speed("clock").interleaved(steps, 4)
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_time_that_is_up_ends_the_rounds_but_not_before_there_is_a_spread(speed):
    calls = []
    times = speed("clock").interleaved({"a": lambda: calls.append(0)}, 1000, seconds=0.0, warmup=0)
    assert len(times["a"]) == len(calls) == speed("clock").LEAST


@pytest.mark.parametrize(("steps", "rounds", "said"), [({"a": list}, 2, "at least 3"), ({}, 3, "nothing to time")])
def test_too_few_rounds_and_nothing_to_time_are_refused(speed, steps, rounds, said):
    with pytest.raises(ValueError, match=said):
        speed("clock").interleaved(steps, rounds)


# The formulas


TEXTS = (
    *("qlora", "qlora-kbit", "lora", "qsvft", "qsvft:rank=256", "qsvft:factor_bits=4", "qsvft:bits=16"),
    *("qsvft:basis=data,residual=true", "qsvft:sides=one,pattern=banded", "qsvft:sides=one,pattern=plain"),
    *("qsvft:sides=one,pattern=banded,factor_bits=4", "qsvft:sides=both,pattern=banded,rank=full"),
    *("qsvft:sides=both,pattern=banded,rank=50", "qsvft:pattern=plain,sides=both,rank=full,bits=16,factor_bits=16"),
    *("svft", "svft-authors"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_the_flops_that_are_written_down_are_those_that_run(speed, text):
    model = speed("rivals").scenario(speed("rivals").Rival(text, text), speed("sizes").tiny()).model.train()
    layers = dict(speed("described").linears(model))
    assert layers
    for leaf in ("k_proj", "up_proj", "down_proj"):
        layer = next(layers[name] for name in layers if name.endswith(leaf))
        linear = speed("described").described(layer)
        for tokens in (96, 384, 700):
            step = speed("layers").step(layer, tokens, "cpu")
            step()
            ran = speed("operators").counted(step)
            assert (ran.flops, ran.products) == (linear.done(tokens), linear.products(tokens))
            assert linear.work(tokens) <= ran.flops


def test_a_dense_m_asks_for_what_its_formula_says(speed):
    """W, V, U and M forward, all of them and M's gradient backward."""
    m, n, k, t = 96, 64, 16, 32
    linear = speed("parts").Linear(m, n, "both", k, "dense")
    products = [m * n, n * k, k * k, k * m]
    assert linear.work(t, "forward") == 2 * t * sum(products)
    assert linear.work(t, "backward") == 2 * t * (sum(products) + k * k)


def test_an_indexed_pattern_has_no_formula_and_that_is_said(speed):
    rival = speed("rivals").Rival("random", "qsvft:sides=one,pattern=random")
    model = speed("rivals").scenario(rival, speed("sizes").tiny()).model
    _, layer = next(speed("described").linears(model))
    with pytest.raises(ValueError, match=r"found IndexPattern; expected a dense or banded M"):
        speed("described").described(layer)


def test_a_floor_is_the_larger_of_flops_and_bytes(speed):
    roof = speed("roof").Roof(flops=1e9, bandwidth=1e6)
    assert roof.floor_ms(1e9, 0) == roof.floor_ms(0, 1e6) == roof.floor_ms(1e9, 1e6) == 1000
    assert roof.floor_ms(2e9, 1e6) == 2000


# Growth


def test_the_exponent_of_a_power_is_found(speed):
    assert speed("growth").exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="at least two, all positive"):
        speed("growth").exponent([1], [1])


@pytest.mark.parametrize("text", ["qlora:chunked_loss=true", "qsvft", "qsvft:sides=one,pattern=banded", "svft"])
@pytest.mark.parametrize("axis", ["rank", "width", "layers"])
def test_held_bytes_grow_as_the_mathematics_says(speed, text, axis):
    growth, rivals = speed("growth"), speed("rivals")
    rival = next(one for one in rivals.RIVALS if one.text == text)
    start = growth.Point(tokens=64, rank=32, width=256, layers=1)
    points = [growth.replace(start, **{axis: factor * getattr(start, axis)}) for factor in growth.FACTORS]
    live = [growth.bytes_of(rival, point) for point in points]
    for category in growth.HELD:
        if min(one.get(category, 0) for one in live) >= growth.LEAST_BYTES:
            found = growth.exponent([getattr(one, axis) for one in points], [one[category] for one in live])
            expected = growth.asked(rival, axis, category) if axis != "rank" or growth.free_rank(rival) else 0.0
            assert found == pytest.approx(expected, abs=0.15), category  # rounded to 512 bytes


def test_growth_has_its_rows_and_its_picture(speed, tmp_path):
    told = ("growth", "--short", "--methods", "qsvft", "--plot", "growth.png")
    status, found = run(speed, tmp_path, *told)
    assert status == 0 and [row["axis"] for row in found["rows"]] == ["tokens", "rank"] * 2
    for row in found["rows"]:
        assert row["rows"][0]["of"] == "step" and all(len(one["values"]) == 3 for one in row["rows"])
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


# The command


def test_the_results_are_whole_and_say_where_they_are_from(results):
    assert {"cpu", "cores", "threads", "system"} <= results.run["machine"].keys()
    assert {"torch", "peft", "qsvft", "bitsandbytes"} <= results.run["versions"].keys()
    assert results.run["commit"] and {row["status"] for row in results.rows} == {"ran"}
    stages = {row["stage"] for row in results.rows}
    assert stages == {"layer", "step", "roof", "floor", "floor of a step"}
    assert not [path for path in results.output.iterdir() if path.name not in ("results.jsonl", "speed.json")]


def test_every_method_has_times_and_ratios_with_their_spread(results):
    rows = [row for row in results.rows if row["stage"] in ("layer", "step")]
    assert len(rows) == 5  # q, k, up and down, and a step
    for row in rows:
        assert row["methods"].keys() == {"QLoRA r=16", "qsvft", "authors' SVFT"} and not row["refused"]
        for name, one in row["methods"].items():
            assert 0 < one["p20_ms"] <= one["median_ms"] <= one["p80_ms"]
            assert 0 < one["ratio_p20"] <= one["ratio"] <= one["ratio_p80"]
            assert (one["ratio"] == 1) == (name == row["unit"])


def test_every_part_has_its_floor_and_runs_the_flops_that_are_written_down(results):
    rows = [row for row in results.rows if row["stage"] == "floor"]
    assert len(rows) == 3 * 4
    for row in rows:
        assert row["flops_done"] == row["flops_counted"] and row["operators"]["looks"] == 0
        assert all(part["floor_ms"] > 0 and part["median_ms"] > 0 for part in row["parts"])
        assert row["whole"]["floor_ms"] == pytest.approx(sum(part["floor_ms"] for part in row["parts"]))
    named = {part["part"] for row in rows if row["method"] == "qsvft" for part in row["parts"]}
    assert {"W", "W made dense", "to coefficients", "M", "from coefficients", "gradient of M"} <= named


def test_a_step_is_taken_apart_to_its_last_part(results):
    rows = [row for row in results.rows if row["stage"] == "floor of a step"]
    assert [row["method"] for row in rows] == ["QLoRA r=16", "qsvft"]
    for row in rows:
        names = [part["part"] for part in row["parts"]]
        assert names[:-1] == ["recomputation", "attention", "loss", "optimizer"] and "linears" in names[-1]
        assert sum(part["median_ms"] for part in row["parts"]) == pytest.approx(row["whole"]["median_ms"])


def test_what_is_done_is_not_done_again_and_a_half_written_line_is(speed, results, capsys):
    told = ("layers", *SMALL, "--methods", "qsvft", "svft-authors")
    path = results.output / "results.jsonl"
    before = path.read_bytes()
    assert run(speed, results.output, *told)[0] == 0
    assert path.read_bytes() == before
    lines = before.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if b'"stage": "layer"' in line)
    path.write_bytes(b"".join(lines[:first]) + lines[first][:40] + b"\n" + b"".join(lines[first + 1 :]))
    status, found = run(speed, results.output, *told)
    assert status == 0 and {row["case"] for row in found["rows"]} == {row["case"] for row in results.rows}


def test_a_method_that_a_shape_cannot_have_is_named_and_the_others_are_timed(speed, tmp_path, capsys):
    told = ("layers", *SMALL, "--methods", "qsvft:rank=9999", "svft")
    _, found = run(speed, tmp_path, *told)
    for row in found["rows"]:
        assert row["methods"].keys() == {"QLoRA r=16", "plain SVFT"}
        assert "rank=9999" in row["refused"]["qsvft:rank=9999"] or "9999" in row["refused"]["qsvft:rank=9999"]
    assert "over the limit" in capsys.readouterr().out


def test_a_case_that_fails_has_its_reason_and_the_next_one_goes_on(speed, tmp_path, monkeypatch):
    layers = speed("layers")
    own = layers._times

    def failing(bench, built, refused, place, tokens):
        if place.leaf == "q_proj":
            raise RuntimeError("no such kernel")
        return own(bench, built, refused, place, tokens)

    monkeypatch.setattr(layers, "_times", failing)
    status, found = run(speed, tmp_path, "layers", *SMALL, "--methods", "svft")
    assert status == 4
    states = {row["case"].split(" | ")[2].split()[0]: row["status"] for row in found["rows"]}
    assert states == {"q_proj": "failed", "k_proj": "ran", "up_proj": "ran", "down_proj": "ran"}
    assert found["rows"][0]["reason"] == "RuntimeError: no such kernel"


def test_a_compiled_step_is_timed_beside_the_one_as_it_is(speed, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(speed("compiled").WAYS, "torch.compile", {"disable": True})  # which would take a minute
    status, found = run(speed, tmp_path, "compiled", *SMALL)
    assert status == 0
    assert [list(row["methods"]) for row in found["rows"]] == [["as it is", "torch.compile"]]
    assert found["rows"][0]["methods"]["as it is"]["ratio"] == 1.0
    assert "torch.compile" in capsys.readouterr().out


def test_the_coefficients_of_a_group_are_timed_both_ways(speed, tmp_path):
    status, found = run(speed, tmp_path, "grouped", *SMALL)
    assert status == 0 and len(found["rows"]) == 2
    for row in found["rows"]:
        assert row["methods"].keys() == {"a product each", "one product of all"}


def test_a_checkpoint_is_stepped_with_its_own_weights(speed, llama, tmp_path):
    told = ("models", "--short", "--models", "--model", str(llama), "--methods", "svft")
    models = speed("models")
    with torch.random.fork_rng():
        status, found = run(speed, tmp_path, *told)
    (row,) = found["rows"]
    assert status == 0 and row["weights"] == "the checkpoint's" and row["tokens"] == models.CHECKPOINT_TOKENS
    loaded = models.load(llama, "cpu")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    rival = speed("rivals").UNIT
    built = speed("rivals").scenario(rival, loaded.config, "cpu", loaded)
    assert built.base is loaded


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("layer",), "unknown section 'layer'; expected some of layers, models, floor, growth"),
        (("--methods", "qlora", "svtf"), "unknown method 'svtf'; expected one of"),
        (("--methods", "qsvft:colour=red"), "unknown option 'colour'"),
        (("--shapes", "llama-9"), "unknown model 'llama-9'"),
        (("--models", "large"), "--models: unknown model 'large'; expected some of 1024-wide, llama-3-8b, tiny"),
        (("--tokens", "0"), "--tokens: found 0; expected at least 1"),
        (("--rounds", "2"), "--rounds: found 2; expected at least 3"),
        (("--threads", "0"), "--threads: found 0; expected at least 1"),
        (("--model", "/nowhere"), "--model: /nowhere holds no config.json"),
        (("--plot", "growth.gif"), "--plot: found growth.gif; expected a file ending in .png, .svg, .pdf"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_before_anything_runs(speed, arguments, said, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        speed("run").main([*arguments, "--output", str(tmp_path / "out")])
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a CUDA device")
def test_a_device_that_is_not_there_is_said(speed, capsys):
    with pytest.raises(SystemExit, match="2"):
        speed("run").main(["--device", "cuda"])
    assert "torch sees no CUDA device here" in capsys.readouterr().err

"""The profiler's report: its sums, its ratios, which cards fit, the longest sequence, its files."""

import csv
import json

import pytest
import torch
from peft import BOFTConfig, LoraConfig
from small_models import load
from transformers import ViTConfig

import qsvft
from qsvft.memory import CARDS_GIB, METHODS, PRESETS, Row, parse_method
from qsvft.memory.cards import CONTEXT_BYTES, FRAGMENTATION, GIB, check_cards, fits, needed_bytes, usable_bytes
from qsvft.memory.ledger import CATEGORIES, PHASES
from qsvft.memory.measured import check_room
from qsvft.memory.methods import Method
from qsvft.memory.presets import model_config
from qsvft.memory.profiler import LENGTH_STEP, LONGEST, longest_fitting
from qsvft.memory.rows import RIVALS
from qsvft.memory.scenario import Scenario


@pytest.fixture(scope="module")
def report():
    """Every method on the tiny preset."""
    return qsvft.profile("tiny", METHODS, seq_len=64)


def bare(peaks, **changes):
    """A report of made-up peaks, in bytes."""
    rows = [
        Row(name, peak, {**dict.fromkeys(CATEGORIES, 0), "factors": peak}, dict.fromkeys(PHASES, peak))
        for name, peak in peaks.items()
    ]
    return qsvft.MemoryReport("made up", 1, 8, True, "adamw", "meta", {}, rows, **changes)


def test_every_method_runs_on_the_tiny_preset(report):
    assert [row.method for row in report.rows] == list(METHODS)
    assert [row.error for row in report.rows] == [None] * len(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_categories_add_up_to_the_peak(report, method):
    row = next(row for row in report.rows if row.method == method)
    assert set(row.categories) == set(CATEGORIES)
    assert sum(row.categories.values()) == row.peak_bytes > 0
    assert min(row.categories.values()) >= 0


@pytest.mark.parametrize("method", METHODS)
def test_the_peak_is_the_highest_of_the_phases(report, method):
    row = next(row for row in report.rows if row.method == method)
    assert row.peak_bytes == max(row.phase_peaks.values()) == row.phase_peaks[row.peak_phase]


@pytest.mark.parametrize("method", METHODS)
def test_the_thinned_timeline_keeps_the_peak_and_the_phases_in_order(report, method):
    row = next(row for row in report.rows if row.method == method)
    assert max(sum(point.live.values()) for point in row.timeline) == row.peak_bytes
    phases = [point.phase for point in row.timeline]
    assert phases == sorted(phases, key=PHASES.index)
    places = [point.moved_bytes for point in row.timeline]
    assert places == sorted(places)
    assert len(places) <= 1300


def test_the_step_of_full_fine_tuning_ends_before_its_optimizer_is_taken_down(report):
    row = next(row for row in report.rows if row.method == "full")
    assert row.timeline[-1].live["optimizer"] == row.categories["optimizer"] > 0


def test_trainable_parameters_are_those_of_the_method(report):
    counts = {row.method: row.trainable_parameters for row in report.rows}
    model = model_config("tiny")
    width, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    half = width // 2  # keys and values have half the heads
    assert counts["svft"] == layers * (2 * width + 2 * half + 3 * min(width, inner))
    rank = 16
    shapes = [(width, width), (half, width), (half, width), (width, width)] + 3 * [(inner, width)]
    assert counts["lora"] == counts["qlora"] == layers * sum(rank * (m + n) for m, n in shapes)
    assert counts["floor"] == 0


def test_times_smaller_is_the_rivals_peak_over_the_rows(report):
    peaks = {row.method: row.peak_bytes for row in report.rows}
    for row in report.rows:
        assert report.times_smaller(row) == {rival: peaks[rival] / row.peak_bytes for rival in RIVALS}


def test_a_rival_that_was_not_asked_for_has_no_ratio():
    report = bare({"qsvft": 100, "lora": 250})
    assert report.times_smaller(report.rows[0]) == {"lora": 2.5}


def test_a_card_fits_up_to_the_allowance_and_not_above():
    for card in CARDS_GIB:
        limit = usable_bytes(card)
        assert fits(limit - 2, card)
        assert not fits(limit + 2, card)
        assert limit * (1 + FRAGMENTATION) + CONTEXT_BYTES == pytest.approx(card * GIB)


def test_fits_gib_holds_the_peak_and_the_allowance_against_each_card():
    report = bare({"small": 5 * GIB, "middle": 15 * GIB, "large": 60 * GIB}, cards=(8, 16, 24))
    assert [report.fits_gib(row) for row in report.rows] == [[8, 16, 24], [24], []]
    for row in report.rows:
        for card in report.cards:
            assert (card in report.fits_gib(row)) == (needed_bytes(row.peak_bytes) <= card * GIB)


def test_cards_are_sorted_and_each_once():
    assert check_cards([24, 8.0, 24.0, 7.5]) == (7.5, 8, 24)


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf"), True, "8"])
def test_a_card_of_no_size_is_refused(size):
    with pytest.raises(ValueError, match="expected a size in GiB above 0"):
        check_cards([size])


def test_the_longest_sequence_fits_and_the_next_does_not():
    card = 0.7525  # GiB; 2.5 MiB of peak beside the allowance
    found = qsvft.profile("tiny", ["floor", "qlora"], seq_len=64, max_seq_len_gib=card)
    for row in found.rows:
        assert row.max_seq_len >= LENGTH_STEP, row.error
        for length, expected in ((row.max_seq_len, True), (row.max_seq_len + LENGTH_STEP, False)):
            [fresh] = qsvft.profile("tiny", [row.method], seq_len=length).rows
            assert fits(fresh.peak_bytes, card) is expected


def test_a_model_that_was_stepped_before_counts_as_a_fresh_one():
    method = parse_method("qsvft")
    used = Scenario(model_config("tiny"), method, True, "adamw", "meta")
    used.count(1, 200)
    fresh = Scenario(model_config("tiny"), method, True, "adamw", "meta")
    assert used.count(1, 100)[0].peaks() == fresh.count(1, 100)[0].peaks()


@pytest.mark.parametrize("start", [1, 128, 2048, 10**6])
@pytest.mark.parametrize(
    "peak",
    [
        lambda n: 5 * GIB + 2**20 * n,
        lambda n: max(9 * GIB, 2**21 * n, 2**22 * n - 3 * GIB),
        lambda n: 2 * GIB if n < 5000 else 40 * GIB,
        lambda n: GIB + 300 * n * n,
        lambda n: 3 * GIB,
        lambda n: 30 * GIB,
        lambda n: 22 * GIB + 2**24 * n,
    ],
)
def test_the_search_finds_what_trying_every_length_finds_in_few_steps(peak, start):
    asked = []

    def peak_at(length):
        asked.append(length)
        return peak(length)

    lengths = range(LENGTH_STEP, LONGEST + 1, LENGTH_STEP)
    expected = max((n for n in lengths if fits(peak(n), 24)), default=0)
    assert longest_fitting(peak_at, 24, start) == expected
    assert len(asked) == len(set(asked)) <= 30


def test_a_card_too_small_for_128_tokens_says_none():
    report = qsvft.profile("tiny", ["floor"], seq_len=64, max_seq_len_gib=0.75)
    assert report.rows[0].max_seq_len == 0
    assert "none" in str(report)
    assert report.to_dict()["rows"][0]["max_seq_len"] is None


def test_a_model_its_config_and_its_directory_give_the_same_bytes(llama):
    model = load(llama)
    peaks = {
        qsvft.profile(m, ["floor"], seq_len=16).rows[0].peak_bytes for m in (model, model.config, str(llama), llama)
    }
    assert len(peaks) == 1


def test_a_quantised_models_config_counts_as_the_full_precision_one(llama):
    model = load(llama)
    before = qsvft.profile(model, ["floor", "svft"], seq_len=16).rows
    qsvft.quantize(model, 4, progress=False)
    after = qsvft.profile(model, ["floor", "svft"], seq_len=16).rows
    assert [row.peak_bytes for row in before] == [row.peak_bytes for row in after]
    assert model.config.quantization_config is not None


@pytest.mark.parametrize("method", ["qlora", "svft", "qsvft"])
def test_the_prediction_equals_a_real_step_to_the_byte(method):
    rows = [qsvft.profile("tiny", [method], seq_len=32, device=device).rows[0] for device in ("meta", "cpu")]
    assert rows[0].error is rows[1].error is None
    assert rows[0].categories == rows[1].categories


@pytest.mark.parametrize(("text", "bits"), [("lora:8", 16), ("qlora:8", 4), ("boft:4", 16)])
def test_any_config_of_pefts_is_counted_as_the_text_that_says_the_same(text, bits):
    fields = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = BOFTConfig(boft_block_size=4, **fields) if text.startswith("boft") else LoraConfig(r=8, **fields)
    said, of_config = qsvft.profile("tiny", [text, Method.of("mine", config, bits)], 1, 32).rows
    assert of_config.method == "mine" and of_config.error is None
    assert of_config.categories == said.categories and of_config.trainable_parameters == said.trainable_parameters


@pytest.mark.parametrize("change", [{"gradient_checkpointing": False}, {"batch_size": 2}, {"seq_len": 128}])
def test_more_is_kept_without_checkpointing_and_with_more_tokens(change):
    settings = {"methods": ["qlora"], "seq_len": 64}
    small = qsvft.profile("tiny", **settings).rows[0].peak_bytes
    assert qsvft.profile("tiny", **{**settings, **change}).rows[0].peak_bytes > small


def test_sgd_takes_the_optimizers_state_away():
    assert qsvft.profile("tiny", ["lora"], seq_len=64, optimizer="sgd").rows[0].categories["optimizer"] == 0


def test_a_method_that_cannot_run_says_why_and_leaves_the_others():
    report = qsvft.profile("tiny", ["floor", "qsvft:999", "svft"], seq_len=32)
    assert [row.error is None for row in report.rows] == [True, False, True]
    assert "rank=999" in report.rows[1].error
    assert "qsvft:999 could not run" in str(report)
    assert report.fits_gib(report.rows[1]) == []
    alone = qsvft.profile("tiny", ["floor", "svft"], seq_len=32)
    assert [row.peak_bytes for row in report.ran] == [row.peak_bytes for row in alone.rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_or_config": "no/such-model"}, "unknown model 'no/such-model'"),
        ({"model_or_config": 7}, "got int"),
        ({"model_or_config": ViTConfig()}, "ViTConfig: not a causal language model"),
        ({"methods": ["nope"]}, "unknown method 'nope'"),
        ({"methods": []}, "no methods given"),
        ({"methods": ["lora:0"]}, "'lora:0': rank"),
        ({"methods": ["qsvft:sides=three"]}, "'qsvft:sides=three'.*sides"),
        ({"methods": ["qsvft:bits=8"]}, "'qsvft:bits=8'"),
        ({"methods": ["qsvft:rank=full"]}, "'qsvft:rank=full': a dense M takes a number.*pattern="),
        ({"seq_len": 0}, "seq_len.*got 0"),
        ({"seq_len": 2.5}, "seq_len.*got 2.5"),
        ({"batch_size": -1}, "batch_size.*got -1"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"cards": [0]}, "card: expected a size"),
        ({"max_seq_len_gib": -1}, "card: expected a size"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        qsvft.profile(**{"model_or_config": "tiny", "methods": ["floor"], "seq_len": 32, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        qsvft.profile("tiny", ["floor"], device="cuda")


def test_sizes_that_do_not_go_together_name_the_model():
    config = model_config("tiny")
    config.num_attention_heads = 0
    with pytest.raises(ValueError, match=r"model 'llama' cannot be built"):
        qsvft.profile(config, ["floor"])


def test_a_model_larger_than_the_free_memory_is_not_measured(monkeypatch):
    monkeypatch.setattr("qsvft.memory.measured.free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"cannot measure 'tiny'.*free on cpu"):
        check_room("tiny", model_config("tiny"), "cpu")


def test_the_json_holds_every_row_and_what_it_was_made_with(report, tmp_path):
    report.write_json(tmp_path / "report.json")
    record = json.loads((tmp_path / "report.json").read_text())
    assert {name: record[name] for name in ("model", "batch_size", "seq_len", "gradient_checkpointing", "device")} == {
        "model": "tiny",
        "batch_size": 1,
        "seq_len": 64,
        "gradient_checkpointing": True,
        "device": "meta",
    }
    assert {"qsvft", "torch", "transformers", "peft", "bitsandbytes", "python"} == set(record["versions"])
    for row, written in zip(report.rows, record["rows"], strict=True):
        assert written["method"] == row.method
        assert written["peak_bytes"] == sum(written["categories"].values()) == row.peak_bytes
        assert list(written["phase_peaks"]) == list(PHASES)
        assert written["trainable_parameters"] == row.trainable_parameters
        assert written["fits_gib"] == list(CARDS_GIB)
        assert written["needed_bytes"] == needed_bytes(row.peak_bytes)


def test_the_json_gives_a_failed_methods_reason(tmp_path):
    report = bare({"lora": 100})
    report.rows.append(Row("qlora", error="RuntimeError: no"))
    assert report.to_dict()["rows"][1] == {"method": "qlora", "error": "RuntimeError: no"}


def test_the_csv_holds_the_same_bytes(report, tmp_path):
    report.rows.append(Row("qlora:9", error="ValueError: a, b"))
    try:
        report.write_csv(tmp_path / "report.csv")
    finally:
        report.rows.pop()
    with open(tmp_path / "report.csv", newline="") as file:
        *lines, failed = csv.DictReader(file)
    assert [line["method"] for line in lines] == [row.method for row in report.rows]
    for row, line in zip(report.rows, lines, strict=True):
        assert int(line["peak_bytes"]) == sum(int(line[name]) for name in CATEGORIES) == row.peak_bytes
        assert line["fits_gib"] == "8 12 16 24"
        assert float(line["times smaller than lora"]) == report.times_smaller(row)["lora"]
    assert (failed["method"], failed["peak_bytes"], failed["error"]) == ("qlora:9", "", "ValueError: a, b")


def test_the_text_shows_each_method_and_says_where_the_allowance_was_measured(report):
    text = str(report)
    assert all(f"\n {method} " in text for method in METHODS)
    assert "8% of it" in text and "what an H200 took at most" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 160


def test_gib_are_shown_where_something_reaches_one():
    assert "GiB" in str(bare({"lora": 3 * GIB // 2})).splitlines()[3]
    assert " 1.50 " in str(bare({"lora": 3 * GIB // 2}))
    assert " 1.50 " in str(bare({"lora": 3 * 2**20 // 2}))


def test_presets_are_what_the_error_lists():
    with pytest.raises(ValueError, match=", ".join(PRESETS)):
        qsvft.profile("no/such-model")

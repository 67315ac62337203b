"""qsvft.recommend: the best settings that fit a card, and what would fit where none do."""

import importlib
import json
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, LlamaConfig, ViTConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import qsvft
from qsvft import QSVFTConfig
from qsvft.memory import parse_method
from qsvft.memory.cards import GIB, fits, needed_bytes, usable_bytes
from qsvft.memory.fit.ladder import DEFAULTS, FIXABLE, RANKS, STEPS, ladder
from qsvft.memory.scenario import Scenario
from qsvft.memory.shapes import model_without_values

module = importlib.import_module("qsvft.memory.fit.recommend")  # the package's attribute is the function
TOKENS = 1024  # a checkpoint of width 512 is then large enough to be offloaded
CONFIG = LlamaConfig(
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=5,  # of which offloading leaves two checkpoints on the card
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=4096,
    tie_word_embeddings=False,
)


PEAKS = {}


class Remembered:
    """Stands in for a scenario: each step is counted once in this file."""

    def __init__(self, config, method, checkpointing, *rest):
        self.arguments = (config, method, checkpointing, *rest)
        self.key = (config.to_json_string(), str(method.options), checkpointing, *rest)

    def count(self, batch_size, seq_len):
        key = (*self.key, batch_size, seq_len)
        if key not in PEAKS:
            ledger, _ = Scenario(*self.arguments).count(batch_size, seq_len)
            PEAKS[key] = ledger.peaks()["total"].nbytes
        return SimpleNamespace(peaks=lambda: {"total": SimpleNamespace(nbytes=PEAKS[key])}), 0


@pytest.fixture(autouse=True)
def counts_are_remembered(monkeypatch):
    monkeypatch.setattr(module, "Scenario", Remembered)


def made_up(monkeypatch, peak_of):
    """Let a step's peak be ``peak_of(options, batch_size, seq_len)``; returns the steps that are asked for."""
    asked = []

    class MadeUp:
        def __init__(self, config, method, checkpointing, *_):
            self.options = {**method.options, "gradient_checkpointing": checkpointing}

        def count(self, batch_size, seq_len):
            asked.append((self.options, batch_size, seq_len))
            peak = peak_of(self.options, batch_size, seq_len)
            return SimpleNamespace(peaks=lambda: {"total": SimpleNamespace(nbytes=peak)}), 0

    monkeypatch.setattr(module, "Scenario", MadeUp)
    return asked


@pytest.fixture(scope="module")
def rungs():
    return ladder(model_without_values(CONFIG), {})


@pytest.fixture(scope="module")
def peaks(rungs):
    arguments = ("adamw", "meta")
    steps = (Remembered(CONFIG, rung.method, rung.checkpointing, *arguments).count(1, TOKENS) for rung in rungs)
    return [ledger.peaks()["total"].nbytes for ledger, _ in steps]


def card_for(peaks, place):
    """A card between what a rung needs and what the one before it needs, in GiB."""
    needed = [needed_bytes(peak) for peak in peaks]
    above = needed[place - 1] if place else 2 * needed[0]
    return (needed[place] + above) / 2 / GIB


def recommend(card_gib, **changes):
    return qsvft.recommend(CONFIG, card_gib, TOKENS, **changes)


def test_each_rung_gives_up_one_thing_and_takes_fewer_bytes(rungs, peaks):
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    for above, below in pairwise(rungs):
        changed = [name for name in DEFAULTS if above.settings[name] != below.settings[name]]
        assert changed == [below.steps[-1].option]


def test_the_ladder_starts_at_the_best_and_ends_with_every_step_taken():
    rungs = ladder(model_without_values(CONFIG), {}, tokens=4096)
    assert rungs[0].settings == {**DEFAULTS, "gradient_checkpointing": False}
    last = {step.option: step.value for step in STEPS}
    assert rungs[-1].settings == {**DEFAULTS, **last}
    assert {step.option for step in rungs[-1].steps} == set(last)


def ranks(**fixed):
    """The ranks on the way down."""
    return list(dict.fromkeys(rung.settings["rank"] for rung in ladder(model_without_values(CONFIG), fixed)))


def test_ranks_that_save_nothing_or_that_a_layer_does_not_have_are_left_out():
    assert ranks() == [None, 64, 32, 16]  # None is 128 for a dense M
    assert ranks(pattern="banded", sides="one") == [None, 256, 128, 64, 32, 16]  # k and v have 256 directions
    assert ranks(pattern="banded", off_diagonals=100) == [None, 256, 128]
    assert ranks(target_modules=["k_proj"], pattern="plain") == [None, 128, 64, 32, 16]
    assert set(RANKS) > {256, 128, 64, 32, 16}


def test_the_defaults_are_those_of_prepare(model):
    config, ours = QSVFTConfig(), QSVFTConfig(rank=DEFAULTS["rank"], factor_bits=DEFAULTS["factor_bits"])
    assert (config.rank, config.factor_bits) == (ours.rank, ours.factor_bits) == (128, 8)
    prepared = qsvft.prepare(model).get_base_model()
    told = {name: DEFAULTS[name] for name in ("gradient_checkpointing", "quantize_embeddings", "offload", "tile_mlp")}
    assert told == {
        "gradient_checkpointing": prepared.model.layers[0].gradient_checkpointing,
        "quantize_embeddings": 8 * prepared.get_input_embeddings().weight.element_size(),
        "offload": hasattr(prepared.model, "qsvft_offload"),
        "tile_mlp": type(prepared.model.layers[0].mlp) is not LlamaMLP,
    }


@pytest.mark.parametrize(
    "fixed",
    [
        {"rank": None},
        {"rank": 128},
        {"factor_bits": 8},
        {"factor_bits": 16, "sides": "one"},
        {"pattern": "plain"},
        {"pattern": "banded", "sides": "one", "off_diagonals": 2},
        {"sides": "both"},
        {"decomposition": "exact"},
        {"residual": True, "sides": "both"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "offload": False, "quantize_embeddings": 16},
        {"chunked_loss": False},
    ],
    ids=str,
)
def test_a_fixed_option_stays_as_it_is_on_every_rung(fixed):
    rungs = ladder(model_without_values(CONFIG), fixed, tokens=4096)
    largest, bits = (512, 16) if "pattern" in fixed else (128, 8)
    for rung in rungs:
        assert {name: rung.settings[name] for name in fixed} == fixed
        assert not {step.option for step in rung.steps} & set(fixed)
        assert rung.options.items() >= fixed.items()
    for step in STEPS:
        if step.option in fixed:
            continue
        reached = any(step in rung.steps for rung in rungs)
        impossible = {
            "offload": fixed.get("gradient_checkpointing") is False,
            "tile_mlp": fixed.get("gradient_checkpointing") is False,
            "rank": step.value >= largest,
            "factor_bits": step.value >= bits,
        }
        assert reached is not impossible.get(step.option, False), step


@pytest.mark.parametrize(("tokens", "tiled"), [(0, False), (2048, False), (2049, True)])
def test_mlps_are_taken_in_tiles_where_a_step_has_more_tokens_than_a_tile(tokens, tiled):
    rungs = ladder(model_without_values(CONFIG), {}, tokens)
    assert [rung.settings["tile_mlp"] for rung in rungs] == [False, False] + [tiled] * (len(rungs) - 2)


def test_tiles_are_what_a_long_sequence_asks_for_before_anything_is_rounded(model):
    whole, tiled = (
        qsvft.profile(CONFIG, text, seq_len=8192).rows[0].peak_bytes for text in ("qsvft", "qsvft:tile_mlp=true")
    )
    assert tiled < 0.9 * whole
    found = qsvft.recommend(CONFIG, needed_bytes(tiled) / GIB, seq_len=8192)
    assert found.fits and found.options == {"tile_mlp": True}


def test_offloading_keeps_checkpoints_and_so_needs_them():
    assert ladder(model_without_values(CONFIG), {"offload": True})[0].checkpointing
    assert not any(
        rung.settings["offload"] for rung in ladder(model_without_values(CONFIG), {"gradient_checkpointing": False})
    )


@given(st.lists(st.integers(1, 30 * GIB), min_size=1, max_size=40), st.floats(0.1, 40), st.floats(0, 10))
def test_the_search_finds_what_trying_every_rung_finds_in_few_steps(peaks, card, more):
    peaks.sort(reverse=True)
    asked = []
    found = module.first_fitting(peaks, lambda peak: asked.append(peak) or peak, card)
    assert found == next((i for i, peak in enumerate(peaks) if fits(peak, card)), len(peaks))
    assert len(asked) <= len(peaks).bit_length()
    assert set(peaks[max(found - 1, 0) : found + 1]) <= set(asked)
    assert module.first_fitting(peaks, lambda peak: peak, card + more) <= found


@pytest.mark.parametrize("place", range(9))
def test_what_is_chosen_fits_and_the_next_better_does_not(rungs, peaks, place):
    card = card_for(peaks, place)
    found = recommend(card)
    assert found.fits and found.peak_bytes == peaks[place] and found.options == rungs[place].options
    assert found.needed_bytes == needed_bytes(peaks[place]) <= card * GIB
    assert found.nearest_change is None and found.changes == ()
    if place:
        assert needed_bytes(peaks[place - 1]) > card * GIB
        assert str(rungs[place - 1]) in found.reasons[-1]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.76, 0.86), min_size=2, max_size=2))
def test_a_larger_card_never_gets_leaner_settings(cards):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Scenario", Remembered)
        small, large = (recommend(card) for card in sorted(cards))
    assert (small.fits, small.peak_bytes) <= (large.fits, large.peak_bytes)


def test_few_steps_are_counted_and_each_once(monkeypatch):
    asked = made_up(monkeypatch, lambda options, *_: (options["factor_bits"] or 16) * GIB)
    assert recommend(9.5, pattern="plain").options["factor_bits"] == 8
    assert len(asked) == len(set(map(str, asked))) <= 4


def test_the_method_says_to_the_profiler_what_was_counted(peaks):
    found = recommend(card_for(peaks, 7))
    [row] = qsvft.profile(CONFIG, [found.method], seq_len=TOKENS).rows
    assert row.peak_bytes == found.peak_bytes
    assert parse_method(found.method).options == {
        "rank": 32,
        "factor_bits": 4,
        "quantize_embeddings": 4,
        "offload": True,
    }


@pytest.mark.parametrize(
    "fixed",
    [
        {"pattern": "top_k", "off_diagonals": 3},
        {"sides": "one", "rank": 32},
        {"decomposition": "float32", "rank": 16},
    ],
    ids=str,
)
def test_fixed_options_are_counted_and_written_into_the_method(fixed):
    found = qsvft.recommend("tiny", 4, 32, **fixed)
    [row] = qsvft.profile("tiny", [found.method], seq_len=32, gradient_checkpointing=False).rows
    assert row.peak_bytes == found.peak_bytes
    assert found.options == {"gradient_checkpointing": False, **fixed}


def test_layers_chosen_by_name_and_other_optimizers_are_counted():
    fixed = {"gradient_checkpointing": True, "optimizer": "sgd"}
    everything, few = (
        qsvft.recommend("tiny", 4, 32, **fixed, **names) for names in ({}, {"target_modules": ["q_proj"]})
    )
    assert (
        few.peak_bytes < everything.peak_bytes < qsvft.recommend("tiny", 4, 32, gradient_checkpointing=True).peak_bytes
    )
    assert few.options["target_modules"] == ["q_proj"] and "optimizer" not in few.options


def changed(found, change):
    """The recommendation for the same step with a change."""
    sizes = {"card_gib": found.card_gib, "seq_len": found.seq_len, "batch_size": found.batch_size}
    return qsvft.recommend(CONFIG, **{**sizes, **change})


def line(monkeypatch, base, tokens_a_gib):
    """Let a step take ``base`` GiB, some bytes more the better the settings, and a GiB for so many tokens."""

    def peak(options, batch_size, seq_len):
        better = (options["factor_bits"] or 8) // 4 + (options["rank"] or 10**5) // 1000 + 1 - options["offload"]
        return int((base + batch_size * seq_len / tokens_a_gib) * GIB) + better

    made_up(monkeypatch, peak)


@pytest.mark.parametrize(
    ("base", "batch_size", "seq_len", "expected"),
    [
        (1, 1, 2048, ["seq_len", "card_gib"]),  # 1792 tokens, or a card of 6 GiB
        (1, 1, 2000, ["seq_len", "card_gib"]),
        (2.8, 1, 1000, ["card_gib", "seq_len"]),  # 640 tokens, or a card of 6 GiB
        (4.2, 1, 512, ["card_gib"]),
        (4.06, 1, 100, ["card_gib"]),
        (1, 6, 640, ["batch_size"]),
        (1, 2, 2048, ["card_gib", "seq_len"]),
    ],
)
def test_each_change_lets_the_leanest_settings_fit_and_is_the_smallest(
    monkeypatch, base, batch_size, seq_len, expected
):
    line(monkeypatch, base, 615)
    found = qsvft.recommend(CONFIG, 5, seq_len, batch_size)
    leanest = ladder(model_without_values(CONFIG), {}, seq_len * batch_size)[-1]
    assert not found.fits and found.options == leanest.options
    assert [name for change in found.changes for name in change] == expected
    assert found.nearest_change == found.changes[0]
    for change in found.changes:
        assert changed(found, change).fits
        [(name, value)] = change.items()
        step = {"seq_len": 128, "batch_size": 1, "card_gib": -0.1}[name]
        assert not changed(found, {name: value + step}).fits
        assert f"{value:g}" in found.reasons[-1]


def test_the_longest_sequence_is_counted_for_real(peaks):
    card = (needed_bytes(peaks[-1]) * 0.985) / GIB
    found = recommend(card)
    assert not found.fits and found.peak_bytes == peaks[-1]
    shorter = next(change for change in found.changes if "seq_len" in change)
    assert shorter["seq_len"] % 128 == 0 and shorter["seq_len"] < TOKENS
    assert changed(found, shorter).fits and not changed(found, {"seq_len": shorter["seq_len"] + 128}).fits
    for change in found.changes:
        assert changed(found, change).fits


def test_the_text_names_the_numbers_the_steps_and_the_line_to_run(peaks):
    found = recommend(card_for(peaks, 4), pattern="banded")
    text = str(found)
    assert f"{found.peak_bytes / 2**20:.2f} MiB" in text
    assert "batch 1 x 1024 tokens, adamw: fits" in text and "as given: pattern='banded'" in text
    for name, value in found.options.items():
        assert f"{name}={value!r}" in text
    code = text.splitlines()[-1]
    assert code == f"model = qsvft.prepare(model, bits=4, {', '.join(f'{k}={v!r}' for k, v in found.options.items())})"


@pytest.mark.parametrize("more", [0, 1, GIB])
def test_the_text_says_what_calibration_would_need_and_whether_that_fits(monkeypatch, more):
    peak = usable_bytes(8)
    made_up(monkeypatch, lambda options, batch_size, seq_len: peak + (more if options.get("basis") == "data" else 0))
    [line] = [reason for reason in recommend(8).reasons if reason.startswith("calibration=batches")]
    assert line.endswith("which fits too" if not more else "which does not fit")
    assert f"{math.ceil(needed_bytes(peak + more) / GIB * 100) / 100:.2f} GiB" in line


@pytest.mark.parametrize(
    "fixed",
    [{"pattern": "banded"}, {"sides": "one", "rank": 32}, {"basis": "data", "residual": True}, {"residual": True}],
    ids=str,
)
def test_calibration_is_no_reason_where_it_is_on_or_cannot_be(monkeypatch, fixed):
    made_up(monkeypatch, lambda *_: GIB)
    assert not any("calibration" in reason for reason in recommend(8, **fixed).reasons)


def test_the_text_says_what_does_not_fit_and_never_rounds_it_down_to_the_card(monkeypatch):
    peak = usable_bytes(8) + 100
    made_up(monkeypatch, lambda options, batch_size, seq_len: peak)
    found = recommend(8, rank=None)
    text = str(found)
    assert not found.fits and ": nothing fits\n" in text and "needs 8.01 GiB" in text
    assert "what would fit: a card of 8.1 GiB" in text
    fit = {"card_gib": 8.1, "seq_len": TOKENS, "batch_size": 1, "optimizer": "adamw"}
    assert text.splitlines()[-1] == f"model = qsvft.prepare(model, bits=4, fit={fit!r}, rank=None)"


def test_the_line_to_run_asks_for_the_same_card_where_a_shorter_sequence_fits(monkeypatch):
    line(monkeypatch, 2.8, 585)
    found = recommend(5)
    assert list(found.nearest_change) == ["card_gib"]
    assert f"fit={{'card_gib': 5, 'seq_len': {found.changes[1]['seq_len']}," in str(found)


@pytest.mark.parametrize("card", [0.751, 0.9, 12])
def test_the_record_survives_json(card):
    found = qsvft.recommend("tiny", card, 64, target_modules={"q_proj", "v_proj"})
    record = json.loads(json.dumps(found.to_dict()))
    assert record == found.to_dict()
    assert record["options"]["target_modules"] == ["q_proj", "v_proj"]
    for name in ("model", "card_gib", "seq_len", "batch_size", "method", "peak_bytes", "needed_bytes", "fits"):
        assert record[name] == getattr(found, name)
    assert record["reasons"] == list(found.reasons) and record["changes"] == list(found.changes)
    assert record["nearest_change"] == found.nearest_change


def test_a_recommendation_is_frozen_and_says_nothing_while_it_is_made(capfd):
    found = qsvft.recommend("tiny", 8, 32, progress=True)
    with pytest.raises(AttributeError):
        found.fits = False
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_or_config": "no/such-model"}, "unknown model 'no/such-model'"),
        ({"model_or_config": 7}, "got int"),
        ({"model_or_config": ViTConfig()}, "ViTConfig: not a causal language model"),
        ({"card_gib": 0}, "card: expected a size in GiB above 0, got 0"),
        ({"card_gib": -8}, "got -8"),
        ({"card_gib": float("nan")}, "got nan"),
        ({"card_gib": "8GiB"}, "got '8GiB'"),
        ({"seq_len": 1}, "seq_len.*got 1"),
        ({"batch_size": 0}, "batch_size.*got 0"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"depth": 3}, f"'depth' is unknown.*{FIXABLE[0]}"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' is unknown, or not counted"),
        ({"pattern": "zebra"}, "'tiny'.*pattern.*'zebra'"),
        ({"rank": 999}, "'tiny'.*rank=999 is over the limit"),
        ({"factor_bits": 5}, "factor_bits.*got 5"),
        ({"quantize_embeddings": 3}, "quantize_embeddings: expected 16, 8 or 4, got 3"),
        ({"gradient_checkpointing": "no"}, "gradient_checkpointing: expected True or False, got 'no'"),
        ({"target_modules": ["nose"]}, "'nose' matches no module"),
        ({"target_modules": ["input_layernorm"]}, "LlamaRMSNorm"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        qsvft.recommend(**{"model_or_config": "tiny", "seq_len": 32, **arguments})
    assert "\n" not in str(caught.value)


def test_a_classifier_with_a_language_models_config_is_refused(llama):
    model = AutoModelForSequenceClassification.from_pretrained(llama, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification: expected a causal.*LlamaForCausalLM"):
        qsvft.recommend(model, 8, 32)


def test_a_step_that_breaks_names_the_model_and_the_settings(monkeypatch):
    def fail(*_):
        raise RuntimeError("no such kernel")

    made_up(monkeypatch, fail)
    with pytest.raises(
        ValueError, match=r"'tiny': a step of qsvft.* cannot be counted \(RuntimeError: no such kernel\)"
    ):
        qsvft.recommend("tiny", 8, 32)

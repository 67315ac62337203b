"""The runs with other settings: every value is tried, what this processor lacks is named, one failure fails all."""

from __future__ import annotations

from itertools import combinations, product

import elsewhere
import pytest


@pytest.fixture
def ran(monkeypatch):
    """The settings that would be run; all of them pass."""
    settings = []
    monkeypatch.setattr(elsewhere, "run", lambda setting, workers, arguments: settings.append(setting) or (0, "passed"))
    monkeypatch.setattr(elsewhere, "_capability", lambda: "avx512")
    return settings


def test_all_settings_hold_every_combination_once(ran):
    assert elsewhere.main(["--all"]) == 0
    assert len(set(ran)) == len(ran) == 1 + 4 * 2 * 3 * 2
    for name, values in (
        ("offset", elsewhere.OFFSETS),
        ("threads", elsewhere.THREADS),
        ("capability", elsewhere.CAPABILITIES),
        ("onednn", (*elsewhere.ONEDNN, "SSE41")),
    ):
        assert {getattr(setting, name) for setting in ran} == set(values)


def test_without_a_word_any_two_values_meet_in_one_of_the_settings(ran):
    assert elsewhere.main([]) == 0
    assert len(set(ran)) == len(ran) <= 13
    every = {
        "offset": elsewhere.OFFSETS,
        "threads": elsewhere.THREADS,
        "capability": elsewhere.CAPABILITIES,
        "onednn": elsewhere.ONEDNN,
    }
    for one, other in combinations(every, 2):
        met = {(getattr(setting, one), getattr(setting, other)) for setting in ran}
        assert met >= set(product(every[one], every[other])), (one, other)


def test_the_short_form_takes_few_that_are_not_the_usual_one(ran):
    assert elsewhere.main(["--short"]) == 0
    assert 1 <= len(ran) <= 3
    assert all(setting.offset % 64 and setting.capability != "avx512" for setting in ran)


def test_what_the_processor_has_not_is_named_and_left_out(ran, monkeypatch, capsys):
    monkeypatch.setattr(elsewhere, "_capability", lambda: "avx2")
    assert elsewhere.main([]) == 0
    assert {setting.capability for setting in ran} == {"default", "avx2"}
    said = capsys.readouterr().out
    assert said.count("left out, not on this processor") == len(elsewhere.PAIRS) - len(ran) > 0


def test_one_failure_fails_all_and_is_shown(ran, monkeypatch, capsys):
    def failing(setting, workers, arguments):
        return (1, "1 failed") if setting == elsewhere.SHORT[0] else (0, "passed")

    monkeypatch.setattr(elsewhere, "run", failing)
    assert elsewhere.main(["--short"]) == 1
    assert "1 failed" in capsys.readouterr().out


def test_a_setting_reaches_what_it_is_for():
    setting = elsewhere.Setting(38, 2, "avx2", "AVX2")
    assert setting.environment == {
        "QSVFT_TEST_OFFSET": "38",
        "QSVFT_TEST_THREADS": "2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    }


def test_the_files_with_marked_tests_are_found():
    names = {path.rpartition("/tests/")[2] for path in elsewhere.marked()}
    assert {"anywhere/test_addresses.py", "anywhere/test_files.py", "test_loading.py"} <= names
    assert "test_house.py" not in names

"""Regular expressions in a config that would not end."""

import re
import subprocess

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from qsvft import QSVFTConfig
from qsvft.tuner import slow_patterns
from qsvft.tuner.targets import check_targets

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
SLOW = r"(\w+)+\d"


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": f"model.(.*_proj|{SLOW}x)"},
        {"exclude_modules": f"(.*head|model.layers.0.self_attn.{SLOW}y)"},
        {"rank_pattern": {"q_proj": 4, SLOW + "z": 4}},
        {"layers_to_transform": [0], "layers_pattern": f"layers|(\\w+)+{SLOW}"},
        {"modules_to_save": ["lm_head", SLOW + "w"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_pattern_that_would_not_end_is_refused_in_time_with_its_field(monkeypatch, fields):
    monkeypatch.setattr(slow_patterns, "SECONDS", 1)
    monkeypatch.setattr(slow_patterns, "_TRY", "import time; time.sleep(60)")
    *_, field = fields
    with pytest.raises(ValueError, match=rf"{field}: '.*' takes more than 1 s to be compared with the names"):
        check_targets(llama(), QSVFTConfig(**fields))


def test_a_slow_pattern_is_slow_on_real_names(monkeypatch):
    monkeypatch.setattr(slow_patterns, "SECONDS", 1)
    names = ["model.layers.0.self_attn.some_very_long_projection_of_a_layer_norm"]
    config = QSVFTConfig(target_modules=r".*\.(\w+)+-")
    with pytest.raises(ValueError, match=r"target_modules: '\.\*.*takes more than 1 s.*model's 1 modules"):
        slow_patterns.check_patterns(config, names)


def test_usual_patterns_and_names_start_no_process(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)
    for fields in (
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 4}},
        {"exclude_modules": r".*down_proj", "modules_to_save": ["lm_head"]},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
    ):
        assert check_targets(llama(), QSVFTConfig(rank=4, **fields))


def test_a_pattern_of_many_repeats_that_ends_is_taken_for_what_it_says():
    names = check_targets(llama(), QSVFTConfig(rank=4, target_modules=r"(.*\.)*layers\.\d+\.(\w+\.)+[qk]_proj"))
    assert names and all(re.search("[qk]_proj$", name) for name in names)


def test_where_no_process_can_be_started_a_pattern_is_not_tried(monkeypatch):
    monkeypatch.setattr(slow_patterns.sys, "executable", "/nowhere/python")
    assert check_targets(llama(), QSVFTConfig(rank=4, target_modules=r"(.*\.)*[qk]_proj"))


@pytest.mark.parametrize("text", ["(q_proj", "[", "*q", "(?P<a>x)(?P<a>y)", "q{5,2}"])
def test_what_is_no_pattern_is_named_with_its_field(text):
    for fields in ({"target_modules": text}, {"exclude_modules": text}, {"rank_pattern": {text: 4}}):
        *_, field = fields
        with pytest.raises(ValueError, match=rf"{field}: {re.escape(repr(text))} is no regular expression"):
            check_targets(llama(), QSVFTConfig(**fields))

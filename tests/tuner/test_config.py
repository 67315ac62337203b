"""QSVFTConfig: what it refuses, and that a crash while it is written leaves the old file whole."""

import json
import os
import re

import pytest

from qsvft import QSVFTConfig
from qsvft.options.adapter import OPTIONS

REFUSED = [
    ("target_modules", [], "names, a regular expression or 'all-linear'"),
    ("target_modules", "", "names, a regular expression or 'all-linear'"),
    ("target_modules", ["q_proj", 3], "strings"),
    ("target_parameters", "experts.down_proj", "strings"),
    ("target_parameters", [0], "strings"),
    ("exclude_modules", [3], "strings"),
    ("modules_to_save", [None], "strings"),
    ("modules_to_save", "classifier", "strings"),
    ("modules_to_save", [""], "strings"),
    ("trainable_token_indices", [1, 1], "token ids of at least 0, each once"),
    ("bias", "lora_only", "one of 'none', 'qsvft_only', 'all'"),
    ("bias", None, "one of 'none', 'qsvft_only', 'all'"),
    ("ensure_weight_tying", None, "True or False"),
    ("layers_to_transform", [-1], "whole numbers, or None"),
    ("layers_to_transform", ["1"], "whole numbers, or None"),
    ("layers_to_transform", True, "whole numbers, or None"),
    ("layers_pattern", [3], "strings"),
    ("rank", 0, "an integer of at least 1, or None"),
    ("rank", -4, "an integer of at least 1, or None"),
    ("rank", 2.0, "an integer of at least 1, or None"),
    ("rank", True, "an integer of at least 1, or None"),
    ("rank", "8", "an integer of at least 1, or None"),
    ("rank_pattern", {"q_proj": 0}, "a dict of names to integers of at least 1"),
    ("rank_pattern", {1: 4}, "a dict of names to integers of at least 1"),
    ("rank_pattern", ["q_proj"], "a dict of names to integers of at least 1"),
    ("pattern", "diagonal", "one of 'plain', 'banded', 'random', 'top_k', 'dense'"),
    ("unit", "rms", "one of 'weight', 'one'"),
    ("unit", True, "one of 'weight', 'one'"),
    ("pattern", None, "one of 'plain', 'banded', 'random', 'top_k', 'dense'"),
    ("off_diagonals", -1, "an integer of at least 0"),
    ("off_diagonals", 1.5, "an integer of at least 0"),
    ("off_diagonals", False, "an integer of at least 0"),
    ("sides", "left", "one of 'one', 'both'"),
    ("sides", 1, "one of 'one', 'both'"),
    ("sides", None, "one of 'one', 'both'"),
    ("seed", 1.0, "an integer"),
    ("seed", None, "an integer"),
    ("factor_bits", 5, "16 (bf16), 8 (int8), 4 (NF4) or None"),
    ("factor_bits", "4", "16 (bf16), 8 (int8), 4 (NF4) or None"),
    ("basis", "fourier", "one of 'singular', 'data'"),
    ("decomposition", "svd", "one of 'auto', 'exact', 'randomized', 'float32'"),
    ("decomposition", True, "one of 'auto', 'exact', 'randomized', 'float32'"),
    ("residual", 1, "True or False"),
    ("init_weights", 0, "True or False"),
    ("include_factors", "yes", "True or False"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_a_field_out_of_its_range_is_refused_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=re.escape(f"QSVFTConfig.{name}: expected {allowed}")) as refusal:
        QSVFTConfig(**{name: value})
    found = str(refusal.value).split("got ", 1)[1]
    assert found in (repr(value), repr(set(value)) if name.endswith("_modules") and isinstance(value, list) else "")


def test_every_field_of_the_method_has_a_test_of_its_refusal():
    own = set(OPTIONS)
    assert own == {name for name, _, _ in REFUSED}


@pytest.mark.parametrize(
    ("name", "value", "why"), [("residual", True, " (it adds U S V^T back)"), ("basis", "data", "")]
)
def test_what_needs_both_sides_is_refused_with_one(name, value, why):
    message = f"QSVFTConfig.{name}: expected sides='both' with {name}={value!r}{why}; sides is 'one', got {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        QSVFTConfig(**{name: value}, sides="one")


NOT_GIVEN = [
    ({}, ("dense", "both", 128)),
    ({"rank": 12}, ("dense", "both", 12)),
    ({"pattern": "banded"}, ("banded", "both", None)),
    ({"pattern": "plain", "sides": "one"}, ("plain", "one", None)),
    ({"sides": "one"}, ("dense", "one", 128)),
    ({"basis": "data"}, ("dense", "both", 128)),
    ({"residual": True}, ("dense", "both", 128)),
    ({"base": {"weights": []}}, ("dense", "both", None)),  # saved with a dense M of all directions
]


@pytest.mark.parametrize(("given", "expected"), NOT_GIVEN, ids=[str(given) for given, _ in NOT_GIVEN])
def test_what_is_not_given_follows_from_what_is(given, expected):
    config = QSVFTConfig(**given)
    assert (config.pattern, config.sides, config.rank) == expected


FULL = {
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["lm_head"],
    "modules_to_save": ["classifier"],
    "rank": 12,
    "rank_pattern": {"k_proj": 6},
    "pattern": "random",
    "off_diagonals": 3,
    "sides": "both",
    "seed": 11,
    "factor_bits": 8,
    "decomposition": "randomized",
    "residual": True,
    "include_factors": True,
    "base": {"weights": [{"bits": 4}]},
    "task_type": "CAUSAL_LM",
}


@pytest.mark.parametrize("options", [{}, FULL, {"sides": "one"}], ids=["defaults", "every field", "one-sided"])
def test_a_saved_config_comes_back_equal(tmp_path, options):
    config = QSVFTConfig(**options, inference_mode=True)
    config.save_pretrained(str(tmp_path))
    assert QSVFTConfig.from_pretrained(str(tmp_path)).to_dict() == config.to_dict()
    assert os.listdir(tmp_path) == ["adapter_config.json"]


def test_names_are_saved_in_order_and_not_as_a_set_happens_to_have_them(tmp_path):
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    QSVFTConfig(target_modules=names, exclude_modules=names[::-1]).save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == saved["exclude_modules"] == sorted(names)


@pytest.mark.parametrize(("written", "read"), [({}, "auto"), ({"base": {"weights": []}}, "exact")])
def test_without_a_decomposition_a_new_config_chooses_and_one_saved_before_there_was_a_choice_is_exact(
    tmp_path, written, read
):
    QSVFTConfig(**written).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    del saved["decomposition"]
    path.write_text(json.dumps(saved))
    assert QSVFTConfig.from_pretrained(str(tmp_path)).decomposition == read
    assert QSVFTConfig(**written, decomposition="auto").decomposition == "auto"


def test_a_subfolder_is_read(tmp_path):
    QSVFTConfig(seed=5).save_pretrained(str(tmp_path / "inner"))
    assert QSVFTConfig.from_pretrained(str(tmp_path), subfolder="inner").seed == 5


@pytest.mark.parametrize("broken", ["os.replace", "json.dumps"])
def test_a_crash_while_saving_leaves_the_old_file_whole_and_nothing_behind(tmp_path, monkeypatch, broken):
    QSVFTConfig(seed=1).save_pretrained(str(tmp_path))

    def crash(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(broken, crash)
        with pytest.raises(OSError, match="disk full"):
            QSVFTConfig(seed=2).save_pretrained(str(tmp_path))
    assert QSVFTConfig.from_pretrained(str(tmp_path)).seed == 1
    assert os.listdir(tmp_path) == ["adapter_config.json"]


def test_a_hand_edited_value_out_of_range_is_refused_on_reading(tmp_path):
    QSVFTConfig().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank": -3}))
    with pytest.raises(ValueError, match=r"QSVFTConfig\.rank: expected an integer of at least 1.*got -3"):
        QSVFTConfig.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", '{"peft_type": "QSVFT"', "\x00\x01"])
def test_a_file_that_is_not_json_is_refused_by_its_path(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"adapter_config\.json: found \d+ bytes that are no valid JSON .* copy"
    ) as refusal:
        QSVFTConfig.from_pretrained(str(tmp_path))
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("said", [None, "all-linear", "ALL-LINEAR", "All-Linear"])
def test_all_linear_is_read_as_peft_reads_it(said):
    assert QSVFTConfig(target_modules=said).target_modules == "all-linear"


@pytest.mark.parametrize("base", ["x", 3, [], {"weights": "x"}, {"weights": ["x"]}, {"weights": [[]]}], ids=str)
def test_a_record_of_the_base_that_is_none_is_refused(base):
    with pytest.raises(ValueError, match=r"QSVFTConfig\.base: expected what the library filled in"):
        QSVFTConfig(base=base)

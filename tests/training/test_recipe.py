"""A recipe is read and checked without a model: every name and every value has its place."""

import re
from dataclasses import fields

import pytest
from trl import DPOConfig, SFTConfig

from qsvft.options.adapter import OPTIONS
from qsvft.options.recipe import OUR_OWN, SHARED, load_yaml, read_recipe
from qsvft.options.run import RUN_OPTIONS, OftenGiven
from qsvft.options.switches import SWITCHES
from qsvft.options.trainer_arguments import trainer_arguments

LEAST = {"model": "m", "dataset": "d", "output": "o"}
CONFIGS = {"sft": SFTConfig, "dpo": DPOConfig}


@pytest.mark.parametrize("method", CONFIGS)
def test_the_trainers_arguments_are_known_without_importing_it(method):
    assert trainer_arguments(method) == {one.name for one in fields(CONFIGS[method]) if one.init}
    assert set(OUR_OWN) <= trainer_arguments(method)


@pytest.mark.parametrize("method", CONFIGS)
def test_no_option_of_ours_hides_one_of_the_trainer(method):
    ours = {**RUN_OPTIONS, **OPTIONS, **SWITCHES}
    assert len(ours) == len(RUN_OPTIONS) + len(OPTIONS) + len(SWITCHES)
    assert set(ours) & trainer_arguments(method) == set(SHARED)


def test_what_has_a_place_on_the_command_line_is_the_trainers():
    assert {one.name for one in fields(OftenGiven)} <= trainer_arguments("sft")


def test_a_file_a_text_and_an_option_each_count_more_than_the_one_before(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndataset: d\noutput: o\nrank: 8\nlearning_rate: 2e-2\nseed: 3\nfactor_bits: 16\n")
    recipe = read_recipe(path, ["rank=16", "offload=true", "warmup-steps=0.2"], learning_rate=1e-3, bits=None)
    assert recipe.adapter == {"rank": 16, "seed": 3, "factor_bits": 16}
    assert recipe.switches == {"offload": True}
    assert recipe.arguments == {"learning_rate": 1e-3, "seed": 3, "warmup_steps": 0.2}
    assert (recipe.run.model, recipe.run.dataset, recipe.run.output, recipe.run.bits) == ("m", "d", "o", 4)


@pytest.mark.parametrize("text", ["2e-2", "2.0e-2", "0.02", "2E-2", ".2e-1"])
def test_a_number_is_a_number_however_it_is_written(text):
    assert load_yaml(text) == 0.02


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"learing_rate": 1},
            "recipe: learing_rate: is no option of qsvft or of TRL's trainer. Did you mean",
        ),
        ({"zzz": 1}, "recipe: zzz: is no option of qsvft or of TRL's trainer."),
        ({"output_dir": "x"}, "recipe: output_dir: is said in another way here; expected output"),
        ({"bits": 5}, "recipe: bits: expected one of 4, 8, 16, got 5"),
        ({"rank": 0}, "recipe: rank: expected an integer of at least 1, or None, got 0"),
        ({"offload": 1}, "recipe: offload: expected True or False, got 1"),
        ({"method": "ppo"}, "recipe: method: expected one of 'sft', 'dpo', got 'ppo'"),
        ({"eval_share": float("nan")}, "recipe: eval_share: expected a number from 0 to 0.5, got nan"),
        ({"eval_share": True}, "recipe: eval_share: expected a number from 0 to 0.5, got True"),
        ({"calibration": -1}, "recipe: calibration: expected an integer of at least 0, got -1"),
        ({"templates": {"prompt": 3}}, "recipe: templates: expected a table of columns to texts"),
        ({"dataset": ""}, "recipe: dataset: found none; expected a hub id, a directory or a file. Give --dataset."),
        ({"model": None}, "recipe: model: found none; expected a directory or a hub id. Give --model."),
        ({"output": None}, "recipe: output: found none; expected a directory. Give --output."),
    ],
)
def test_what_is_wrong_is_named_with_what_is_expected(given, words):
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        read_recipe({**LEAST, **given})


def test_an_adapter_to_go_on_with_names_its_base():
    assert read_recipe({**LEAST, "model": None, "adapter": "a"}).run.adapter == "a"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- a\n- b\n", "found a list; expected lines 'option: value'"),
        (b"a: [1\n", "is no YAML"),
        (b"\xff\xfe", "is no YAML"),
        (b"", "found a NoneType"),
        (b"1: 2\n", "found a dict"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as refused:
        read_recipe(path)
    assert str(path) in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.yaml: No such file or directory; expected a recipe"):
        read_recipe(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("text", "words"), [("rank", "expected NAME=VALUE"), ("rank=[1", "is no YAML"), ("=3", "NAME=")]
)
def test_a_text_that_sets_nothing_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        read_recipe(LEAST, [text])

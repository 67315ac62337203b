"""Names in a config that match nothing are refused, whatever field they stand in."""

import pytest
from peft import NoMatchingPeftModuleError, PeftModel
from small_models import load, logits, randomize
from transformers import AutoModelForSequenceClassification

import qsvft
from qsvft import QSVFTConfig
from qsvft.tuner import QSVFTLinear


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, QSVFTLinear)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_prj"]}, r"target_modules: 'q_prj' matches no module.*Did you mean 'q_proj'"),
        ({"exclude_modules": ["q_prj"]}, r"exclude_modules: 'q_prj' matches no module.*Did you mean 'q_proj'"),
        ({"exclude_modules": "q_prj"}, r"exclude_modules: 'q_prj' matches no module"),
        ({"exclude_modules": "[q_proj"}, r"exclude_modules: '\[q_proj' is no regular expression"),
        (
            {"exclude_modules": ["layers.0"]},
            r"exclude_modules: 'layers.0' matches no module",
        ),  # it would exclude nothing
        ({"modules_to_save": ["lm_heed"]}, r"modules_to_save: 'lm_heed' matches no module.*Did you mean 'lm_head'"),
        (
            {"rank_pattern": {"q_prj": 20}},
            r"rank_pattern: 'q_prj' matches none of the 14 layers.*Did you mean 'q_proj'",
        ),
        (
            {"rank_pattern": {"q_proj": 20}, "exclude_modules": ["q_proj"]},
            r"rank_pattern: 'q_proj' matches none of the 12",
        ),
        ({"modules_to_save": ["layers"]}, r"modules_to_save: 'layers' means model.layers, a ModuleList"),
        ({"modules_to_save": ["(head"]}, r"modules_to_save: '\(head' is no regular expression"),
        ({"layers_to_transform": 2}, r"is left to adapt: .*layers_to_transform=2, layers_pattern=None"),
        ({"layers_to_transform": [1, 7]}, r"layers_to_transform: 7 is the number of no layer.*found 1\)"),
        ({"layers_to_transform": 1, "layers_pattern": "h"}, r"no layer of LlamaForCausalLM is left to adapt"),
        ({"rank_pattern": {"(q_proj": 20}}, r"rank_pattern: '\(q_proj' is no regular expression"),
    ],
    ids=str,
)
def test_a_name_that_matches_nothing_is_refused_before_anything_is_changed(llama, options, said):
    model = load(llama)
    before = logits(model)
    with pytest.raises(ValueError, match=said):
        qsvft.prepare(model, 4, progress=False, **options)
    assert (logits(model) == before).all()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"exclude_modules": ["lm_head"]}, 14),
        ({"exclude_modules": ["model.layers.0.self_attn.q_proj", "down_proj"]}, 11),
        ({"exclude_modules": r".*\.layers\.0\..*"}, 7),
        ({"exclude_modules": ["input_layernorm"]}, 14),
        ({"rank_pattern": {r"layers\.1\..*": 8, "model.layers.0.mlp.up_proj": 4}}, 14),
        ({"modules_to_save": ["head"]}, 14),  # PEFT's rule: the end of a name
    ],
    ids=str,
)
def test_names_that_match_something_are_taken(llama, options, left):
    assert len(adapted(qsvft.prepare(load(llama), 4, progress=False, **options))) == left


def test_a_classifier_may_lack_one_of_the_heads_that_peft_trains_whole(llama):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2)
    model = qsvft.prepare(model, 4, progress=False)
    assert set(model.peft_config["default"].modules_to_save) == {"classifier", "score"}


def test_an_adapter_whose_config_has_names_of_elsewhere_loads(llama, tmp_path):
    model = randomize(qsvft.prepare(load(llama), 4, progress=False, exclude_modules=["q_proj"]))
    expected = logits(model)
    config = model.peft_config["default"]
    config.exclude_modules, config.rank_pattern = {"q_proj", "vision_tower_proj"}, {"vision_tower_proj": 8}
    model.save_pretrained(tmp_path)
    with pytest.warns(RuntimeWarning, match="rank_pattern"):
        again = PeftModel.from_pretrained(qsvft.quantize(load(llama), 4), tmp_path)
    assert (logits(again) == expected).all()
    assert isinstance(again.peft_config["default"], QSVFTConfig)


@pytest.mark.parametrize("options", [{"target_modules": ["q_prj"]}, {"exclude_modules": r".*_proj"}], ids=str)
def test_who_waits_for_pefts_error_of_no_match_gets_it(llama, options):
    model = load(llama)
    with pytest.raises(NoMatchingPeftModuleError):
        qsvft.prepare(model, 4, progress=False, **options)

"""``layers_to_transform``: layers by their numbers, as PEFT's other methods have it."""

import re

import pytest
import torch
from small_models import coefficients, load, logits, randomize, same_tensors

import qsvft
from qsvft import QSVFTConfig
from qsvft.tuner import QSVFTLinear


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, QSVFTLinear)]


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": 1},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"], "layers_pattern": ["h", "layers"]},
    ],
    ids=str,
)
def test_only_the_layers_of_these_numbers_are_adapted(llama, options):
    names = adapted(qsvft.prepare(load(llama), 4, progress=False, **options))
    assert len(names) == (2 if "target_modules" in options else 7)
    assert all(".layers.1." in name for name in names)


def test_all_numbers_are_all_layers(llama):
    every = adapted(qsvft.prepare(load(llama), 4, progress=False))
    assert adapted(qsvft.prepare(load(llama), 4, progress=False, layers_to_transform=[0, 1])) == every


def test_a_prepared_directory_has_their_factors_alone_and_an_adapter_comes_back(llama, tmp_path):
    folder = qsvft.prepare_checkpoint(llama, tmp_path / "prepared", layers_to_transform=[0], progress=False)
    model = randomize(qsvft.from_pretrained(folder, progress=False))
    stored = {name.layer for name in model.get_base_model().qsvft_factors}
    assert len(stored) == 7 and stored == {name.removeprefix("base_model.model.") for name in adapted(model)}
    model.save_pretrained(tmp_path / "adapter")
    again = qsvft.from_pretrained(folder, adapter=tmp_path / "adapter", progress=False)
    assert same_tensors(coefficients(again), coefficients(model))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers_pattern": "layers"}, "layers_pattern: expected layers_to_transform with it"),
        (
            {"layers_to_transform": 1, "target_modules": ".*q_proj"},
            "layers_to_transform: expected names or 'all-linear'",
        ),
    ],
)
def test_what_goes_together_is_asked_for(options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        QSVFTConfig(**options)

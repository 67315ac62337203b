"""The learning rate that is suggested: of a config, and of a model by its adapter."""

import pytest
import torch
from small_models import load, save_llama, tokens

import qsvft
from qsvft import QSVFTConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    ids = tokens(4, 16)
    batches = [{"input_ids": ids, "labels": ids}]
    return qsvft.prepare(load(save_llama(tmp_path_factory.mktemp("llama"))), 4, rank=8, calibration=batches)


@pytest.mark.parametrize("pattern", ["plain", "banded", "random", "top_k"])
@pytest.mark.parametrize("sides", ["one", "both"])
def test_it_is_one_for_all_patterns_and_forms_but_twice_that_between_singular_vectors(model, pattern, sides):
    assert qsvft.suggest_learning_rate(QSVFTConfig(pattern=pattern, sides=sides)) == 2e-2
    assert qsvft.suggest_learning_rate(QSVFTConfig(basis="data")) == 2e-2 == qsvft.suggest_learning_rate(model)
    assert qsvft.suggest_learning_rate(QSVFTConfig()) == 4e-2
    assert qsvft.suggest_learning_rate(QSVFTConfig(residual=True)) == 4e-2


def test_of_several_adapters_it_is_that_of_the_named_or_the_active_one(model):
    model.add_adapter("other", QSVFTConfig(rank=8, task_type="CAUSAL_LM"))
    assert qsvft.suggest_learning_rate(model) == qsvft.suggest_learning_rate(model, "default") == 2e-2
    assert qsvft.suggest_learning_rate(model, "other") == 4e-2
    model.set_adapter("other")
    assert qsvft.suggest_learning_rate(model) == 4e-2
    with pytest.raises(
        ValueError, match=r"found 0 of the name or names \['third'\] in a .* with \['default', 'other'\]"
    ):
        qsvft.suggest_learning_rate(model, "third")


def test_what_has_no_one_rate_is_refused():
    with pytest.raises(ValueError, match="found unit='one'"):
        qsvft.suggest_learning_rate(QSVFTConfig(unit="one"))
    with pytest.raises(ValueError, match=r"found 0 .* in a Linear with \[\]"):
        qsvft.suggest_learning_rate(torch.nn.Linear(2, 2))

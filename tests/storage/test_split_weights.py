"""ZeRO-3's init: models of ours are built whole, one that it has split is refused by name."""

import pytest
import torch
from small_models import load
from transformers.integrations import deepspeed

import qsvft
from qsvft.storage.split_weights import whole_weights


class Stage3:
    """As much of a DeepSpeed config as transformers looks at."""

    def is_zero3(self):
        return True


@pytest.fixture
def zero3():
    config = Stage3()
    deepspeed.set_hf_deepspeed_config(config)
    yield config
    deepspeed.unset_hf_deepspeed_config()


def test_transformers_builds_whole_weights_and_splits_again_after_it(zero3):
    with whole_weights():
        assert not deepspeed.is_deepspeed_zero3_enabled()
    assert deepspeed.is_deepspeed_zero3_enabled()


def test_a_checkpoint_is_prepared_and_loaded_whole_under_zero3(llama, tmp_path, zero3):
    model = qsvft.from_pretrained(llama, rank=4, cache_dir=tmp_path, progress=False)
    assert all(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.1.mlp.up_proj"])
def test_a_weight_that_zero3_has_split_is_refused_by_name(llama, name):
    model = load(llama)
    weight = model.get_submodule(name).weight
    weight.ds_shape, weight.data = weight.shape, torch.empty(0, dtype=weight.dtype)
    with pytest.raises(ValueError, match=rf"{name}.*ZeRO-3.*from_pretrained"):
        qsvft.prepare(model, 4, rank=4, progress=False)

"""A head that others cast takes its input in its own dtype, with the adapter and without."""

import pytest
import torch
from small_models import randomize, tokens
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

import qsvft


@pytest.fixture
def classifier(llama):
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3, dtype=torch.float32)
    return randomize(qsvft.prepare(model, 4, rank=8, progress=False))


def as_trl_casts(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def hidden(model):
    return model.base_model.model.model(input_ids=tokens()).last_hidden_state


def test_a_head_in_bf16_on_a_base_in_fp32_gives_its_own_product(classifier):
    as_trl_casts(classifier).eval()
    score = classifier.base_model.model.score
    W = score.modules_to_save["default"].weight
    h = hidden(classifier)
    assert (h.dtype, W.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(score(h), functional.linear(h.to(torch.bfloat16), W))
    classifier.train()
    classifier(input_ids=tokens(), labels=torch.tensor([0, 2])).loss.backward()
    assert W.grad.any() and all(p.grad is not None for p in classifier.parameters() if p.requires_grad)


def test_without_the_adapter_and_in_autocast_its_input_is_what_it_was(classifier):
    as_trl_casts(classifier).eval()
    score = classifier.base_model.model.score
    with classifier.disable_adapter():
        h = hidden(classifier)
        assert torch.equal(score(h), functional.linear(h, score.original_module.weight))
    seen = []
    score.modules_to_save["default"].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score(torch.ones(2, 64))
    score(torch.ones(2, 64))
    assert seen == [torch.float32, torch.bfloat16]


def test_each_module_has_one_hook_whatever_comes_after(classifier):
    classifier.add_adapter("b", qsvft.QSVFTConfig(task_type="SEQ_CLS", rank=8))
    assert len(classifier.base_model.model.score._forward_pre_hooks) == 1

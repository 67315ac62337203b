"""The task follows from the model's class, as far as PEFT's class for it hands on what the model's forward takes."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import TaskType, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

import qsvft
from qsvft.tuner import QSVFTLinear
from qsvft.tuner.tasks import task_of


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("LlamaForCausalLM", TaskType.CAUSAL_LM),
        ("GPT2LMHeadModel", TaskType.CAUSAL_LM),
        ("T5ForConditionalGeneration", TaskType.SEQ_2_SEQ_LM),
        ("BartForConditionalGeneration", TaskType.SEQ_2_SEQ_LM),
        ("LlavaForConditionalGeneration", TaskType.CAUSAL_LM),
        ("Qwen2VLForConditionalGeneration", TaskType.CAUSAL_LM),
        ("WhisperForConditionalGeneration", None),
        ("Speech2TextForConditionalGeneration", None),
        ("Pix2StructForConditionalGeneration", None),
        ("BertForSequenceClassification", TaskType.SEQ_CLS),
        ("WavLMForSequenceClassification", None),
        ("BertForTokenClassification", TaskType.TOKEN_CLS),
        ("BertForQuestionAnswering", TaskType.QUESTION_ANS),
        ("ViTForImageClassification", None),
    ],
)
def test_a_class_has_the_task_whose_arguments_its_forward_takes(name, task):
    assert task_of(getattr(transformers, name)) == task


SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("name", "task", "head"),
    [
        ("BertForTokenClassification", "TOKEN_CLS", "classifier"),
        ("BertForQuestionAnswering", "QUESTION_ANS", "qa_outputs"),
        ("BertForSequenceClassification", "SEQ_CLS", "classifier"),
        ("RobertaForSequenceClassification", "SEQ_CLS", "classifier"),
        ("DistilBertForSequenceClassification", "SEQ_CLS", "pre_classifier"),
    ],
)
def test_the_head_that_PEFT_trains_whole_is_not_adapted(name, task, head):
    kind = getattr(transformers, name)
    config = qsvft.QSVFTConfig(task_type=task, rank=2)
    model = get_peft_model(kind(kind.config_class(**SMALL, pad_token_id=0)), config)
    adapted = [name for name, module in model.named_modules() if isinstance(module, QSVFTLinear)]
    assert adapted and not any(head in name for name in adapted)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(f"{head}.modules_to_save" in name for name in trained)


def test_of_a_base_with_several_kinds_of_layers_its_bits_are_the_fewest():
    dense, four = {"bits": 16, "dtype": "float32"}, {"bits": 4, "dtype": "bfloat16"}
    assert qsvft.QSVFTConfig(base={"weights": [dense, four]}).held_base() == four
    assert qsvft.QSVFTConfig(base={"weights": [dense]}).held_base() == dense
    assert qsvft.QSVFTConfig().held_base() == {}


def test_a_layer_that_the_model_keeps_in_32_bits_takes_no_residual():
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(ValueError, match=r"DenseReluDense\.wo: residual=True holds this layer in 4 bits"):
        qsvft.prepare(t5, residual=True, progress=False)
    model = qsvft.prepare(t5, residual=True, exclude_modules=["wo"], progress=False)
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[7, 8]])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)

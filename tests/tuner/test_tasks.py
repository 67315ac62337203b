"""The task follows from the model's class, as far as PEFT's class for it hands on what the model's forward takes."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import PeftModel, TaskType, get_peft_model
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

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


SPEECH = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16, "vocab_size": 96}
LAYERS = {
    f"{side}_{what}": 1 + (what != "layers")
    for side in ("encoder", "decoder")
    for what in ("layers", "attention_heads")
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
POSITIONS = {"max_source_positions": 20, "max_target_positions": 32}


def test_a_speech_model_trains_from_its_features():
    torch.manual_seed(0)
    config = WhisperConfig(**SPEECH, **LAYERS, **TOKENS, **POSITIONS, dropout=0.0)
    model = qsvft.prepare(WhisperForConditionalGeneration(config), bits=4, progress=False)
    model(input_features=torch.randn(2, 16, 40), labels=torch.randint(3, 96, (2, 8))).loss.backward()
    assert type(model) is PeftModel
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_head_of_a_task_without_a_type_trains_whole():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(**sizes, **convolutions, **positions, layerdrop=0.0, classifier_proj_size=16)
    model = qsvft.prepare(Wav2Vec2ForSequenceClassification(config), bits=4, progress=False)
    model(input_values=torch.randn(2, 800), labels=torch.tensor([0, 1])).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()}
    for head in ("projector", "classifier"):
        assert any(f"{head}.modules_to_save.default.weight" in name for name in trained), head


SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("name", "task", "head"),
    [
        ("BertForTokenClassification", "TOKEN_CLS", "classifier"),
        ("BertForQuestionAnswering", "QUESTION_ANS", "qa_outputs"),
        ("BertForSequenceClassification", "SEQ_CLS", "classifier"),
        ("RobertaForSequenceClassification", "SEQ_CLS", "classifier"),
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

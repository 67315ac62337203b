"""The families of docs/models.md: from a checkpoint through training, saving, loading and generating to a merged one.

Each test is a column of the table there, each of its parameters a row; ``tests/docs/test_model_tables.py`` compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from small_models import coefficients, randomize, state
from torch.nn import functional
from transformers import (
    BertConfig,
    CLIPConfig,
    DebertaV2Config,
    DistilBertConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    ModernBertConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipConfig,
    T5Config,
    Trainer,
    TrainingArguments,
    ViTConfig,
    Wav2Vec2Config,
    WhisperConfig,
)
from transformers.trainer_callback import PrinterCallback

import qsvft

VOCABULARY = 96
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
MARKS = {"bos_token_id": 1, "eos_token_id": 2}
DECODER = {**TEXT, **MARKS, "num_key_value_heads": 2, "tie_word_embeddings": False}
PICTURE = {**SIZES, "image_size": 16, "patch_size": 8}
DEBERTA = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
MODERN = {**TEXT, **MARKS, "num_hidden_layers": 2, "cls_token_id": 1, "sep_token_id": 2}  # layers of both its kinds
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
IMAGE, START, END = 93, 90, 91
QWEN = {"image_token_id": IMAGE, "video_token_id": 94, "vision_start_token_id": START, "vision_end_token_id": END}
QWEN_EYE = {"depth": 1, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "patch_size": 4}
SIDES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 4))}
SPEECH = {**SIDES, **MARKS, "d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": VOCABULARY}
SPEECH |= {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32, "decoder_start_token_id": 1}
SPEECH |= {"pad_token_id": 0, "begin_suppress_tokens": None}
WAVES = {**SIZES, "conv_dim": (32, 32), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
WAVES |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
WAVES |= {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_time_prob": 0.5, "mask_time_length": 2}

DRAWN = torch.Generator().manual_seed(5)
IDS = torch.randint(8, 88, (2, 10), generator=DRAWN)
PIXELS = torch.randn(2, 3, 16, 16, generator=DRAWN)
CLASSES = torch.tensor([0, 2])


def words() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def words_and_picture() -> dict[str, torch.Tensor]:
    ids = IDS.clone()
    ids[:, 1], ids[:, 2:6], ids[:, 6] = START, IMAGE, END
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": PIXELS}
    return {**found, "token_type_ids": (ids == IMAGE).long()}


def words_and_patches() -> dict[str, torch.Tensor]:
    ids = IDS.clone()
    ids[:, 1], ids[:, 2:6] = START, IMAGE
    patches = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(6))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": patches}
    return {**found, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (ids == IMAGE).long()}


def wave() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(6))}


def spectrum() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(6))}


def alike(outputs: Any, *_: Any, **__: Any) -> torch.Tensor:
    """The loss of sentence embeddings: each is to be like itself alone."""
    h = functional.normalize(outputs.last_hidden_state.mean(1), dim=-1)
    return functional.cross_entropy(5 * h @ h.T, torch.arange(len(h)))


NO_WORDS = "it writes no text"


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        model: its class.
        config: of a tiny one.
        inputs: of a forward.
        labels: what it is trained on; None for sentence embeddings.
        head: the modules that train whole; the base is then saved without them.
        task: PEFT's task type.
        dtype, form: in which it is tried out.
        idle: parts of names of adapted layers that the forward does not reach.
        silent: why it does not generate.
    """

    model: str
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]] = words
    labels: dict[str, Any] | None = field(default_factory=lambda: {"labels": IDS})
    head: tuple[str, ...] = ()
    task: str | None = None
    dtype: torch.dtype = torch.float32
    form: dict[str, Any] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    silent: str | None = None

    @property
    def kind(self) -> Any:
        return getattr(transformers, self.model)


def _classifier(model, config, head, task=None, inputs=words, labels=CLASSES, **more):
    return Family(model, config, inputs, {"labels": labels}, head, task, silent=NO_WORDS, **more)


ONE_SIDED = {"sides": "one", "pattern": "banded", "off_diagonals": 2}
BF16 = {"dtype": torch.bfloat16, "form": ONE_SIDED}
FAMILIES = {
    "Llama": Family("LlamaForCausalLM", lambda: LlamaConfig(**DECODER), task="CAUSAL_LM"),
    "Llama, sequences": _classifier(
        "LlamaForSequenceClassification", lambda: LlamaConfig(**DECODER, num_labels=3), ("score",), "SEQ_CLS", **BF16
    ),
    "Gemma 3": Family(
        "Gemma3ForCausalLM", lambda: Gemma3TextConfig(**DECODER, head_dim=16, sliding_window=8), task="CAUSAL_LM"
    ),
    "Gemma 3 with pictures": Family(
        "Gemma3ForConditionalGeneration",
        lambda: Gemma3Config(
            text_config={**DECODER, "head_dim": 16, "sliding_window": 8},
            vision_config={**PICTURE, "patch_size": 4},
            mm_tokens_per_image=4,
            tie_word_embeddings=False,
            boi_token_index=START,
            eoi_token_index=END,
            image_token_index=IMAGE,
            image_token_id=IMAGE,
        ),
        words_and_picture,
        task="CAUSAL_LM",
        idle=(".head.mlp.",),
    ),
    "Qwen2-VL": Family(
        "Qwen2VLForConditionalGeneration",
        lambda: Qwen2VLConfig(
            text_config={**DECODER, **ROPE},
            vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 4},
            **QWEN,
        ),
        words_and_patches,
        task="CAUSAL_LM",
        **BF16,
    ),
    "Qwen2.5-VL": Family(
        "Qwen2_5_VLForConditionalGeneration",
        lambda: Qwen2_5_VLConfig(
            text_config={**DECODER, **ROPE},
            vision_config={**QWEN_EYE, "out_hidden_size": 64, "window_size": 16, "fullatt_block_indexes": [0]},
            **QWEN,
        ),
        words_and_patches,
        task="CAUSAL_LM",
    ),
    "Qwen3-VL": Family(
        "Qwen3VLForConditionalGeneration",
        lambda: Qwen3VLConfig(
            text_config={**DECODER, **ROPE, "head_dim": 16},
            vision_config={
                **QWEN_EYE,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            **QWEN,
        ),
        words_and_patches,
        task="CAUSAL_LM",
    ),
    "BERT, sequences": _classifier(
        "BertForSequenceClassification", lambda: BertConfig(**TEXT, num_labels=3), ("classifier",), "SEQ_CLS", **BF16
    ),
    "BERT, tokens": _classifier(
        "BertForTokenClassification",
        lambda: BertConfig(**TEXT, num_labels=3),
        ("classifier",),
        "TOKEN_CLS",
        labels=IDS % 3,
    ),
    "BERT, multiple choice": _classifier(
        "BertForMultipleChoice",
        lambda: BertConfig(**TEXT),
        ("classifier",),
        inputs=lambda: {"input_ids": IDS.view(2, 2, 5)},
        labels=CLASSES % 2,
    ),
    "DistilBERT, sequences": _classifier(
        "DistilBertForSequenceClassification",
        lambda: DistilBertConfig(
            vocab_size=VOCABULARY, dim=64, hidden_dim=96, n_layers=1, n_heads=4, num_labels=3, pad_token_id=0
        ),
        ("pre_classifier", "classifier"),
        "SEQ_CLS",
    ),
    "ModernBERT, sequences": _classifier(
        "ModernBertForSequenceClassification",
        lambda: ModernBertConfig(**MODERN, num_labels=3),
        ("head", "classifier"),
        "SEQ_CLS",
    ),
    "ModernBERT, tokens": _classifier(
        "ModernBertForTokenClassification",
        lambda: ModernBertConfig(**MODERN, num_labels=3),
        ("head", "classifier"),
        "TOKEN_CLS",
        labels=IDS % 3,
        **BF16,
    ),
    "DeBERTa, sequences": _classifier(
        "DebertaV2ForSequenceClassification",
        lambda: DebertaV2Config(**TEXT, **DEBERTA, norm_rel_ebd="layer_norm", type_vocab_size=0, num_labels=3),
        ("pooler", "classifier"),
        "SEQ_CLS",
        **BF16,
    ),
    "DeBERTa, tokens": _classifier(
        "DebertaV2ForTokenClassification",
        lambda: DebertaV2Config(**TEXT, **DEBERTA, norm_rel_ebd="layer_norm", type_vocab_size=0, num_labels=3),
        ("classifier",),
        "TOKEN_CLS",
        labels=IDS % 3,
    ),
    "BERT, sentence embeddings": Family(
        "BertModel", lambda: BertConfig(**TEXT), labels=None, idle=("pooler",), silent=NO_WORDS
    ),
    "ViT": _classifier(
        "ViTForImageClassification",
        lambda: ViTConfig(**PICTURE, num_labels=3),
        ("classifier",),
        inputs=lambda: {"pixel_values": PIXELS},
        **BF16,
    ),
    "CLIP": Family(
        "CLIPModel",
        lambda: CLIPConfig(text_config={**TEXT, **MARKS}, vision_config=PICTURE, projection_dim=32),
        lambda: {**words(), "pixel_values": PIXELS},
        {"return_loss": True},
        silent=NO_WORDS,
    ),
    "SigLIP": Family(
        "SiglipModel",
        lambda: SiglipConfig(text_config={**TEXT, **MARKS}, vision_config=PICTURE),
        lambda: {**words(), "pixel_values": PIXELS},
        {"return_loss": True},
        silent=NO_WORDS,
    ),
    "T5": Family(
        "T5ForConditionalGeneration",
        lambda: T5Config(
            **{"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4},
            **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
        ),
        task="SEQ_2_SEQ_LM",
        **BF16,
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        lambda: WhisperConfig(**SPEECH, apply_spec_augment=True, mask_time_prob=0.5, mask_time_length=2),
        spectrum,
    ),
    "Wav2Vec2, CTC": _classifier(
        "Wav2Vec2ForCTC", lambda: Wav2Vec2Config(**WAVES), ("lm_head",), inputs=wave, labels=IDS
    ),
    "Wav2Vec2, sequences": _classifier(
        "Wav2Vec2ForSequenceClassification",
        lambda: Wav2Vec2Config(**WAVES, num_labels=3),
        ("projector", "classifier"),
        inputs=wave,
        form=ONE_SIDED,
    ),
}


@torch.no_grad()
def outputs(family: Family, model: Any) -> torch.Tensor:
    """What a forward in evaluation gives, as one tensor."""
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoded = {"decoder_input_ids": IDS[:, :6]} if own.config.is_encoder_decoder else {}
    found = model.eval()(**_in(family.dtype, family.inputs()), **decoded)
    names = ("logits", "text_embeds", "image_embeds") if family.labels is not None else ("last_hidden_state",)
    return torch.cat([found[name].double().flatten() for name in names if name in found])


def _in(dtype: torch.dtype, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def generate(family: Family, model: Any) -> torch.Tensor:
    fixed = {"max_new_tokens": 8, "do_sample": False}
    return model.generate(**_in(family.dtype, family.inputs()), **fixed)


@dataclass
class Run:
    """A model of a family after two steps, saved."""

    family: Family
    model: Any
    folder: Any
    losses: list[float]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    expected: torch.Tensor
    _again: Any = None

    def again(self) -> Any:
        """The adapter, loaded by itself."""
        if self._again is None:
            self._again = qsvft.load(self.folder / "adapter", cache_dir=self.folder / "cache", progress=False)
        return self._again


def _drawn(family: Family, base: Any) -> Any:
    """The class of a family from a base that was saved without its head."""
    labels = {"num_labels": 3} if getattr(family.config(), "num_labels", 2) == 3 else {}
    return family.kind.from_pretrained(base, dtype=family.dtype, **labels)


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    source = family.kind(family.config())
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02)
    (source.base_model if family.head else source).save_pretrained(folder / "base")
    model = qsvft.prepare(_drawn(family, folder / "base"), 4, rank=8, progress=False, **family.form)
    before = state(model)
    batch = {**_in(family.dtype, family.inputs()), **(family.labels or {})}
    arguments = TrainingArguments(
        **{"output_dir": str(folder / "run"), "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"},
        **{"dataloader_pin_memory": False, "remove_unused_columns": False},
    )
    loss = alike if family.labels is None else None
    trainer = Trainer(model, arguments, lambda _: dict(batch), [{"row": i} for i in range(4)], compute_loss_func=loss)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [step["loss"] for step in trainer.state.log_history if "loss" in step]
    after = state(model)
    randomize(model, scale=0.3)
    model.save_pretrained(folder / "adapter")
    return Run(family, model, folder, losses, before, after, outputs(family, model))


def families(wanted: Callable[[Family], bool] = lambda _: True) -> Any:
    names = [name for name, family in FAMILIES.items() if wanted(family)]
    return pytest.mark.parametrize("run", names, indirect=True, scope="module")


@families()
def test_two_steps_move_M_and_its_head_and_nothing_else(run):
    config, family = run.model.peft_config["default"], run.family
    assert (config.task_type, len(run.losses)) == (family.task, 2) and all(map(math.isfinite, run.losses))
    moved = {name for name, tensor in run.after.items() if not torch.equal(tensor, run.before[name])}
    M = {name for name in coefficients(run.model) if not any(part in name for part in family.idle)}
    heads = {name for name in run.after if ".modules_to_save." in name}
    assert M <= moved <= M | heads
    assert {name.partition(".modules_to_save")[0].rpartition(".")[2] for name in moved & heads} == {*family.head}


@families()
def test_the_adapter_alone_gives_the_same_outputs_on_a_base_without_its_head(run):
    again = run.again()
    assert type(again.get_base_model()).__name__ == run.family.model
    assert torch.equal(outputs(run.family, again), run.expected)


@families(lambda family: family.silent is None)
def test_it_generates_what_it_generated_before(run):
    found = generate(run.family, run.model)
    assert torch.equal(generate(run.family, run.again()), found)
    with run.model.disable_adapter():
        assert not torch.equal(generate(run.family, run.model), found)


@families()
def test_merged_it_gives_the_outputs_of_the_adapter(run):
    family, folder = run.family, run.folder
    qsvft.export(folder / "adapter", folder / "merged", format="dense", progress=False)
    found = outputs(family, family.kind.from_pretrained(folder / "merged", dtype=family.dtype))
    tolerance = 1e-5 if family.dtype == torch.float32 else 0.05
    assert float((found - run.expected).norm()) <= tolerance * float(run.expected.norm())


COLUMNS = {
    "trains": test_two_steps_move_M_and_its_head_and_nothing_else,
    "loads alone": test_the_adapter_alone_gives_the_same_outputs_on_a_base_without_its_head,
    "generates": test_it_generates_what_it_generated_before,
    "merges": test_merged_it_gives_the_outputs_of_the_adapter,
}

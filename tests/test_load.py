"""``qsvft.load(adapter)``: everything but the adapter's place is found from what it records."""

import shutil

import pytest
import torch
from small_models import load, logits, randomize, save_llama, tokens
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)

import qsvft
from qsvft.checkpoint.source.architecture import load_base

BATCH = {"input_ids": tokens(), "labels": tokens()}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QSVFT_CACHE", str(tmp_path / "cache"))


def trained(model, folder, seed=3):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name and parameter.requires_grad:
                parameter.normal_(std=0.2)
    randomize(model).save_pretrained(folder)
    return logits(model)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_of_a_checkpoint_bits_and_dtype_are_those_that_it_was_trained_with(llama, tmp_path, bits, dtype):
    """The checkpoint is in fp32: quantised from another dtype it would be another base."""
    expected = trained(qsvft.prepare(load(llama, dtype), bits, rank=8, progress=False), tmp_path / "adapter")
    model = qsvft.load(tmp_path / "adapter", progress=False)
    assert torch.equal(logits(model), expected)
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "form", [{"sides": "one"}, {"calibration": [BATCH]}, {"residual": True}], ids=["one", "data", "res"]
)
def test_factors_are_those_that_it_was_trained_with(llama, tmp_path, form):
    expected = trained(qsvft.prepare(load(llama), 4, rank=8, progress=False, **form), tmp_path / "adapter")
    assert torch.equal(logits(qsvft.load(tmp_path / "adapter", progress=False)), expected)


def test_an_adapter_names_the_checkpoint_and_not_where_it_is_kept(llama, tmp_path):
    expected = trained(qsvft.from_pretrained(llama, rank=8, progress=False), tmp_path / "adapter")
    config = qsvft.QSVFTConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == str(llama)
    assert torch.equal(logits(qsvft.load(tmp_path / "adapter", progress=False)), expected)
    assert sum(not path.name.startswith(".") for path in (tmp_path / "cache").iterdir()) == 1  # prepared once
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(logits(qsvft.load(tmp_path / "adapter", progress=False)), expected)


def test_a_prepared_base_is_found_and_one_that_moved_is_given(llama, tmp_path):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=8, progress=False)
    expected = trained(qsvft.from_pretrained(base, progress=False), tmp_path / "adapter")
    assert torch.equal(logits(qsvft.load(tmp_path / "adapter", progress=False)), expected)
    base.rename(tmp_path / "moved")
    with pytest.raises((OSError, ValueError), match="base"):
        qsvft.load(tmp_path / "adapter", progress=False)
    found = qsvft.load(tmp_path / "adapter", base=tmp_path / "moved", verify=True, progress=False)
    assert torch.equal(logits(found), expected)


def test_experts_are_adapted_as_they_were(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    source = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=8, num_local_experts=2)).bfloat16()
    source.save_pretrained(tmp_path / "source")
    model = qsvft.prepare(
        MixtralForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.bfloat16),
        rank=8,
        target_parameters=["experts.down_proj"],
        progress=False,
    )
    expected = trained(model, tmp_path / "adapter")
    assert torch.equal(logits(qsvft.load(tmp_path / "adapter", progress=False)), expected)


HEADS = {
    "sequence": (AutoModelForSequenceClassification, 5),
    "token": (AutoModelForTokenClassification, 4),
    "question": (AutoModelForQuestionAnswering, 2),
}
# transformers itself does not read a Llama as LlamaForQuestionAnswering, whose layers have another prefix.
CLASSES = [(family, head) for family in ("llama", "bert") for head in HEADS if (family, head) != ("llama", "question")]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("family", "head"), CLASSES)
def test_the_class_is_that_of_the_head_that_it_brings(tmp_path, family, head, prepared):
    """The base was saved as a language model, and has no such head."""
    if family == "llama":
        save_llama(tmp_path / "source")
    else:
        sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
        BertModel(BertConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "source")
    auto, labels = HEADS[head]
    options = {} if head == "question" else {"num_labels": labels}
    base = tmp_path / "source"
    model = auto.from_pretrained(base, dtype=torch.float32, **options)
    model = qsvft.prepare(model, rank=8, progress=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(input_ids=tokens())
        if prepared:
            base = qsvft.prepare_checkpoint(base, tmp_path / "prepared", rank=8, progress=False)
        again = qsvft.load(tmp_path / "adapter", base=base, progress=False).eval()
        found = again(input_ids=tokens())
    assert type(again.get_base_model()) is type(model.get_base_model())
    for name in ("logits", "start_logits"):
        if name in expected:
            assert torch.equal(found[name], expected[name])


def test_a_model_of_pictures(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    source = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3))
    source.save_pretrained(tmp_path / "source")
    model = ViTForImageClassification.from_pretrained(tmp_path / "source", num_labels=7, ignore_mismatched_sizes=True)
    model = qsvft.prepare(model, rank=8, progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
        pictures = torch.randn(2, 3, 16, 16)
        expected = model.eval()(pixel_values=pictures).logits
        model.save_pretrained(tmp_path / "adapter")
        found = qsvft.load(tmp_path / "adapter", progress=False).eval()(pixel_values=pictures).logits
    assert found.shape == (2, 7) and torch.equal(found, expected)


WAVES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
WAVES |= {"conv_dim": (32, 32), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
WAVES |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}


@pytest.mark.parametrize(
    ("kind", "outputs"), [(Wav2Vec2ForSequenceClassification, "num_labels"), (Wav2Vec2ForCTC, "vocab_size")]
)
def test_a_head_has_the_number_of_outputs_that_it_was_trained_with(tmp_path, kind, outputs):
    """A projection before it has fewer rows; and PEFT asks for the embeddings of a vocabulary of another size."""
    torch.manual_seed(0)
    Wav2Vec2Model(Wav2Vec2Config(**WAVES, vocab_size=30)).save_pretrained(tmp_path / "source")
    model = kind.from_pretrained(tmp_path / "source", **{outputs: 40})
    model = qsvft.prepare(model, rank=8, progress=False).eval()
    waves = torch.randn(2, 800)
    with torch.no_grad():
        expected = model(input_values=waves).logits
        model.save_pretrained(tmp_path / "adapter")
        found = qsvft.load(tmp_path / "adapter", progress=False).eval()(input_values=waves).logits
    assert found.shape[-1] == 40 and torch.equal(found, expected)


def test_an_adapter_with_a_head_is_exported_from_a_base_without_one(tmp_path):
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, num_attention_heads=4)).save_pretrained(tmp_path / "source")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "source", num_labels=3)
    randomize(qsvft.prepare(model, rank=8, progress=False)).save_pretrained(tmp_path / "adapter")
    done = qsvft.export(tmp_path / "adapter", tmp_path / "lora", dtype="float32", progress=False)
    assert (done.layers, done.rank) == (7, 8) and done.error < 1e-5


def test_what_an_adapter_does_not_bring_is_not_made_up(tmp_path):
    """An embedding of another size than the model's: with a head that may differ transformers would pass over it."""
    save_llama(tmp_path / "source")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "source", num_labels=3)
    qsvft.prepare(model, 16, rank=8, progress=False).save_pretrained(tmp_path / "adapter")
    base = qsvft.prepare_checkpoint(tmp_path / "source", tmp_path / "base", 16, rank=8, progress=False)
    assert qsvft.load(tmp_path / "adapter", base=base, progress=False) is not None
    with pytest.raises(
        ValueError, match=r"lacks 1 tensors of LlamaForSequenceClassification, such as model\.embed_tok"
    ):
        load_base(LlamaConfig.from_pretrained(base), tmp_path / "source", ("score",), Wider)


class Wider(AutoModelForSequenceClassification):
    """The same with a larger vocabulary."""

    @classmethod
    def from_pretrained(cls, path, **options):
        return super().from_pretrained(path, vocab_size=128, **options)


def test_an_adapter_that_names_no_base_is_refused(llama, tmp_path):
    model = qsvft.prepare(load(llama), rank=8, progress=False)
    model.peft_config["default"].base_model_name_or_path = None
    model.base_model.model.name_or_path = ""
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"names no base model; expected one\. Give it: qsvft\.load"):
        qsvft.load(tmp_path / "adapter")


def test_others_are_loaded_beside_it_switched_and_deleted_and_each_generates_what_it_did(llama, tmp_path):
    ids = tokens(2, 5)
    short = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    texts = {}
    for seed in (1, 2, 3):
        model = randomize(qsvft.prepare(load(llama, torch.float32), 4, rank=8, progress=False), seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        texts[str(seed)] = model.eval().generate(input_ids=ids, **short)
    model = qsvft.load(tmp_path / "1", adapter_name="1", progress=False).eval()
    with model.disable_adapter():
        texts["none"] = model.generate(input_ids=ids, **short)
    assert not any(torch.equal(texts["none"], texts[name]) for name in "123")
    for name in "23":
        model.load_adapter(tmp_path / name, name)
    for name in ("2", "1", "3"):
        model.set_adapter(name)
        assert torch.equal(model.generate(input_ids=ids, **short), texts[name])
    model.set_adapter("2")
    model.delete_adapter("3")
    assert torch.equal(model.generate(input_ids=ids, **short), texts["2"])
    mixed = model.generate(input_ids=ids, adapter_names=["1", "__base__"], **short)
    assert torch.equal(mixed, torch.stack([texts["1"][0], texts["none"][1]]))

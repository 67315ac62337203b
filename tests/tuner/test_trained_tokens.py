"""Rows of the embeddings that train beside M, and embeddings and head that stay one weight."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from small_models import load, logits, same_tensors, save_llama, tokens

import qsvft
from qsvft.lean.chunked_loss import disable_chunked_loss

IDS = tokens().flatten().unique()[:3].tolist()
pytestmark = pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning")


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "tied"])
def folder(request, tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), tie_word_embeddings=request.param)


def trained(folder, steps=4, **options):
    torch.manual_seed(0)
    model = qsvft.prepare(load(folder), bits=4, rank=8, progress=False, **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(steps):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


OPTIONS = [
    {"trainable_token_indices": IDS},
    {"trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}},
    {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_trains_of_the_embeddings_is_saved_loaded_and_merged(folder, tmp_path, options):
    model = trained(folder, **options)
    base = logits(qsvft.quantize(load(folder), 4, progress=False))
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qsvft.quantize(load(folder), 4, progress=False), tmp_path)
    assert torch.equal(logits(again), expected)
    embedded = again.get_input_embeddings()(tokens()).detach()
    merged = again.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings()(tokens()), embedded)
    assert float((logits(merged) - expected).norm()) < 0.05 * float(expected.norm())  # M's part is rounded to bf16
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))
    qsvft.export(tmp_path, tmp_path / "dense", format="dense", base=folder, dtype="bfloat16", progress=False)
    assert same_tensors(*(load_file(tmp_path / name / "model.safetensors") for name in ("dense", "merged")))


@pytest.mark.parametrize("changed", [{"trainable_token_indices": [1]}, {"modules_to_save": ["norm"]}], ids=str)
def test_a_file_without_what_its_config_trains_is_refused(folder, tmp_path, changed):
    trained(folder, steps=1).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ValueError, match=r"the adapter's file has no .*which its config wants"):
        PeftModel.from_pretrained(qsvft.quantize(load(folder), 4, progress=False), tmp_path)
    with pytest.raises(ValueError, match=r"the adapter's file has no .*which its config wants"):
        qsvft.quantize(load(folder), 4, progress=False).load_adapter(tmp_path)


def test_only_the_rows_that_are_named_change_and_the_head_s_with_them_where_it_is_tied(folder):
    before = load(folder).get_input_embeddings().weight
    merged = trained(folder, trainable_token_indices=IDS).merge_and_unload()
    changed = (merged.get_input_embeddings().weight != before).any(1).nonzero().flatten().tolist()
    assert changed and set(changed) <= set(IDS)
    tied = load(folder).config.tie_word_embeddings
    assert torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight) == tied


def test_the_chunked_loss_trains_them_as_the_model_s_own_loss_does(folder):
    for options in (OPTIONS[0], OPTIONS[2]):
        chunked, whole = trained(folder, **options), trained(folder, chunked_loss=False, **options)
        torch.testing.assert_close(logits(chunked), logits(whole), atol=0.05, rtol=0.0)
    loss = trained(folder, steps=1, **OPTIONS[0])(input_ids=tokens(), labels=tokens()).loss
    model = trained(folder, steps=1, **OPTIONS[0])
    disable_chunked_loss(model.get_base_model())
    torch.testing.assert_close(loss, model(input_ids=tokens(), labels=tokens()).loss, atol=1e-2, rtol=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_token_indices": [3, 96]}, "96 is no row of model.embed_tokens, which has 96"),
        ({"trainable_token_indices": {"nothing": [1]}}, "'nothing' matches no module .*'model.embed_tokens'"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "q_proj is a Linear4bit without a dense weight of tokens"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "is in modules_to_save as well"),
        ({"trainable_token_indices": [1], "quantize_embeddings": 8}, "expected one of the two"),
        *(({"trainable_token_indices": bad}, "each once") for bad in ([], [1, 1], [-1], {}, {"embed_tokens": []}, 3)),
    ],
    ids=str,
)
def test_tokens_that_are_not_there_are_refused_by_name(folder, options, message):
    with pytest.raises(ValueError, match=message):
        qsvft.prepare(qsvft.quantize(load(folder), 4, progress=False), rank=8, progress=False, **options)


def test_rows_of_one_weight_cannot_be_trained_apart(tmp_path):
    save_llama(tmp_path, tie_word_embeddings=True)
    apart = {"embed_tokens": [1], "lm_head": [2]}
    with pytest.raises(ValueError, match="embed_tokens and lm_head are one weight"):
        qsvft.prepare(load(tmp_path), rank=8, progress=False, trainable_token_indices=apart)


def test_an_adapter_with_more_tokens_than_the_model_has_is_refused(folder, tmp_path):
    base = load(folder)
    base.resize_token_embeddings(100, mean_resizing=False)
    model = qsvft.prepare(base, bits=16, rank=8, progress=False, trainable_token_indices=[99])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"99 is no row of model.embed_tokens"):
        PeftModel.from_pretrained(load(folder), tmp_path)


def test_rows_that_trained_under_one_name_are_loaded_under_another(folder, tmp_path):
    model = qsvft.prepare(load(folder), rank=8, adapter_name="mine", trainable_token_indices=IDS, progress=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qsvft.quantize(load(folder)), tmp_path / "mine")
    assert torch.equal(logits(again), logits(model))

"""Pieces of a checkpoint are the tensors that transformers' own loading gives, bit for bit."""

import hashlib
import json
import multiprocessing
import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import same_tensors, save_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from qsvft.checkpoint.source import renames
from qsvft.checkpoint.source.checkpoint import open_checkpoint
from qsvft.checkpoint.source.names import empty_model, pieces_of, read_piece
from qsvft.checkpoint.source.tied import holders

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {k: v for k, v in SIZES.items() if not k.startswith(("num_key", "bos", "eos"))} | {"max_position_embeddings": 32}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {"vocab_size": 96, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}


def gathered(folder, dtype=None):
    """All pieces of a checkpoint, tied weights under all their names."""
    checkpoint = open_checkpoint(folder)
    model = empty_model(checkpoint, dtype)
    names = pieces_of(checkpoint, model)
    tensors = {}
    for piece in names.pieces:
        read = read_piece(checkpoint, piece, model)
        assert tuple(read) == piece.targets and not tensors.keys() & read.keys()
        tensors |= read
    return tensors | {name: tensors[holder] for name, holder in tied(model).items()}, names, model


def tied(model):
    """Names of the state dict that are another's tensor, and whose."""
    return {name: holder for name, holder in holders(model).items() if name != holder}


def check_as_loaded(folder, auto, dtype=None):
    """Same names, dtypes and bits as ``from_pretrained``; the empty model says so beforehand. Gives names and ties."""
    found, names, model = gathered(folder, dtype)
    expected = auto.from_pretrained(folder, dtype="auto" if dtype is None else dtype)
    assert type(model) is type(expected)
    assert same_tensors(found, expected.state_dict())
    promised = {name: (tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()}
    assert promised == {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}
    assert all(tensor.is_contiguous() for tensor in found.values())
    return names, tied(model)


def saved(folder, model, **options):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder, **options)
    return folder


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_llama(tmp_path, tied, dtype):
    folder = save_llama(tmp_path, tie_word_embeddings=tied)
    names, same = check_as_loaded(folder, AutoModelForCausalLM, dtype)
    assert same == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert names.unknown == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_in_shards_stored_in_16_bits(tmp_path, llama, dtype):
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50KB")
    check_as_loaded(tmp_path, AutoModelForCausalLM, dtype)


@pytest.mark.parametrize("whole", [True, False])
def test_gpt2_with_and_without_the_prefix_of_its_base(tmp_path, whole):
    saved(tmp_path, (GPT2LMHeadModel if whole else GPT2Model)(GPT2Config(**GPT2)))
    change_config(tmp_path, architectures=["GPT2LMHeadModel"])
    assert ("wte.weight" in open_checkpoint(tmp_path).entries) is not whole
    names, same = check_as_loaded(tmp_path, AutoModelForCausalLM)
    assert same == {"lm_head.weight": "transformer.wte.weight"}
    piece = next(piece for piece in names.pieces if piece.targets == ("transformer.h.0.attn.c_attn.weight",))
    assert open_checkpoint(tmp_path).read(piece.sources[0]).shape == (64, 192)


def test_a_base_model_takes_its_part_of_a_whole_one(tmp_path):
    saved(tmp_path, BertForSequenceClassification(BertConfig(**BERT)))
    change_config(tmp_path, architectures=["BertModel"])
    names, _ = check_as_loaded(tmp_path, transformers.AutoModel)
    assert set(names.unknown) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("made", "auto"),
    [(BertForSequenceClassification, AutoModelForSequenceClassification), (BertForMaskedLM, AutoModelForMaskedLM)],
)
def test_bert(tmp_path, made, auto):
    check_as_loaded(saved(tmp_path, made(BertConfig(**BERT))), auto)


def test_names_of_long_ago(tmp_path):
    saved(tmp_path, BertForSequenceClassification(BertConfig(**BERT)))

    def age(tensors):
        for key in [key for key in tensors if "LayerNorm" in key]:
            tensors[key.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(key)

    change_tensors(tmp_path, age)
    assert any(key.endswith("LayerNorm.gamma") for key in open_checkpoint(tmp_path).entries)
    check_as_loaded(tmp_path, AutoModelForSequenceClassification)


def test_phi3_whose_projections_are_fused_in_the_module(tmp_path):
    check_as_loaded(saved(tmp_path, Phi3ForCausalLM(Phi3Config(**SIZES))), AutoModelForCausalLM)


@pytest.mark.parametrize("size", ["50KB", "1GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtral_whose_experts_are_put_together(tmp_path, dtype, size):
    saved(tmp_path, MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS)), max_shard_size=size)
    assert "model.layers.0.block_sparse_moe.experts.2.w1.weight" in open_checkpoint(tmp_path).entries
    names, _ = check_as_loaded(tmp_path, AutoModelForCausalLM, dtype)
    fused = [piece for piece in names.pieces if piece.conversion is not None]
    assert sorted(len(piece.sources) for piece in fused) == [3, 3, 6, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_keeps_in_fp32_what_transformers_keeps(tmp_path, dtype):
    saved(tmp_path, T5ForConditionalGeneration(T5Config(**T5)))
    names, _ = check_as_loaded(tmp_path, AutoModelForSeq2SeqLM, dtype)
    kept = {name for piece in names.pieces if piece.dtype == "float32" for name in piece.targets}
    assert all(".wo." in name for name in kept) == (dtype != torch.float32)
    assert bool(kept) == (dtype != torch.bfloat16)


def test_the_dtype_is_that_of_the_first_tensor_if_the_config_has_none(tmp_path, llama):
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(tmp_path)
    change_config(tmp_path, dtype=None, torch_dtype=None)
    assert "dtype" not in json.loads((tmp_path / "config.json").read_text())
    check_as_loaded(tmp_path, AutoModelForCausalLM)


def test_without_transformers_tables_names_are_taken_as_they_are(tmp_path, llama, monkeypatch):
    saved(tmp_path / "base", GPT2Model(GPT2Config(**GPT2)))
    change_config(tmp_path / "base", architectures=["GPT2LMHeadModel"])
    saved(tmp_path / "task", BertForSequenceClassification(BertConfig(**BERT)))
    change_config(tmp_path / "task", architectures=["BertModel"])
    for folder in (llama, tmp_path / "base", tmp_path / "task"):
        expected, names, _ = gathered(folder)
        with monkeypatch.context() as without:
            without.setattr(renames, "core", None)
            found, names_without, _ = gathered(folder)
        assert same_tensors(found, expected)
        assert sorted(names_without.unknown) == sorted(names.unknown)


def test_without_transformers_tables_other_names_are_refused(tmp_path, monkeypatch):
    saved(tmp_path, MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS)))
    monkeypatch.setattr(renames, "core", None)
    with pytest.raises(ValueError, match=r"no weights for 'model\.layers\.0\.mlp\.experts\.down_proj'"):
        gathered(tmp_path)


def only_head(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def twice(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def twice_with_other_values(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize("change", [only_head, twice, twice_with_other_values])
def test_tied_weights_are_read_once_whatever_key_gives_them(tmp_path, change):
    folder = save_llama(tmp_path, tie_word_embeddings=True)
    change_tensors(folder, change)
    names, same = check_as_loaded(folder, AutoModelForCausalLM)
    apart = change is twice_with_other_values
    assert bool(same) is not apart
    read = [
        key for piece in names.pieces for key in piece.sources if key in ("lm_head.weight", "model.embed_tokens.weight")
    ]
    assert len(read) == (2 if apart else 1)


def test_weights_that_are_equal_once_cast_are_tied(tmp_path):
    folder = save_llama(tmp_path, tie_word_embeddings=True)

    def change(tensors):
        head = tensors["model.embed_tokens.weight"].bfloat16().float()
        tensors["lm_head.weight"], tensors["model.embed_tokens.weight"] = head, head * (1 + 2**-12)

    change_tensors(folder, change)
    assert check_as_loaded(folder, AutoModelForCausalLM, torch.bfloat16)[1]
    assert not check_as_loaded(folder, AutoModelForCausalLM, torch.float32)[1]


def test_each_piece_reads_only_its_own_keys(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(saved(tmp_path, MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS))))
    model = empty_model(checkpoint)
    asked = []
    read = type(checkpoint).read
    monkeypatch.setattr(type(checkpoint), "read", lambda self, key: asked.append(key) or read(self, key))
    names = pieces_of(checkpoint, model)
    assert asked == []
    for piece in names.pieces:
        asked.clear()
        read_piece(checkpoint, piece, model)
        assert tuple(asked) == piece.sources
    assert sorted(key for piece in names.pieces for key in piece.sources) == sorted(checkpoint.entries)


def _digests(checkpoint, pieces):
    model = empty_model(checkpoint)
    tensors = {name: tensor for piece in pieces for name, tensor in read_piece(checkpoint, piece, model).items()}
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def test_another_process_reads_the_same(tmp_path):
    checkpoint = open_checkpoint(saved(tmp_path, MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS))))
    pieces = pieces_of(checkpoint, empty_model(checkpoint)).pieces
    assert pickle.loads(pickle.dumps(pieces)) == pieces
    assert json.loads(json.dumps([asdict(piece) for piece in pieces])) is not None
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn")
    ) as pool:  # it says so where a process cannot begin
        assert pool.submit(_digests, checkpoint, pieces).result() == _digests(checkpoint, pieces)


def test_a_file_that_changed_after_matching_is_not_read(tmp_path):
    folder = save_llama(tmp_path)
    checkpoint = open_checkpoint(folder)
    model = empty_model(checkpoint)
    pieces = pieces_of(checkpoint, model).pieces
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64)}))
    with pytest.raises(ValueError, match=r"model\.safetensors: changed since"):
        read_piece(checkpoint, pieces[0], model)


def test_parameters_that_no_key_gives_are_named(tmp_path):
    folder = save_llama(tmp_path)
    change_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1." in key])
    with pytest.raises(
        ValueError, match=r"no weights for 'model\.layers\.1\..* and 4 more \(9 in all\) of LlamaForCausalLM"
    ):
        gathered(folder)


def test_a_missing_head_that_is_not_tied_is_named(tmp_path):
    folder = save_llama(tmp_path)
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"no weights for 'lm_head\.weight' of LlamaForCausalLM"):
        gathered(folder)


def test_a_missing_expert_is_named(tmp_path):
    saved(tmp_path, MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS)))
    change_tensors(tmp_path, lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.1.w2.weight"))
    found = "found shape (2, 64, 96) for model.layers.1.mlp.experts.down_proj"
    with pytest.raises(ValueError, match=re.escape(found)):
        gathered(tmp_path)


def test_a_wrong_shape_is_named_with_what_was_expected(tmp_path):
    folder = save_llama(tmp_path)
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(ValueError, match=re.escape("found shape (65,) for model.norm.weight")) as caught:
        gathered(folder)
    assert "expected (64,) by the config" in str(caught.value)


def test_experts_of_different_shapes_are_named(tmp_path):
    saved(tmp_path, MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS)))
    key = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({key: torch.ones(64, 95)}))
    with pytest.raises(ValueError, match=re.escape("(64, 95)")):
        gathered(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool, torch.complex64])
def test_weights_of_another_kind_are_refused(tmp_path, dtype):
    folder = save_llama(tmp_path)
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64).to(dtype)}))
    with pytest.raises(ValueError, match=rf"found model\.norm\.weight of dtype {dtype} for the floating-point"):
        gathered(folder)


def test_two_keys_for_one_parameter_are_refused(tmp_path):
    saved(tmp_path, BertForSequenceClassification(BertConfig(**BERT)))
    key = "bert.embeddings.LayerNorm.gamma"
    change_tensors(tmp_path, lambda tensors: tensors.update({key: torch.ones(64)}))
    with pytest.raises(
        ValueError, match=rf"found '{key}', .* for the one parameter bert\.embeddings\.LayerNorm\.weight"
    ):
        gathered(tmp_path)


def test_keys_that_the_model_does_not_know_are_reported(tmp_path):
    folder = save_llama(tmp_path)
    extra = {"model.extra.weight": torch.ones(2), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_tensors(folder, lambda tensors: tensors.update(extra))
    assert check_as_loaded(folder, AutoModelForCausalLM)[0].unknown == ("model.extra.weight",)

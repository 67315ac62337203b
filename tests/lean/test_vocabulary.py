"""Embeddings and output head in 8 or 4 bits: what they compute, what they keep, and what is left or refused."""

import copy
import logging
import re
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from small_models import load, logits, randomize, same_tensors, save_llama, state, tokens
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    ViTConfig,
)

import qsvft
from qsvft.lean import vocabulary
from qsvft.lean.vocabulary import QuantizedEmbedding, QuantizedHead, dequantize_vocabulary, quantize_embeddings
from qsvft.memory.ledger import Ledger
from qsvft.storage.stored_matrix import StoredMatrix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


class Vocabulary(nn.Module):
    """An embedding and a head as a transformers model has them, and nothing between."""

    def __init__(self, size=300, width=72, dtype=torch.float32, bias=True, tied=False):
        super().__init__()
        self.embed = nn.Embedding(size, width, padding_idx=2, dtype=dtype)
        self.head = nn.Linear(width, size, bias=bias, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(self.embed(ids))


def rounded(weight, bits):
    """The dense matrix that is held."""
    return StoredMatrix.hold(weight, bits).dense(torch.float64)


def distance(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_embedding_gives_the_rows_held_in_the_dtype_it_had(bits, dtype):
    model = Vocabulary(dtype=dtype)
    expected = rounded(model.embed.weight, bits).to(dtype)
    quantize_embeddings(model, bits)
    assert type(model.embed) is QuantizedEmbedding
    for ids in (tokens(3, 5), torch.tensor(7), torch.arange(300, dtype=torch.int32), torch.zeros(2, 0, dtype=int)):
        found = model.embed(ids)
        assert found.dtype == dtype and found.is_contiguous()
        assert torch.equal(found, expected[ids.long()])


@pytest.mark.parametrize("ids", [[-1], [300]])
def test_ids_outside_the_vocabulary_are_refused_as_an_embedding_refuses_them(ids):
    model = quantize_embeddings(Vocabulary(), 8)
    with pytest.raises(IndexError):
        model.embed(torch.tensor(ids))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(300, 72), (64, 64), (251, 507)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_head_is_as_exact_as_a_linear_layer_on_the_matrix_held(bits, dtype, shape, bias, monkeypatch):
    monkeypatch.setattr(vocabulary, "SLICE_ROWS", 64)
    model = Vocabulary(*shape, dtype=dtype, bias=bias)
    W = rounded(model.head.weight, bits)
    quantize_embeddings(model, bits)
    x, g = torch.randn(2, 9, shape[1]).to(dtype), torch.randn(2, 9, shape[0]).to(dtype)
    b = model.head.bias.detach() if bias else None

    def run(head, kind):
        inner = x.to(kind).requires_grad_()
        y = head(inner)
        (gradient,) = torch.autograd.grad(y, inner, g.to(kind))
        return y.detach(), gradient

    def linear(kind):
        return lambda inner: nn.functional.linear(inner, W.to(kind), None if b is None else b.to(kind))

    exact = run(linear(torch.float64), torch.float64)
    naive, ours = run(linear(dtype), dtype), run(model.head, dtype)
    for found, own, truth in zip(ours, naive, exact, strict=True):
        assert found.dtype == dtype and found.shape == truth.shape
        # The square root of two: a gradient's slices are rounded, and their sum once more.
        assert distance(found, truth) <= 1.5 * distance(own, truth) + 1e-12


@pytest.mark.parametrize("bits", [8, 4])
def test_the_head_is_differentiable_twice(monkeypatch, bits):
    monkeypatch.setattr(vocabulary, "SLICE_ROWS", 5)
    model = quantize_embeddings(Vocabulary(12, 8), bits)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: model.head(x).pow(2), x)


def test_the_gradients_error_does_not_grow_with_the_number_of_slices(monkeypatch):
    model = quantize_embeddings(Vocabulary(size=4096, width=64, dtype=torch.bfloat16, bias=False), 8)
    g = torch.randn(64, 4096).to(torch.bfloat16)
    truth = g.double() @ model.head.stored.dense(torch.float64)
    errors = []
    for rows in (4096, 16):
        monkeypatch.setattr(vocabulary, "SLICE_ROWS", rows)
        x = torch.zeros(64, 64, dtype=torch.bfloat16, requires_grad=True)
        model.head(x).backward(g)
        errors.append(distance(x.grad, truth))
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_the_head_computes_in_the_dtype_of_a_linear_layer(inside, autocast):
    model = quantize_embeddings(Vocabulary(), 8)
    dense = nn.Linear(72, 300).to(inside)
    x = torch.randn(4, 72).to(inside).requires_grad_()
    with torch.autocast("cpu", dtype=autocast):
        y = model.head(x)
        assert y.dtype == dense(x).dtype
    y.float().sum().backward()
    assert x.grad.dtype == inside and x.grad.any()


def test_a_trained_bias_of_the_head_gets_its_gradient():
    model = quantize_embeddings(Vocabulary(), 4)
    x, g = torch.randn(2, 5, 72), torch.randn(2, 5, 300)
    model.head(x).backward(g)
    torch.testing.assert_close(model.head.bias.grad, g.sum((0, 1)))


def test_no_tokens_give_no_logits_and_still_a_backward():
    model = quantize_embeddings(Vocabulary(), 4)
    x = torch.zeros(0, 72, requires_grad=True)
    y = model.head(x)
    assert y.shape == (0, 300)
    y.sum().backward()
    assert x.grad.shape == (0, 72)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_head_keeps_no_activation_for_the_backward(bits):
    model = quantize_embeddings(Vocabulary(), bits)
    kept = []
    x = torch.randn(6, 72, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model.head(x)
    held = {part.untyped_storage().data_ptr() for part in model.head.stored.buffers()}
    assert kept and {tensor.untyped_storage().data_ptr() for tensor in kept} <= held
    gone = weakref.ref(x)
    del x
    assert gone() is None and y.requires_grad


@pytest.mark.parametrize("bits", [8, 4])
def test_neither_direction_makes_the_head_dense(bits):
    model = quantize_embeddings(Vocabulary(20_000, 256, torch.bfloat16), bits)
    x = torch.zeros(3, 256, dtype=torch.bfloat16, requires_grad=True)
    ledger = Ledger()
    for held in (x, *model.buffers()):
        ledger.register(held, "base weights")
    before = len(ledger.events)
    with ledger:
        model.head(x).sum().backward()
    made = max(event.nbytes for event in ledger.events[before:])
    assert made == 8192 * 256 * 2 < 20_000 * 256 * 2


@pytest.mark.parametrize(("bits", "share"), [(8, 0.55), (4, 0.3)])
def test_the_bytes_held_are_those_of_the_bits(bits, share):
    model = Vocabulary(1000, 256, torch.bfloat16, bias=False)
    before = qsvft.held_bytes(model)["base"]
    assert qsvft.held_bytes(quantize_embeddings(model, bits))["base"] < share * before


def test_the_dense_weight_of_one_is_freed_before_the_next_is_held(monkeypatch):
    model = Vocabulary()
    dense = [weakref.ref(model.embed.weight), weakref.ref(model.head.weight)]
    alive, original = [], StoredMatrix.hold

    def hold(matrix, bits):
        alive.append([reference() is not None for reference in dense])
        return original(matrix, bits)

    monkeypatch.setattr(vocabulary.StoredMatrix, "hold", hold)
    quantize_embeddings(model, 8)
    assert alive == [[True, True], [False, True]]
    assert [reference() for reference in dense] == [None, None]


def test_a_tied_weight_is_held_once_also_in_a_copy_and_after_a_move():
    model = quantize_embeddings(Vocabulary(tied=True), 4)
    expected = model(tokens())
    assert model.head.stored is model.embed.stored
    for other in (copy.deepcopy(model), copy.deepcopy(model).to("cpu", torch.float64)):
        assert other.head.stored is other.embed.stored is not model.embed.stored
        assert [b.dtype for b in other.embed.stored.buffers()] == [b.dtype for b in model.embed.stored.buffers()]
        torch.testing.assert_close(other(tokens()).float(), expected)
    assert len({id(part) for part in model.buffers()}) == 3


def test_a_cast_of_the_model_casts_what_the_embedding_gives_but_not_what_is_held():
    model = quantize_embeddings(Vocabulary(dtype=torch.float32), 8)
    exact, parts = model.embed(tokens()), state(model.embed)
    model.to(torch.bfloat16)
    assert model.embed(tokens()).dtype == torch.bfloat16
    assert same_tensors(state(model.embed), parts)
    assert torch.equal(model.to(torch.float32).embed(tokens()), exact)


def test_the_modules_stay_the_same_objects_with_their_hooks(llama):
    model = load(llama)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    model.enable_input_require_grads()
    quantize_embeddings(model, 8)
    assert model.get_input_embeddings() is embedding and model.get_output_embeddings() is head
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (96, 64, 0)
    assert (head.in_features, head.out_features, head.bias) == (64, 96, None)
    assert type(head) is QuantizedHead and head.stored.rows == 96
    assert embedding(tokens()).requires_grad
    model.disable_input_require_grads()
    assert not embedding(tokens()).requires_grad


SMALL = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **SMALL,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
BART = {
    **SMALL,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 32,
    "scale_embedding": True,
    "forced_eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {**SMALL, "d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
BERT = {
    **SMALL,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
GPT2 = {**SMALL, "n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 32}
# How many embeddings and heads change, and how many different weights they hold.
MODELS = {
    "llama": (AutoModelForCausalLM, "llama", DECODER, (2, 2)),
    "gemma3_text": (AutoModelForCausalLM, "gemma3_text", DECODER, (2, 1)),
    "bart": (AutoModelForSeq2SeqLM, "bart", BART, (4, 1)),
    "t5": (AutoModelForSeq2SeqLM, "t5", T5, (4, 1)),
    "bert": (AutoModelForMaskedLM, "bert", BERT, (2, 1)),
    "gpt2": (AutoModelForCausalLM, "gpt2", GPT2, (2, 1)),
}


def small(name):
    kind, model_type, settings, counts = MODELS[name]
    torch.manual_seed(0)
    return kind.from_config(AutoConfig.for_model(model_type, **settings)).eval(), counts


def outputs(model):
    ids = tokens(2, 7)
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **extra).logits


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_does_with_the_rounded_weights(name, bits):
    """Also where the embedding scales its rows (Gemma, BART) and the head has a bias (BERT)."""
    model, counts = small(name)
    expected, _ = small(name)
    for module in {m.weight: m for m in (expected.get_input_embeddings(), expected.get_output_embeddings())}.values():
        module.weight.data = rounded(module.weight, bits).to(torch.float32)
    before = {id(module) for module in model.modules() if isinstance(module, nn.Embedding)}
    quantize_embeddings(model, bits)
    changed = [m for m in model.modules() if isinstance(m, (QuantizedEmbedding, QuantizedHead))]
    assert (len(changed), len({id(m.stored) for m in changed})) == counts
    left = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    assert len(left) == len(before) - len(changed) + (expected.get_output_embeddings() is not None)
    torch.testing.assert_close(outputs(model), outputs(expected), rtol=1e-4, atol=1e-5)
    assert not torch.equal(outputs(model), outputs(small(name)[0]))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_made_dense_again_saves_and_loads_as_a_plain_one(name, tmp_path):
    model, _ = small(name)
    kinds = {key: type(module) for key, module in model.named_modules()}
    quantize_embeddings(model, 4)
    expected = outputs(model)
    assert dequantize_vocabulary(model) is model
    assert {key: type(module) for key, module in model.named_modules()} == kinds
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again), outputs(model))
    inside, outside = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert (inside is outside) == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_made_dense_again_the_weight_is_contiguous_frozen_and_of_its_old_dtype(dtype):
    model = Vocabulary(width=72, dtype=dtype, tied=True)
    expected = rounded(model.embed.weight, 8).to(dtype)
    dequantize_vocabulary(quantize_embeddings(model, 8))
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.is_contiguous() and not model.embed.weight.requires_grad
    assert torch.equal(model.embed.weight, expected)
    assert set(vars(model.embed)) == set(vars(Vocabulary().embed))


def test_a_model_without_a_quantised_vocabulary_is_left_when_made_dense(model):
    before = state(model)
    assert same_tensors(state(dequantize_vocabulary(model)), before)


def base(folder, bits, vocabulary_bits=None):
    model = qsvft.quantize(load(folder), bits, progress=False)
    return model if vocabulary_bits is None else quantize_embeddings(model, vocabulary_bits)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("vocabulary"), tie_word_embeddings=request.param)


def prepared(folder, vocabulary_bits=8):
    return qsvft.prepare(base(folder, 4, vocabulary_bits), bits=4, progress=False)


def test_an_adapter_trains_saves_and_loads_over_a_quantised_vocabulary(folder, tmp_path):
    model = randomize(prepared(folder))
    model.train()
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 14 and all(g.any() and torch.isfinite(g).all() for g in gradients.values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(folder, 4, 8), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_an_adapters_state_has_nothing_of_the_vocabulary(folder):
    with_it, without = prepared(folder), qsvft.prepare(base(folder, 4), bits=4, progress=False)
    assert get_peft_model_state_dict(with_it).keys() == get_peft_model_state_dict(without).keys()
    assert not any("stored" in name for name in get_peft_model_state_dict(with_it))


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_embedding_layers_that_are_saved_with_an_adapter_have_to_be_those_of_the_base(folder, tmp_path):
    """PEFT saves them of its own where the vocabulary was resized. An adapter does not change the base."""
    model = randomize(prepared(folder))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert torch.equal(logits(PeftModel.from_pretrained(base(folder, 4, 8), tmp_path)), logits(model))
    other = base(folder, 4, 8)
    other.lm_head.stored.codes.zero_()
    with pytest.raises(
        ValueError, match=r"stored\.codes: the adapter's file has a tensor of the base with other values"
    ):
        PeftModel.from_pretrained(other, tmp_path)
    assert not other.lm_head.stored.codes.any()


def test_checkpointing_with_input_gradients_changes_no_bit_of_the_gradients(folder):
    gradients = []
    for checkpointing in (True, False):
        model = randomize(qsvft.prepare(base(folder, 4, 8), gradient_checkpointing=checkpointing, progress=False))
        model.get_base_model().enable_input_require_grads()
        model.train()
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert same_tensors(*gradients)


def test_generating_with_the_cache_gives_the_tokens_without_it(folder):
    model = quantize_embeddings(load(folder, torch.float32), 4).eval()
    ids = tokens(2, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=ids, use_cache=True, **options)
    assert cached.shape == (2, 11)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), cached)


def test_a_merged_model_made_dense_saves_and_loads_as_a_plain_one(folder, tmp_path):
    model = dequantize_vocabulary(randomize(prepared(folder)).merge_and_unload())
    assert not [m for m in model.modules() if isinstance(m, (QuantizedEmbedding, QuantizedHead))]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), expected)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == again.config.tie_word_embeddings


def test_a_head_that_is_trained_whole_is_left_whole_with_all_that_shares_its_weight(folder):
    model = load(folder)
    tied = model.config.tie_word_embeddings
    quantize_embeddings(model, 8, skip_modules=["lm_head"])
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is (nn.Embedding if tied else QuantizedEmbedding)


def test_a_state_dict_of_the_whole_model_holds_the_vocabulary(folder):
    model = quantize_embeddings(load(folder), 4)
    other = quantize_embeddings(load(folder), 4)
    other.model.embed_tokens.stored.codes.zero_()
    other.lm_head.stored.codes.zero_()
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(state(model))
    assert torch.equal(logits(other), logits(model))


class NormedEmbedding(nn.Embedding):
    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


class AlmostScaledEmbedding(nn.Embedding):
    embed_scale = 2.0

    def forward(self, ids):
        return super().forward(ids) * 2.0 + 1e-3


def embedding_like(kind, model, **options):
    new = kind(*model.embed.weight.shape, **options)
    new.weight = model.embed.weight
    return new


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (NormedEmbedding, {}, "embed is a NormedEmbedding, whose forward does more than"),
        (AlmostScaledEmbedding, {}, "embed is a AlmostScaledEmbedding, whose forward does more than"),
        (nn.Embedding, {"max_norm": 1.0}, "embed renormalises its rows"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_does_more_is_left_with_its_reason(kind, options, reason, tied, caplog):
    model = Vocabulary(tied=tied)
    model.embed = embedding_like(kind, model, **options)
    if tied:
        with pytest.raises(ValueError, match=f"expected token embeddings .* found {reason}"):
            quantize_embeddings(model, 8)
    else:
        with caplog.at_level(logging.WARNING, "qsvft.lean.vocabulary"):
            quantize_embeddings(model, 8)
        (message,) = [record.getMessage() for record in caplog.records]
        assert message.startswith(f"left as it is: {reason}")
    assert type(model.embed) is kind
    assert type(model.head) is (nn.Linear if tied else QuantizedHead)


@pytest.mark.parametrize("bits", [0, 2, 5, 8.5, "8", None])
def test_other_bits_are_refused(model, bits):
    with pytest.raises(ValueError, match=r"must be 4 \(NF4\), 8 \(int8\) or 16 .* got"):
        quantize_embeddings(model, bits)


def test_16_bits_leave_the_model_as_it_is(model):
    before = state(model)
    assert quantize_embeddings(model, 16) is model
    assert same_tensors(state(model), before)


@pytest.mark.parametrize(
    "network",
    [
        lambda: nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10)),
        lambda: AutoModel.from_config(
            ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32)
        ),
    ],
    ids=["plain module", "vision model"],
)
def test_a_model_without_a_vocabulary_is_refused(network):
    with pytest.raises(ValueError, match=r"expected token embeddings or an output head .* with 16 bits"):
        quantize_embeddings(network(), 8)


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused_by_name_before_anything_changes(model, name, value):
    with torch.no_grad():
        model.get_submodule(name).weight[5, :3] = value
    before = state(model)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: its weight holds 3 NaN or Inf values of 6144; expected"):
        quantize_embeddings(model, 8)
    assert same_tensors(state(model), before)
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding


def test_a_damaged_scaled_embedding_is_refused_as_damaged():
    model, _ = small("gemma3_text")
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds 1 NaN or Inf"):
        quantize_embeddings(model, 8)


def test_weights_without_values_or_of_another_dtype_are_refused_by_name():
    with pytest.raises(ValueError, match="embed: its weight is on the meta device"):
        quantize_embeddings(Vocabulary().to("meta"), 8)
    with pytest.raises(ValueError, match=r"embed: weight dtype torch\.float64 is not supported"):
        quantize_embeddings(Vocabulary(dtype=torch.float64), 8)


def test_without_values_the_shapes_are_those_of_a_real_model():
    from qsvft.storage.shapes_only import shapes_only

    real, empty = (Vocabulary(1000, 100, torch.bfloat16, tied=True) for _ in range(2))
    quantize_embeddings(real, 4)
    with shapes_only():
        quantize_embeddings(empty.to("meta"), 4)
    shapes = [
        {name: (tuple(b.shape), b.dtype) for name, b in model.named_buffers(remove_duplicate=False)}
        for model in (real, empty)
    ]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 6
    assert empty(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 1000)


def test_quantising_again_keeps_the_same_bits_and_refuses_others(model):
    quantize_embeddings(model, 8)
    before = state(model)
    assert same_tensors(state(quantize_embeddings(model, 8)), before)
    with pytest.raises(ValueError, match=r"model\.embed_tokens: held in 8 bits already, bits=4 would round it twice"):
        quantize_embeddings(model, 4)


def test_what_needs_a_dense_weight_is_told_what_to_do(model):
    quantize_embeddings(model, 8)
    with pytest.raises(AttributeError, match=r"model\.embed_tokens: expected a dense weight, .* resize before quant"):
        model.resize_token_embeddings(200)
    with pytest.raises(AttributeError, match=r"lm_head: .* quantize_embeddings at 16, or call .*dequantize_voc"):
        _ = model.lm_head.weight * 2
    assert not hasattr(model.model.embed_tokens, "weight")
    dequantize_vocabulary(model).resize_token_embeddings(200, mean_resizing=False)
    assert model.lm_head.out_features == 200

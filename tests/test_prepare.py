"""qsvft.prepare: what it changes, what it leaves, and what it refuses before anything is changed."""

import re

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import coefficients, load, logits, randomize, same_tensors, save_llama, state, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

import qsvft
from qsvft import QSVFTConfig
from qsvft.storage.residual import ResidualLinear
from qsvft.tuner import QSVFTLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASES = {4: bnb.nn.Linear4bit, 8: bnb.nn.Linear8bitLt, 16: nn.Linear}
BANDED = {"pattern": "banded", "off_diagonals": 2}
ONE_SIDED = {**BANDED, "sides": "one"}
ONE_SIDED = {**BANDED, "sides": "one"}
EACH_FORM = pytest.mark.parametrize("form", [ONE_SIDED, {}], ids=["one-sided", "default"])
EACH_PLAIN = pytest.mark.parametrize("form", [ONE_SIDED, {}], ids=["one-sided", "default"])


def adapted(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QSVFTLinear)}


def step_gradients(model):
    model.zero_grad()
    model.train()
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.anywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8, 16])
@EACH_FORM
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_prepared_model_computes_the_quantised_base_and_trains_M_alone(llama, bits, dtype, form):
    expected = logits(qsvft.quantize(load(llama, dtype), bits))
    model = qsvft.prepare(load(llama, dtype), bits=bits, **form)
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model), expected)
    assert all(isinstance(layer.base_layer, BASES[bits]) for layer in adapted(model).values())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == set(coefficients(model)) and len(trainable) == 14
    assert all(p.dtype == torch.float32 and not p.any() for p in trainable.values())
    gradients = step_gradients(model)
    assert all(torch.isfinite(g).all() and g.any() for g in gradients.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_M_is_held_in_a_higher_precision_than_before(llama, dtype):
    before = {name: p.dtype for name, p in load(llama, dtype).named_parameters()}
    model = qsvft.prepare(load(llama, dtype), bits=4)
    for name, parameter in model.named_parameters():
        original = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if original in before and not isinstance(parameter, bnb.nn.Params4bit):
            assert parameter.dtype == before[original], name


def test_the_base_is_quantised_in_place_and_the_head_and_embeddings_are_left(model):
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = embeddings.weight.detach().clone(), head.weight.detach().clone()
    prepared = qsvft.prepare(model, bits=4)
    assert prepared.get_base_model() is model
    assert model.get_input_embeddings() is embeddings and model.get_output_embeddings() is head
    assert torch.equal(embeddings.weight, weights[0]) and torch.equal(head.weight, weights[1])
    assert type(head) is nn.Linear
    assert model.is_loaded_in_4bit and model.is_quantized


def test_every_4_bit_layer_is_kept_from_repacking_also_those_not_adapted(model):
    prepared = qsvft.prepare(model, bits=4, target_modules=["q_proj"])
    layers = [m for m in prepared.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 14 and len(adapted(prepared)) == 2
    expected = logits(prepared)
    for _ in range(2):
        assert torch.equal(logits(prepared), expected)
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)


@pytest.mark.parametrize("bits", [4, 16])
@EACH_FORM
def test_checkpointing_is_non_reentrant_and_changes_no_bit_of_the_gradients(llama, bits, form):
    gradients = []
    for checkpointing in (True, False):
        model = randomize(qsvft.prepare(load(llama), bits=bits, gradient_checkpointing=checkpointing, **form))
        layer = model.get_base_model().model.layers[0]
        assert bool(getattr(layer, "gradient_checkpointing", False)) is checkpointing
        if checkpointing:
            assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is False
        gradients.append(step_gradients(model))
    assert same_tensors(*gradients)


@EACH_PLAIN
def test_a_plain_module_is_prepared_and_trained(form):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48, bias=False))

    x = torch.randn(5, 32)
    expected = qsvft.quantize(network(), 4)(x)
    model = qsvft.prepare(network(), bits=4, **form)
    assert torch.equal(model(x), expected)
    model(x).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_residual_base_of_one_layer_leaves_every_other_one_to_be_quantised():
    network = nn.Sequential(nn.Linear(32, 64), nn.Sequential(nn.Linear(64, 64), nn.GELU()))
    model = qsvft.prepare(network, bits=4, residual=True, target_modules="0", rank=8).get_base_model()
    assert type(model[0].base_layer) is ResidualLinear
    assert type(model[1][0]) is bnb.nn.Linear4bit  # whose name ends as that of the other


@EACH_FORM
def test_a_model_that_transformers_loaded_in_4_bits_is_prepared_like_one_quantised_here(llama, form):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = qsvft.prepare(load(llama, quantization_config=quantization, device_map="cpu"), bits=4, **form)
    ours = qsvft.prepare(load(llama), bits=4, **form)
    assert torch.equal(logits(theirs), logits(ours))
    assert torch.equal(logits(randomize(theirs)), logits(randomize(ours)))


@EACH_FORM
def test_tied_embeddings_stay_tied_and_dense(tmp_path, form):
    folder = save_llama(tmp_path, tie_word_embeddings=True)
    expected = logits(qsvft.quantize(load(folder), 4))
    model = qsvft.prepare(load(folder), bits=4, **form)
    inner = model.get_base_model()
    assert inner.get_output_embeddings().weight is inner.get_input_embeddings().weight
    assert torch.equal(logits(model), expected)
    expected = logits(randomize(model))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(qsvft.quantize(load(folder), 4), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("bits", [4, 16])
@EACH_PLAIN
def test_linears_that_share_a_weight_keep_sharing_it_and_learn_apart(bits, form):
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    model = qsvft.prepare(nn.Sequential(first, nn.GELU(), second), bits=bits, **form)
    one, two = adapted(model).values()
    assert one.base_layer.weight is two.base_layer.weight
    model(torch.randn(3, 32)).sum().backward()
    assert not torch.equal(one.M("default").grad, two.M("default").grad)


def test_a_fresh_classification_head_trains_whole_and_dense(llama):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(llama, dtype=torch.bfloat16, num_labels=3)
    prepared = qsvft.prepare(model, bits=4)
    trainable = {name for name, p in prepared.named_parameters() if p.requires_grad}
    assert {name for name in trainable if "qsvft_M" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }


@EACH_FORM
def test_rank_pattern_and_exclude_modules_reach_the_layers(model, form):
    options = {"rank": 20, "rank_pattern": {"k_proj": 10}, "exclude_modules": ["down_proj"], **form}
    prepared = qsvft.prepare(model, bits=4, **options)
    ranks = {name.split(".")[-1]: layer.pattern("default").rank for name, layer in adapted(prepared).items()}
    assert ranks == {"q_proj": 20, "k_proj": 10, "v_proj": 20, "o_proj": 20, "gate_proj": 20, "up_proj": 20}


@pytest.mark.parametrize(("pattern", "entries"), [("plain", 4), ("dense", 16)])
def test_off_diagonals_do_not_limit_the_rank_where_the_pattern_has_none(llama, pattern, entries):
    model = qsvft.prepare(load(llama), rank=4, off_diagonals=8, pattern=pattern)
    assert {M.numel() for name, M in model.named_parameters() if "qsvft_M" in name} == {entries}


def test_a_whole_config_does_what_its_options_do(llama):
    options = {"rank": 20, **ONE_SIDED, "task_type": "CAUSAL_LM"}
    by_config = qsvft.prepare(load(llama), config=QSVFTConfig(**options))
    by_options = qsvft.prepare(load(llama), **options)
    assert torch.equal(logits(randomize(by_config)), logits(randomize(by_options)))
    assert same_tensors(coefficients(by_config), coefficients(by_options))


@EACH_FORM
def test_held_bytes_add_up_to_every_tensor_of_the_model(model, form):
    prepared = qsvft.prepare(model, bits=4, **form)
    held = qsvft.held_bytes(prepared)
    assert held["M"] == sum(p.numel() * 4 for p in coefficients(prepared).values())
    frozen = ("qsvft_bases", "qsvft_scale")
    factors = [b for name, b in prepared.named_buffers() if any(part in name for part in frozen)]
    assert held["factors"] == sum(t.numel() * t.element_size() for t in factors)
    base, states = 0, {}
    for parameter in prepared.parameters():
        if not parameter.requires_grad:
            base += parameter.numel() * parameter.element_size()
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                for tensor in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
                    states[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    base += sum(states.values())
    buffers = sum(b.numel() * b.element_size() for n, b in prepared.named_buffers() if "qsvft_" not in n)
    assert held["base"] == base + buffers


@EACH_FORM
def test_deleting_the_model_frees_its_factors_without_the_garbage_collector(llama, form):
    import gc
    import weakref

    model = qsvft.prepare(load(llama), bits=4, **form)
    layer = next(iter(adapted(model).values()))
    held = (next(layer.qsvft_bases.buffers()), layer.base_layer.weight, layer)
    references = [weakref.ref(thing) for thing in held]
    gc.collect()
    gc.disable()
    try:
        del model, layer, held
        assert [reference() is None for reference in references] == [True, True, True]
    finally:
        gc.enable()


def with_weight(model, name, change):
    with torch.no_grad():
        change(model.get_submodule(name).weight)
    return model


def with_bias(model, name, value):
    layer = model.get_submodule(name)
    layer.bias = torch.nn.Parameter(torch.full((layer.out_features,), value, dtype=layer.weight.dtype))
    return model


def set_first(value):
    return lambda weight: weight.view(-1)[:2].fill_(value)


LAST = "model.layers.1.mlp.down_proj"
REFUSALS = {
    "no linear layer matches": (
        None,
        {"target_modules": r".*nothing.*"},
        r"no layer of LlamaForCausalLM is left to adapt: .*nothing.* Expected at least one linear layer; it has",
    ),
    "a misspelt target": (
        None,
        {"target_modules": ["q_proj", "k_porj"]},
        r"target_modules: 'k_porj' matches no module of LlamaForCausalLM; expected names .* Did you mean 'k_proj'",
    ),
    "a target that is not linear": (
        None,
        {"target_modules": ["q_proj", "input_layernorm"]},
        r"model\.layers\.0\.input_layernorm: cannot adapt a LlamaRMSNorm; expected a linear layer .* exclude_modules",
    ),
    "a rank over the limit": (
        None,
        {"rank": 65},
        r"rank=65 is over the limit of every layer; .*q_proj, which has the most .*, is 64 x 64\. .* at most 64\.",
    ),
    "as many off-diagonals as the rank": (
        None,
        {"pattern": "banded", "rank": 8},
        r"q_proj: off_diagonals=8 needs a rank above it, found rank 8, the highest of all .* at most 7: lower it",
    ),
    "NaN in the last layer": (
        lambda model: with_weight(model, LAST, set_first(float("nan"))),
        {},
        r"model\.layers\.1\.mlp\.down_proj: its weight holds 2 NaN or Inf values of 8192; expected finite .* load",
    ),
    "Inf in the last layer": (
        lambda model: with_weight(model, LAST, set_first(float("inf"))),
        {},
        r"model\.layers\.1\.mlp\.down_proj: its weight holds 2 NaN or Inf values of 8192; expected finite .* load",
    ),
    "NaN in a norm": (
        lambda model: with_weight(model, "model.layers.1.input_layernorm", set_first(float("nan"))),
        {},
        r"^model\.layers\.1\.input_layernorm: its weight holds \d+ NaN or Inf values of 64; expected finite",
    ),
    "NaN in the bias of a layer that is adapted": (
        lambda model: with_bias(model, LAST, float("nan")),
        {},
        r"^model\.layers\.1\.mlp\.down_proj: its bias holds 64 NaN or Inf values of 64; expected finite",
    ),
    "Inf in the embeddings": (
        lambda model: with_weight(model, "model.embed_tokens", set_first(float("inf"))),
        {},
        r"^model\.embed_tokens: its weight holds \d+ NaN or Inf values of 6144; expected finite",
    ),
    "NaN in the head": (
        lambda model: with_weight(model, "lm_head", set_first(float("nan"))),
        {},
        r"^lm_head: its weight holds \d+ NaN or Inf values of 6144; expected finite",
    ),
    "an unsupported dtype": (
        lambda model: model.double(),
        {},
        r"\w+: weight dtype torch\.float64 is not supported; expected float32, bfloat16 or float16\. Convert the model",
    ),
    "an unknown option": (None, {"ranks": 4}, r"prepare\(\): unknown option 'ranks'; expected one of .*rank, "),
    "bits out of range": (None, {"bits": 5}, r"bits must be 4 \(NF4\), 8 \(int8\) or 16 .* got 5"),
    "a field out of range": (
        None,
        {"off_diagonals": -1},
        r"QSVFTConfig\.off_diagonals: expected an integer of at least",
    ),
    "a config and options": (
        None,
        {"config": QSVFTConfig(), "rank": 4},
        r"prepare\(\): give either config or single options, got both: \['rank'\]",
    ),
}


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_says_what_to_do_and_leaves_the_model_as_it_was(model, kind, bits):
    spoil, options, message = REFUSALS[kind]
    if spoil is not None:
        model = spoil(model)
    before = state(model)
    modules = [(name, id(module)) for name, module in model.named_modules()]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises((ValueError, TypeError), match=message):
        qsvft.prepare(model, **{"bits": bits, **options})
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert same_tensors(state(model), before)
    assert not getattr(model, "is_loaded_in_4bit", False)


@pytest.mark.parametrize("bits", [4, 16])
def test_nan_in_a_conv1d_is_refused_before_anything_changes(bits):
    model = nn.Sequential(Conv1D(32, 32), Conv1D(32, 32))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1: its weight holds 1 NaN or Inf values of 1024"):
        qsvft.prepare(model, bits=bits)
    assert [type(module) for module in model] == [Conv1D, Conv1D]


def test_a_model_without_linear_layers_is_refused():
    model = nn.Sequential(nn.LayerNorm(4), nn.GELU())
    with pytest.raises(ValueError, match=r"(?i)no .*linear|target"):
        qsvft.prepare(model, bits=4)
    assert [type(module) for module in model] == [nn.LayerNorm, nn.GELU]


def test_a_model_on_the_meta_device_is_refused_by_name(llama):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S+: its weight is on the meta device .*Load the weights"):
        qsvft.prepare(model, bits=4)


def test_other_bits_than_the_model_holds_are_refused(llama):
    model = qsvft.quantize(load(llama), 4)
    with pytest.raises(ValueError, match="already quantised to 4 bits; bits=8 would quantise it twice"):
        qsvft.prepare(model, bits=8)


def test_a_model_prepared_already_is_refused_by_name(model):
    prepared = qsvft.prepare(model, bits=4)
    for again in (prepared, model):
        with pytest.raises(ValueError, match=r"carries adapters already; expected a model without any\. Use model"):
            qsvft.prepare(again, bits=4)
    assert len(adapted(prepared)) == 14


def test_a_model_with_another_methods_adapters_is_refused_by_name(model):
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: the model carries adapters already"):
        qsvft.prepare(model, bits=4)


def can_repack():
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


@pytest.mark.skipif(not can_repack(), reason="bitsandbytes repacks only on CPUs with AVX512-BF16")
def test_a_weight_that_bitsandbytes_has_repacked_is_refused_by_name(llama):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = load(llama, quantization_config=quantization, device_map="cpu")
    logits(model)
    name = next(n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit))
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: bitsandbytes has repacked .* Load the model again"):
        qsvft.prepare(model, bits=4)


def test_a_4_bit_layer_that_was_never_quantised_is_refused_by_name():
    model = nn.Sequential(bnb.nn.Linear4bit(32, 32, quant_type="nf4"))
    with pytest.raises(ValueError, match=r"0: a 4-bit layer without quantisation state; .*model\.to\(\"cpu\"\)"):
        qsvft.prepare(model, bits=4)


def test_attention_that_reads_its_weights_itself_is_refused_by_name():
    model = nn.TransformerEncoderLayer(32, 2, dim_feedforward=64, batch_first=True)
    with pytest.raises(ValueError, match=r"self_attn\.out_proj: MultiheadAttention .* exclude_modules"):
        qsvft.prepare(model, bits=16, target_modules=["out_proj"])
    assert set(adapted(qsvft.prepare(model, bits=16))) == {"base_model.model.linear1", "base_model.model.linear2"}


def test_all_linear_on_a_plain_module_leaves_attention_that_reads_its_weights_itself():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 2, dim_feedforward=64, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 32)
    expected = model(x)
    torch.testing.assert_close(qsvft.prepare(model, bits=16)(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_unless_it_is_switched_off(llama, shown, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, iterable=None, desc="", disable=False, **_):
            self.iterable, self.total = iterable, None
            bars.append((desc, not disable))

        def __iter__(self):
            return iter(self.iterable)

        def update(self):
            pass

        def close(self):
            pass

    monkeypatch.setattr("qsvft.storage.quantization.tqdm", Bar)
    monkeypatch.setattr("qsvft.tuner.model.tqdm", Bar)
    qsvft.prepare(load(llama), bits=4, progress=shown)
    assert bars == [("quantising to 4 bits", shown), ("decomposing", shown)]


LEANEST = {
    "factor_bits": 4,
    "sides": "one",
    "quantize_embeddings": 8,
    "offload": True,
    "pattern": "banded",
    "off_diagonals": 4,
}


def test_the_leanest_model_saves_reloads_merges_and_unloads_as_plain_ones(llama, tmp_path):
    plain_types = {name: type(module) for name, module in load(llama).named_modules()}
    model = randomize(qsvft.prepare(load(llama, torch.float32), bits=4, **LEANEST))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    base = qsvft.vocabulary.quantize_embeddings(qsvft.quantize(load(llama, torch.float32), 4), 8)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), expected)

    merged = model.merge_and_unload()
    assert {name: type(module) for name, module in merged.named_modules()} == plain_types
    found = logits(merged)
    assert (found - expected).norm() < 1e-3 * expected.norm()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged", torch.float32)), found)

    kept = again.unload()
    assert type(kept) is plain_types[""] and type(kept.model.norm) is plain_types["model.norm"]


@EACH_FORM
def test_lean_options_change_no_gradient_beyond_rounding(llama, form):
    """Chunked loss, lean norms, sliced products and offloaded checkpoints compute what the plain ones compute."""
    lean = step_gradients(randomize(qsvft.prepare(load(llama), bits=4, offload=True, **form)))
    model = randomize(qsvft.prepare(load(llama), bits=4, gradient_checkpointing=False, chunked_loss=False, **form))
    plain = step_gradients(qsvft.lean.norms.plain_norms(model))
    for name, gradient in plain.items():
        assert (lean[name] - gradient).norm() <= 0.05 * gradient.norm(), name


@pytest.mark.parametrize("bits", [5, 2.0, "8"])
def test_wrong_bits_of_the_embeddings_are_refused_before_anything_changes(model, bits):
    before = state(model)
    with pytest.raises(ValueError, match="quantize_embeddings: expected 16, 8 or 4"):
        qsvft.prepare(model, bits=4, quantize_embeddings=bits)
    assert same_tensors(state(model), before) and not adapted(model)


@pytest.mark.parametrize("options", [{}, ONE_SIDED, {"pattern": "plain"}], ids=str)
@pytest.mark.parametrize(("rank", "most"), [({"rank": 48}, 48), ({}, 64)], ids=["rank 48", "default"])
def test_a_layer_with_fewer_directions_than_the_rank_takes_all_of_its_own(llama, options, rank, most):
    model = qsvft.prepare(load(llama), bits=4, **rank, **options)
    ranks = {name: layer.pattern("default").rank for name, layer in adapted(model).items()}
    assert {rank for name, rank in ranks.items() if name.endswith(("k_proj", "v_proj"))} == {32}
    assert {rank for name, rank in ranks.items() if not name.endswith(("k_proj", "v_proj"))} == {most}


def test_a_dense_M_takes_128_directions_where_no_rank_is_given_and_the_others_all():
    def ranks(**options):
        network = nn.Sequential(nn.Linear(160, 200), nn.GELU(), nn.Linear(200, 96))
        return [layer.pattern("default").rank for layer in adapted(qsvft.prepare(network, **options)).values()]

    assert ranks() == [128, 96]
    assert ranks(pattern="banded") == [160, 96]

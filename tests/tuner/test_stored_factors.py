"""Factors that are stored: attached without decomposing, the same bit for bit, and only to the weights they are of."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import coefficients, load, logits, randomize, same_tensors, save_llama
from stored_models import (
    factors_in,
    forbid_decomposing,
    gpt2,
    layers,
    named_factors,
    prepared_llama,
    turn_signs,
    write,
)

import qsvft
from qsvft import QSVFTConfig
from qsvft.storage.factors import StoredBasis

WEIGHTS = "adapter_model.safetensors"
BANDED = {"pattern": "banded", "off_diagonals": 2}
ONE_SIDED = {**BANDED, "sides": "one"}
OPTIONS = {
    "default": {},
    "one-sided": ONE_SIDED,
    "one-sided in int8": {**ONE_SIDED, "factor_bits": 8},
    "one-sided in NF4": {**ONE_SIDED, "factor_bits": 4, "rank": 24},
    "two-sided": {**BANDED, "sides": "both"},
    "two-sided in int8": {"factor_bits": 8, "rank": 10},
    "several ranks": {**ONE_SIDED, "rank": 20, "rank_pattern": {"k_proj": 30, "down_proj": 5}},
    "top_k": {**ONE_SIDED, "pattern": "top_k", "rank": 16},
    "randomized": {**ONE_SIDED, "decomposition": "randomized", "rank": 8},
}
FORMS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
EACH_FORM = pytest.mark.parametrize("form", [ONE_SIDED, {}], ids=["one-sided", "default"])
EACH_IN_BF16 = pytest.mark.parametrize("form", [ONE_SIDED, {"factor_bits": 16}], ids=["one-sided", "both sides"])


def base(llama, bits=4):
    return qsvft.quantize(load(llama), bits, progress=False)


def prepare(model, **options):
    return qsvft.prepare(model, bits=4, progress=False, **options)


@pytest.fixture
def stored(llama, tmp_path):
    """Makes a prepared directory."""
    count = itertools.count()
    return lambda **options: prepared_llama(tmp_path / str(next(count)), llama, **options)


@pytest.mark.anywhere
@FORMS
def test_an_adapter_on_stored_factors_is_the_one_on_computed_ones_bit_for_bit(
    llama, tmp_path, stored, options, monkeypatch
):
    computed = randomize(prepare(load(llama), **options))
    expected = logits(computed)
    model = base(llama)
    qsvft.use_factors(model, stored(**options))
    forbid_decomposing(monkeypatch)
    found = randomize(prepare(model, **options))
    assert torch.equal(logits(found), expected)
    computed.save_pretrained(tmp_path / "computed")
    found.save_pretrained(tmp_path / "found")
    assert same_tensors(load_file(tmp_path / "found" / WEIGHTS), load_file(tmp_path / "computed" / WEIGHTS))
    for name, layer in layers(found).items():
        assert same_tensors(dict(layer.named_buffers()), dict(layers(computed)[name].named_buffers()))


@pytest.mark.anywhere
@pytest.mark.parametrize(
    "options", [ONE_SIDED, {**ONE_SIDED, "factor_bits": 8}, {}], ids=["one-sided", "one-sided in int8", "default"]
)
@pytest.mark.parametrize("bits", [4, 16])
def test_Conv1D_layers_take_stored_factors(tmp_path, options, bits, monkeypatch):
    options = {"target_modules": ["c_attn", "c_fc", "c_proj"], **options}
    computed = randomize(qsvft.prepare(gpt2(), bits=bits, progress=False, **options))
    expected = logits(computed)
    write(tmp_path, qsvft.quantize(gpt2(), bits, progress=False), named_factors(computed))
    model = qsvft.quantize(gpt2(), bits, progress=False)
    qsvft.use_factors(model, tmp_path)
    forbid_decomposing(monkeypatch)
    found = qsvft.prepare(model, bits=bits, progress=False, **options)
    assert torch.equal(logits(randomize(found)), expected)


@pytest.mark.anywhere
@pytest.mark.parametrize("bits", [4, 8, 16])
@EACH_FORM
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_trained_adapter_is_loaded_on_stored_factors(llama, tmp_path, stored, bits, form, monkeypatch):
    trained = randomize(qsvft.prepare(load(llama), bits=bits, progress=False, **form))
    trained.save_pretrained(tmp_path / "adapter")
    directory, model = stored(bits=bits, **form), base(llama, bits)
    qsvft.use_factors(model, directory)
    forbid_decomposing(monkeypatch)
    again = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(trained))
    assert same_tensors(coefficients(again), coefficients(trained))


@pytest.mark.parametrize(
    "options", [ONE_SIDED, {**ONE_SIDED, "factor_bits": 4}, {}], ids=["one-sided", "one-sided in NF4", "default"]
)
def test_a_smaller_rank_reads_the_first_directions(llama, stored, options, monkeypatch):
    expected = logits(randomize(prepare(load(llama), rank=12, decomposition="exact", **options)))
    model = base(llama)
    qsvft.use_factors(model, stored(rank=20, decomposition="exact", **options))
    forbid_decomposing(monkeypatch)
    found = randomize(prepare(model, rank=12, decomposition="exact", **options))
    assert torch.equal(logits(found), expected)
    assert {b.rank for b in found.modules() if isinstance(b, StoredBasis)} == {12}


@EACH_FORM
def test_a_larger_rank_than_is_stored_is_computed(llama, stored, form):
    model = base(llama)
    qsvft.use_factors(model, stored(**form, rank=12))
    found = randomize(prepare(model, **form, rank=20))
    assert torch.equal(logits(found), logits(randomize(prepare(load(llama), **form, rank=20))))


@pytest.mark.parametrize(
    ("form", "keys"),
    [(ONE_SIDED, ["V_bf16"]), ({"factor_bits": 16}, ["V_bf16", "U_bf16"])],
    ids=["one-sided", "both sides"],
)
def test_stored_factors_are_used_as_they_are_in_the_file(llama, stored, form, keys):
    model = base(llama)
    qsvft.use_factors(model, stored(**form))
    layer = layers(prepare(model, **form))["model.layers.0.self_attn.o_proj"]
    assert list(layer.qsvft_bases) == keys
    for key in layer.qsvft_bases:
        found = model.qsvft_factors.basis(layer.module_name, key, 64, 64, torch.device("cpu"))
        assert torch.equal(layer.basis(key).stored.values, found.stored.values)


@EACH_FORM
def test_the_directory_itself_counts_nothing_among_what_is_held(llama, stored, form):
    model = base(llama)
    qsvft.use_factors(model, stored(**form))
    assert qsvft.held_bytes(model) == qsvft.held_bytes(base(llama))
    assert qsvft.held_bytes(prepare(model, **form)) == qsvft.held_bytes(prepare(load(llama), **form))


def test_without_stored_lengths_they_are_measured(llama, tmp_path, stored):
    folder = stored(**ONE_SIDED)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    kept = {name: t for name, t in tensors.items() if not name.endswith((".s", ".rms"))}
    assert len(tensors) - len(kept) == 2 * 14
    save_file(kept, path)
    model = base(llama)
    model.qsvft_factors = factors_in(folder)
    assert torch.equal(
        logits(randomize(prepare(model, **ONE_SIDED))), logits(randomize(prepare(load(llama), **ONE_SIDED)))
    )


@EACH_FORM
def test_the_progress_bar_counts_what_is_decomposed(llama, stored, form, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **_):
            self.total, self.done = 0, 0
            bars.append(self)

        def update(self):
            self.done += 1

        def close(self):
            pass

    folder = stored(**form, target_modules=["q_proj", "k_proj", "v_proj"])
    monkeypatch.setattr("qsvft.tuner.model.tqdm", Bar)
    model = base(llama)
    model.qsvft_factors = factors_in(folder)
    prepare(model, **form, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert [(bar.done, bar.total) for bar in bars] == [(2, 2)]


@EACH_FORM
def test_NaN_in_a_weight_is_refused_on_stored_factors_too(llama, stored, form):
    model = base(llama)
    qsvft.use_factors(model, stored(**form))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.quant_state.offset.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: its weight holds NaN or Inf"):
        prepare(model, **form)


@EACH_IN_BF16
def test_damaged_factors_are_refused_by_the_tensors_name(llama, stored, form):
    folder = stored(**form)
    path, name = folder / "model.safetensors", "qsvft.model/layers/1/mlp/down_proj.U_bf16.values"
    tensors = load_file(path)
    tensors[name][3, 3] = torch.nan
    save_file(tensors, path)
    model = base(llama)
    qsvft.use_factors(model, folder)
    with pytest.raises(ValueError, match=rf"model\.safetensors: the tensor {name} is NaN or Inf in places"):
        prepare(model, **form)


@EACH_IN_BF16
def test_factors_in_other_bits_than_their_key_says_are_refused(llama, tmp_path, form):
    factors = named_factors(prepare(load(llama), **{**form, "factor_bits": 8}))
    renamed = {name.replace("int8", "bf16"): tensor for name, tensor in factors.items()}
    model = base(llama)
    model.qsvft_factors = factors_in(write(tmp_path, model, renamed))
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: .* is held in 8 bits, expected 16"):
        prepare(model, **form)


@pytest.mark.parametrize(("form", "bases"), [(ONE_SIDED, 1), ({}, 2)], ids=["one-sided", "default"])
def test_adapters_of_several_ranks_share_the_stored_directions(llama, stored, form, bases, monkeypatch):
    model = base(llama)
    qsvft.use_factors(model, stored(**form, decomposition="exact"))
    forbid_decomposing(monkeypatch)
    model = randomize(prepare(model, **form, rank=12, decomposition="exact"))
    before = logits(model)
    model.add_adapter("larger", QSVFTConfig(**form, rank=30, decomposition="exact", task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), before)
    for layer in layers(model).values():
        assert [basis.rank for basis in layer.held_bases().values()] == [30] * bases
    model.set_adapter("larger")
    assert not torch.equal(logits(randomize(model, "larger")), before)


@EACH_FORM
def test_a_copied_model_takes_stored_factors_as_well(llama, stored, form, monkeypatch):
    model = base(llama)
    qsvft.use_factors(model, stored(**form))
    expected = logits(randomize(prepare(copy.deepcopy(model), **form)))
    forbid_decomposing(monkeypatch)
    adapted = randomize(prepare(copy.deepcopy(model), **form))
    assert torch.equal(logits(copy.deepcopy(adapted)), expected)


@EACH_FORM
def test_what_was_computed_here_stays_beside_what_is_given_later(llama, stored, form, monkeypatch):
    model = randomize(prepare(load(llama), **form))
    before = logits(model)
    with pytest.MonkeyPatch.context() as patch:
        turn_signs(patch)
        folder = stored(**form)
        elsewhere = randomize(prepare(load(llama), **form), seed=5)
    expected = logits(elsewhere)
    assert not torch.equal(expected, logits(randomize(prepare(load(llama), **form), seed=5)))
    model.get_base_model().qsvft_factors = factors_in(folder)
    forbid_decomposing(monkeypatch)
    model.add_adapter("later", QSVFTConfig(**form, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), before)
    model.set_adapter("later")
    assert torch.equal(logits(randomize(model, "later", seed=5)), expected)


@EACH_FORM
def test_an_adapter_trained_on_other_signs_fits_with_its_factors_alone(llama, tmp_path, stored, form):
    with pytest.MonkeyPatch.context() as patch:
        turn_signs(patch)
        trained, folder = randomize(prepare(load(llama), **form)), stored(**form)
    expected = logits(trained)
    trained.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="singular vectors came out differently here") as refusal:
        PeftModel.from_pretrained(base(llama), tmp_path / "adapter")
    for way in ("qsvft.from_pretrained(DIR)", "use_factors(model, DIR)", "--base DIR", "include_factors=True"):
        assert way in str(refusal.value)
    model = base(llama)
    qsvft.use_factors(model, folder)
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path / "adapter")), expected)


@EACH_FORM
def test_an_adapter_trained_here_does_not_fit_other_factors(llama, tmp_path, stored, form):
    randomize(prepare(load(llama), **form)).save_pretrained(tmp_path / "adapter")
    with pytest.MonkeyPatch.context() as patch:
        turn_signs(patch)
        folder = stored(**form)
    model = base(llama)
    qsvft.use_factors(model, folder)
    with pytest.raises(ValueError, match="the weight is the same, but the factors given for it are others"):
        PeftModel.from_pretrained(model, tmp_path / "adapter")


@EACH_FORM
def test_a_forward_with_a_probe_of_other_factors_names_the_way_out(llama, form):
    model = prepare(load(llama), **form)
    layer = layers(model)["model.layers.0.self_attn.q_proj"]
    layer.qsvft_probe["default"].neg_()
    layer._verified.clear()
    with pytest.raises(ValueError, match=r"does not fit this base model.*use_factors\(model, DIR\).*include_factors"):
        logits(model)


@EACH_FORM
def test_use_factors_refuses_another_models_by_name(llama, other_llama, stored, form):
    folder, model = stored(**form), base(other_llama)
    message = r"^model\.layers\.\d\.\S+_proj: the factors in .* belong to another weight .* differ by"
    with pytest.raises(ValueError, match=message):
        qsvft.use_factors(model, folder)
    assert not hasattr(model, "qsvft_factors")


@pytest.mark.parametrize(("here", "there"), [(16, 4), (8, 4), (4, 16)])
@EACH_FORM
def test_use_factors_refuses_other_bits(llama, stored, here, there, form):
    folder = stored(bits=there, **form)
    with pytest.raises(ValueError, match="belong to another weight than the model's: they differ by"):
        qsvft.use_factors(base(llama, here), folder)


@EACH_FORM
def test_use_factors_refuses_one_changed_weight_by_its_name(llama, stored, form):
    folder, changed = stored(**form), load(llama)
    with torch.no_grad():
        changed.model.layers[1].self_attn.k_proj.weight.mul_(1.05)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.k_proj: the factors .* differ by 0\.0"):
        qsvft.use_factors(qsvft.quantize(changed, 4, progress=False), folder)


@EACH_FORM
def test_use_factors_takes_weights_that_another_kernel_rounded(llama, stored, form, monkeypatch):
    """Another quantiser may round a value halfway between two codes to the other."""
    folder, model = stored(**form), base(llama)
    for layer in model.model.layers:
        codes = layer.mlp.up_proj.weight.data
        codes[5, 0] = codes[5, 0] ^ 0x10
    expected = logits(model)
    qsvft.use_factors(model, folder)
    forbid_decomposing(monkeypatch)
    assert torch.equal(logits(prepare(model, **form)), expected)


@EACH_FORM
def test_use_factors_refuses_another_shape(tmp_path, stored, form):
    narrow = save_llama(tmp_path / "narrow", intermediate_size=96)
    folder = stored(**form)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.\S+: .*found shape \(\S+ \S+\) here .* and shape"):
        qsvft.use_factors(base(narrow), folder)


@EACH_FORM
def test_use_factors_refuses_a_model_without_the_layer(tmp_path, stored, form):
    shallow = save_llama(tmp_path / "shallow", num_hidden_layers=1)
    folder = stored(**form)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\..*LlamaForCausalLM has no such module"):
        qsvft.use_factors(base(shallow), folder)


def test_use_factors_refuses_a_directory_without_the_weight(llama, stored):
    folder = stored()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"found no model\.layers\.0\.mlp\.down_proj\.weight; expected every part"):
        qsvft.use_factors(base(llama), folder)


def test_use_factors_refuses_a_damaged_quantisation_state(llama, stored):
    folder = stored()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight.quant_state.bitsandbytes__nf4"].fill_(7)
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"mlp\.down_proj\.weight\.quant_state\S*: found \d+ bytes that are no valid JSON"
    ):
        qsvft.use_factors(base(llama), folder)


def test_use_factors_comes_before_adapters(llama, stored):
    folder = stored()
    with pytest.raises(ValueError, match=r"carries adapters already.* Call use_factors\(\) before"):
        qsvft.use_factors(prepare(load(llama)), folder)


def test_use_factors_refuses_an_ordinary_checkpoint(llama):
    with pytest.raises(ValueError, match=r"found no factors among its .* tensors"):
        qsvft.use_factors(base(llama), llama)


def test_use_factors_refuses_residual_weights(llama, tmp_path):
    from qsvft.storage.factor_files import residual_tensors

    factors = residual_tensors("model.layers.0.mlp.up_proj", "V_bf16_original", torch.ones(64))
    folder = write(tmp_path, base(llama), factors)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj: .* prepared with residual=True"):
        qsvft.use_factors(base(llama), folder)


@EACH_FORM
def test_peft_functions_take_stored_factors_too(llama, stored, form, monkeypatch):
    model = base(llama)
    qsvft.use_factors(model, stored(**form))
    forbid_decomposing(monkeypatch)
    adapted = get_peft_model(model, QSVFTConfig(**form, task_type="CAUSAL_LM"))
    assert len(layers(adapted)) == 14

"""What the base's rounding took from the directions of the data, given back by the adapter (``residual=True``)."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import load, logits, randomize, save_llama, tokens
from transformers import LlamaConfig

import qsvft
from qsvft import QSVFTConfig
from qsvft.maths.patterns import DensePattern, banded
from qsvft.maths.updates import two_sided_update
from qsvft.storage.factors import StoredBasis
from qsvft.storage.stored_matrix import StoredMatrix
from qsvft.storage.weights import dense_weight
from qsvft.tuner import QSVFTLinear

RANK = 8


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def batches(count=3):
    found = [tokens(4, 16, seed) for seed in range(count)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in found]


def prepared(llama, **options):
    return qsvft.prepare(load(llama), 4, calibration=batches(), rank=RANK, **options)


def adapted(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, QSVFTLinear)}


def held(rows, bits=16):
    return StoredBasis(StoredMatrix.hold(rows, bits))


@pytest.mark.parametrize("pattern", [DensePattern(6), banded(6, 2)], ids=["dense", "banded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_and_its_gradients_are_those_of_one_dense_matrix(pattern, dtype):
    torch.manual_seed(0)
    U, V, E = (held(torch.randn(6, size)) for size in (10, 12, 10))
    x, y, g = torch.randn(5, 12, dtype=dtype), torch.randn(5, 10, dtype=dtype), torch.randn(5, 10, dtype=dtype)
    values = torch.randn(pattern.count).requires_grad_()
    x.requires_grad_()
    found = two_sided_update(y, x, U, V, values, pattern, 0.5, E)
    found.backward(g)

    exact, a = values.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    M = pattern.dense(exact)
    u, v, e = (basis.dense(torch.float64) for basis in (U, V, E))
    wanted = y.double() + a @ (u.T @ (0.5 * M) @ v + e.T @ v).T
    wanted.backward(g.double())
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), wanted, **close)
    torch.testing.assert_close(x.grad.double(), a.grad, **close)
    torch.testing.assert_close(values.grad.double(), exact.grad, **close)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_lies_in_the_directions_is_computed_as_before_rounding(llama, bits):
    dense = load(llama)
    model = prepared(llama, factor_bits=bits)
    for name, layer in adapted(model).items():
        W = dense.get_submodule(name).weight.double()
        Q = layer.original_weight().double()
        V = layer.basis(layer.forms["default"].inward).dense(torch.float64)
        delta = layer.get_delta_weight("default").double()
        lost, left = ((W - held) @ V.T for held in (Q, Q + delta))
        assert left.norm() < {16: 0.01, 8: 0.02, 4: 0.2}[bits] * lost.norm(), name
        # Other inputs are as they were.
        beside = torch.linalg.qr(V.T)[0]
        beside = torch.eye(V.shape[1], dtype=torch.float64) - beside @ beside.T
        assert (delta @ beside).norm() < 1e-5 * delta.norm() + 1e-9, name


def test_the_model_is_nearer_to_the_dense_one_before_it_trains(llama):
    wanted = logits(load(llama))
    off, on = (prepared(llama, residual=residual) for residual in (False, True))
    near = {name: (logits(model) - wanted).norm() for name, model in (("off", off), ("on", on))}
    assert near["on"] < 0.8 * near["off"]
    with on.disable_adapter(), off.disable_adapter():
        assert torch.equal(logits(on), logits(off))


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_saved_adapter_carries_it_to_a_quantised_base(llama, tmp_path, bits):
    model = randomize(prepared(llama, factor_bits=bits))
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qsvft.quantize(load(llama), 4), tmp_path)
    assert torch.equal(logits(again), wanted)


def test_merged_it_is_in_the_weight(llama):
    options = {"calibration": batches(), "rank": RANK}
    model = randomize(qsvft.prepare(load(llama, torch.float32), 4, **options))
    wanted = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), wanted, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_streams_to_the_same_adapter(llama, tmp_path):
    streamed = qsvft.from_pretrained(llama, calibration=batches(), rank=RANK, dtype="bfloat16", cache_dir=tmp_path)
    for (name, one), other in zip(adapted(prepared(llama)).items(), adapted(streamed).values(), strict=True):
        assert other.settings["default"].residual
        assert torch.equal(one.get_delta_weight("default"), other.get_delta_weight("default")), name


def test_one_prepared_directory_serves_every_adapter_with_directions_from_data(llama, tmp_path):
    cache = {"cache_dir": tmp_path / "cache"}
    model = randomize(qsvft.from_pretrained(llama, calibration=batches(), rank=RANK, **cache))
    model.save_pretrained(tmp_path / "adapter")
    again = qsvft.from_pretrained(llama, adapter=tmp_path / "adapter", **cache)
    assert torch.equal(logits(again), logits(model))
    qsvft.from_pretrained(llama, calibration=batches(), rank=4, factor_bits=4, target_modules=["q_proj"], **cache)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.name != ".locks"]) == 1


def test_a_directory_prepared_for_directions_from_data_says_how_they_are_held(llama, tmp_path):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "prepared", basis="data", rank=RANK, factor_bits=4)
    config = qsvft.from_pretrained(base, calibration=batches()).peft_config["default"]
    assert (config.rank, config.factor_bits, config.residual) == (RANK, 4, False)
    other = qsvft.prepare_checkpoint(llama, tmp_path / "other", rank=RANK)
    config = qsvft.from_pretrained(other, calibration=batches()).peft_config["default"]
    assert (config.rank, config.factor_bits, config.residual) == (RANK, 8, False)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_card_is_fitted_with_what_is_given_back(llama, tmp_path, streamed):
    options = {"fit": {"card_gib": 8, "seq_len": 32}, "calibration": batches(), "rank": RANK}
    if streamed:
        model = qsvft.from_pretrained(llama, cache_dir=tmp_path, dtype="bfloat16", **options)
    else:
        model = qsvft.prepare(load(llama), **options)
    config = model.peft_config["default"]
    assert (config.basis, config.residual, config.factor_bits) == ("data", True, 8)
    counted = qsvft.recommend(load(llama), seq_len=32, rank=RANK, pattern="dense")
    model = qsvft.prepare(load(llama), fit=counted, calibration=batches())
    assert not model.peft_config["default"].residual  # it was not counted


def test_it_is_on_where_the_weights_are_at_hand(llama, tmp_path):
    options = {"calibration": batches(), "rank": RANK}
    base = qsvft.prepare_checkpoint(llama, tmp_path / "prepared", rank=RANK)
    found = {
        "dense": qsvft.prepare(load(llama), 4, **options),
        "dense, 8 bits": qsvft.prepare(load(llama), 8, **options),
        "quantised": qsvft.prepare(qsvft.quantize(load(llama), 4), 4, **options),
        "prepared": qsvft.from_pretrained(base, **options),
        "said so": qsvft.prepare(load(llama), 4, residual=False, **options),
    }
    on = {name: model.peft_config["default"].residual for name, model in found.items()}
    assert [name for name, is_on in on.items() if is_on] == ["dense"]


def test_a_refusal_names_what_is_missing(llama, tmp_path):
    options = {"calibration": batches(), "rank": RANK, "residual": True}
    with pytest.raises(ValueError, match=r"q_proj: residual=True needs the weight before.*Linear4bit"):
        qsvft.prepare(qsvft.quantize(load(llama), 4), 4, **options)
    with pytest.raises(ValueError, match="residual=True with bits=8; expected bits=4"):
        qsvft.prepare(load(llama), 8, **options)
    base = qsvft.prepare_checkpoint(llama, tmp_path / "prepared", rank=RANK)
    with pytest.raises(ValueError, match="needs the weights before they were quantised; found a prepared directory"):
        qsvft.from_pretrained(base, **options)


def test_calibrate_takes_the_weights_of_every_layer(llama):
    config = QSVFTConfig(basis="data", rank=RANK, residual=True, task_type="CAUSAL_LM")
    model, dense = qsvft.quantize(load(llama), 4), load(llama)
    weights = {n: m.weight for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear)}
    with pytest.raises(ValueError, match="expected weights="):
        qsvft.calibrate(model, config, batches())
    name = next(iter(weights))
    with pytest.raises(ValueError, match=rf"{name}: residual=True wants its weight .*\(1 of \d+ such\)"):
        qsvft.calibrate(model, config, batches(), weights=list(weights.items())[1:])
    with pytest.raises(ValueError, match=rf"{name}: its weight .* has shape \(2, 3\), expected"):
        qsvft.calibrate(model, config, batches(), weights=[(name, torch.zeros(2, 3))])
    qsvft.calibrate(model, config, batches(), weights=weights.items())
    layer = next(iter(adapted(get_peft_model(model, config)).values()))
    lost = dense_weight(dense.get_submodule(layer.module_name)).float() - layer.original_weight().float()
    V = layer.basis(layer.forms["default"].inward).dense(torch.float32)
    torch.testing.assert_close(layer.get_delta_weight("default"), lost @ V.T @ V, rtol=0, atol=1e-3)


EIGHT_B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
EIGHT_B |= {"num_hidden_layers": 2, "vocab_size": 512}


def test_the_ledger_counts_it():
    options = "basis=data,rank=128"
    plain, more = (
        qsvft.profile(LlamaConfig(**EIGHT_B), [f"qsvft:{options}{end}"], seq_len=64).rows[0]
        for end in ("", ",residual=true")
    )
    rows = 2 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)  # m of every layer
    # int8 in blocks of 64 with a bf16 scale each
    assert more.categories["factors"] - plain.categories["factors"] == 128 * rows * 33 // 32

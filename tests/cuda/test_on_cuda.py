"""What can only be seen on a CUDA device: the adapted layers, saved adapters and the allocator's bytes."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small_models import coefficients, load, logits, randomize, same_tensors, tokens
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import qsvft
from qsvft.storage.stored_matrix import StoredMatrix
from qsvft.storage.weights import dense_weight
from qsvft.tuner import QSVFTLinear

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FORMS = [
    {"off_diagonals": 2},
    {"pattern": "plain"},
    {"sides": "both", "off_diagonals": 2},
    {"pattern": "random", "off_diagonals": 1, "rank": 24},
    {"pattern": "top_k", "off_diagonals": 1, "sides": "both"},
    {"factor_bits": 8, "off_diagonals": 2},
    {"factor_bits": 4, "sides": "one", "off_diagonals": 2},
]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_stored_matrix_is_the_same_numbers_there(bits):
    matrix = StoredMatrix.hold(torch.randn(96, 200, generator=torch.Generator().manual_seed(0)), bits)
    here = matrix.dense()
    assert torch.equal(matrix.to(DEVICE).dense().cpu(), here)


def prepared(llama, dtype=torch.bfloat16, **options):
    """The small Llama prepared on the card."""
    return qsvft.prepare(load(llama, dtype).to(DEVICE), bits=4, progress=False, **options)


def loss_and_gradients(model):
    ids = tokens().to(DEVICE)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def dense_update(layer, M):
    """dW (m, n) of a layer in fp64 on the CPU, by the formulas."""
    pattern, form = layer.pattern("default"), layer.forms["default"]
    values = pattern.dense(M)
    U, V = (layer.basis(key).dense(torch.float64, pattern.rank).cpu() for key in (form.outward, form.inward))
    if form.kind == "both":
        return U.T @ (layer.units["default"] * values) @ V
    W = layer.original_weight().cpu().double()
    scale = layer.qsvft_scale["default"].cpu().double()
    if form.kind == "input":
        return W @ V.T @ (scale[:, None] * values) @ V
    return U.T @ (values * scale) @ U @ W


def reference(model, llama):
    """Loss and gradients of M in fp64 on the CPU, with the weights and factors that the model holds."""
    dense = load(llama, torch.float64)
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, QSVFTLinear)}
    leaves = {name: layer.M("default").detach().cpu().double() for name, layer in layers.items()}
    weights = {}
    for name, layer in layers.items():
        leaves[name].requires_grad_()
        W = layer.original_weight().cpu().double()
        weights[f"{name}.weight"] = W + dense_update(layer, leaves[name])
    ids = tokens()
    loss = torch.func.functional_call(dense, weights, kwargs={"input_ids": ids, "labels": ids}).loss
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.detach(), {
        f"base_model.model.{name}.qsvft_M.default.weight": gradient
        for name, gradient in zip(leaves, gradients, strict=True)
    }


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_training_step_has_the_loss_and_gradients_of_fp64(llama, options):
    model = randomize(prepared(llama, torch.float32, **options), scale=0.1).train()
    loss, gradients = loss_and_gradients(model)
    expected_loss, expected = reference(model, llama)
    torch.testing.assert_close(loss.cpu().double(), expected_loss.double(), rtol=1e-4, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        error = (gradient.cpu().double() - expected[name]).norm()
        assert float(error) < 1e-3 * float(expected[name].norm()), name


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_training_step_in_bf16_lowers_the_loss_and_moves_M_alone(llama, options):
    model = prepared(llama, **options).train()
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    first, gradients = loss_and_gradients(model)
    assert {g.device.type for g in gradients.values()} == {DEVICE}
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    second, _ = loss_and_gradients(model)
    assert second < first
    after = model.state_dict()
    assert {name for name in after if not torch.equal(before[name], after[name])} == set(coefficients(model))
    assert {M.dtype for M in coefficients(model).values()} == {torch.float32}


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("length", [1, 12])
def test_with_M_at_zero_the_logits_are_those_of_the_base_bit_for_bit(llama, options, length):
    ids = tokens(2, length).to(DEVICE)
    base = logits(qsvft.quantize(load(llama).to(DEVICE), 4, progress=False), ids)
    assert torch.equal(logits(prepared(llama, **options), ids), base)


def test_an_eval_forward_repacks_no_weight(llama):
    model = randomize(prepared(llama), scale=0.1).train()
    packed = {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed
    loss, gradients = loss_and_gradients(model)
    model.zero_grad(set_to_none=True)
    logits(model, tokens().to(DEVICE))
    again, gradients_again = loss_and_gradients(model)
    assert same_tensors({n: p.detach() for n, p in model.named_parameters() if n in packed}, packed)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_model_prepared_on_the_cpu_trains_after_it_was_moved(llama):
    model = randomize(qsvft.prepare(load(llama, torch.float32), bits=4, progress=False), scale=0.1)
    model = model.to(DEVICE).train()
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {DEVICE}
    loss, gradients = loss_and_gradients(model)
    assert torch.isfinite(loss)
    assert all(bool(g.any()) for g in gradients.values())


def test_trainer_takes_a_model_prepared_on_the_cpu_to_the_card(llama, tmp_path):
    model = qsvft.prepare(load(llama), bits=4, progress=False)
    before = coefficients(model)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 10)]
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "bf16": True}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    Trainer(
        model=model, args=TrainingArguments(output_dir=str(tmp_path), **options, **quiet), train_dataset=rows
    ).train()
    after = coefficients(model)
    assert {(M.device.type, M.dtype) for M in after.values()} == {(DEVICE, torch.float32)}
    assert all(not torch.equal(after[name].cpu(), before[name]) for name in after)


def quantized(llama, quantized_on, device):
    """The 4-bit fp32 Llama on a device, quantised there or elsewhere."""
    return qsvft.quantize(load(llama, torch.float32).to(quantized_on), 4, progress=False).to(device)


# Where both sides quantise on the CPU the weights are the same bytes; otherwise bitsandbytes' two
# implementations of NF4 have to agree.
@pytest.mark.parametrize("loaded_from", ["cpu", "where it runs"])
@pytest.mark.parametrize(("saved_on", "loaded_on"), [("cpu", DEVICE), (DEVICE, "cpu")])
@pytest.mark.parametrize("options", [{}, {"pattern": "top_k", "off_diagonals": 1, "sides": "both"}], ids=str)
def test_an_adapter_is_accepted_on_the_other_device_and_gives_its_logits(
    llama, tmp_path, options, saved_on, loaded_on, loaded_from
):
    origin = "cpu" if loaded_from == "cpu" else saved_on
    model = qsvft.prepare(quantized(llama, origin, saved_on), bits=4, progress=False, **options)
    randomize(model, scale=0.1).save_pretrained(tmp_path)
    origin = "cpu" if loaded_from == "cpu" else loaded_on
    again = PeftModel.from_pretrained(quantized(llama, origin, loaded_on), tmp_path)
    assert {M.device.type for M in coefficients(again).values()} == {torch.device(loaded_on).type}
    expected = logits(model, tokens().to(saved_on)).cpu()
    found = logits(again, tokens().to(loaded_on)).cpu()
    assert float((found - expected).norm()) < 1e-2 * float(expected.norm())


@pytest.mark.parametrize("quantized_on", ["cpu", DEVICE])
def test_a_quantised_weight_is_the_same_on_both_devices_bit_for_bit(quantized_on):
    """Singular vectors of wide matrices lie so close that a few other roundings of W turn them."""
    weight = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    model = torch.nn.Sequential(torch.nn.Linear(4096, 2048, bias=False, dtype=torch.bfloat16))
    model[0].weight.data.copy_(weight)
    model = qsvft.quantize(model.to(quantized_on), 4, progress=False)
    found = {device: dense_weight(model.to(device)[0]).cpu() for device in ("cpu", DEVICE)}
    assert torch.equal(found["cpu"], found[DEVICE])


@pytest.mark.parametrize("n", [48, 96, 4304])
def test_blocks_that_reach_over_rows_are_read_right(n):
    layer = torch.nn.Linear(n, 80, bias=False, dtype=torch.bfloat16, device=DEVICE)
    layer.weight.data.normal_(generator=torch.Generator(DEVICE).manual_seed(0))
    W, x = layer.weight.detach().float(), torch.eye(n, dtype=torch.bfloat16, device=DEVICE)
    held = qsvft.quantize(torch.nn.Sequential(layer), 4, progress=False)[0]
    read = [
        dense_weight(held).float(),
        held(x).t().float(),
        torch.cat([held(row.unsqueeze(0)) for row in x]).t().float(),
    ]
    assert all(float((found - W).norm() / W.norm()) == pytest.approx(0.093, abs=0.006) for found in read)


def test_both_devices_quantise_to_the_same_weight_but_for_ties():
    """bitsandbytes divides in another way on a card: a number in the middle of two codes may take the other one."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 4096, generator=generator).mul_(0.02).to(torch.bfloat16)
    found = []
    for device in ("cpu", DEVICE):
        model = torch.nn.Sequential(torch.nn.Linear(4096, 2048, bias=False, dtype=torch.bfloat16))
        model[0].weight.data.copy_(weight)
        found.append(dense_weight(qsvft.quantize(model.to(device), 4, progress=False)[0]).cpu())
    assert float((found[0] != found[1]).float().mean()) < 1e-4


BAND, FIXED = 0.08, 48 * 2**20  # of the prediction; and cuBLAS's workspaces, which the ledger does not count


@pytest.mark.parametrize("method", ["floor", "qlora", "qsvft", "qsvft:rank=256,sides=both", "svft"])
def test_the_allocators_peak_is_within_the_band_of_the_prediction(method, monkeypatch):
    """8 % and 48 MiB around the ledger's peak, on a model of eight layers of width 1024."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "gpu")
    from steps import Card, build

    from qsvft.memory.methods import parse_method
    from qsvft.memory.scenario import count_step

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    predicted = count_step(config, parse_method(method), 1, 1024)[0].peaks()["total"].nbytes
    card = Card()
    card.release()
    before = card.allocated()
    found = card.peak(build(config, parse_method(method), DEVICE), 1024, before)
    assert abs(found["allocated_bytes"] - predicted) <= BAND * predicted + FIXED


@pytest.mark.parametrize("options", [{}, {"sides": "both"}, {"factor_bits": 4, "rank": 24}], ids=str)
def test_a_checkpoint_is_prepared_alike_on_both_devices(llama, tmp_path, options):
    """Quantised on the CPU either way: the weights are the same bits, and an adapter runs on both."""
    states, changes = [], []
    for device in ("cpu", DEVICE):
        folder = qsvft.prepare_checkpoint(llama, tmp_path / device, device=device, progress=False, **options)
        base = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
        states.append({name: value.clone() for name, value in base.state_dict().items()})
        plain = logits(base)
        if device == "cpu":
            model = randomize(qsvft.from_pretrained(folder, device_map="cpu", progress=False), scale=0.1)
            model.save_pretrained(tmp_path / "adapter")
        changes.append(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")) - plain)
    assert same_tensors(*states)
    assert float((changes[0] - changes[1]).norm()) < 1e-3 * float(changes[0].norm())


def test_a_prepared_directory_loads_onto_the_card_and_trains(llama, tmp_path):
    folder = qsvft.prepare_checkpoint(llama, tmp_path / "prepared", factor_bits=4, dtype="bfloat16", progress=False)
    model = qsvft.from_pretrained(folder, progress=False)
    ids = tokens().to(DEVICE)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.is_cuda for name, p in model.named_parameters() if "qsvft_M" in name)
    held = [buffer for name, buffer in model.named_buffers() if "qsvft_bases" in name]
    assert held and all(buffer.is_cuda for buffer in held)

"""Offloading checkpoints: the same gradients, only activations travel, and nothing is left behind."""

import copy
import gc
import math
import weakref

import pytest
import torch
from small_models import coefficients, load, randomize, same_tensors, tokens
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, Trainer, TrainingArguments

import qsvft
from qsvft.lean import host_memory, offload
from qsvft.lean.offload import MIN_BYTES, offload_checkpoints, stop_offloading
from qsvft.memory.ledger import rounded
from qsvft.memory.methods import parse_method
from qsvft.memory.presets import model_config
from qsvft.memory.scenario import Scenario

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
CHECKPOINT = 2 * 12 * 64 * 2  # batch x tokens x width in bf16


@pytest.fixture
def travelled(monkeypatch):
    """Tensors travel on a CPU too; a list of (shape, dtype, storage) of those that did."""
    seen = []

    class Away(host_memory.Away):
        def leave(self, tensor):
            seen.append((tuple(tensor.shape), tensor.dtype, tensor.untyped_storage()._cdata))
            return super().leave(tensor)

    monkeypatch.setattr(offload, "Away", Away)
    monkeypatch.setattr(offload, "_HOSTS", ())
    return seen


def prepared(llama, **options):
    options = {"bits": 4, "progress": False, **options}
    return randomize(qsvft.prepare(load(llama), **options)).train()


def run(model):
    return model(input_ids=tokens(), labels=tokens(), use_cache=False).loss


def gradients(model):
    model.zero_grad()
    run(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def hooks_of(model):
    return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


def held_storages(model):
    return {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "no checkpointing"])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("form", [{}, {"sides": "one", "pattern": "banded", "off_diagonals": 2}], ids=str)
def test_the_gradients_are_bitwise_those_without_offloading(llama, form, bits, checkpointing, travelled):
    model = prepared(llama, bits=bits, gradient_checkpointing=checkpointing, **form)
    expected = gradients(model)
    assert not travelled
    offload_checkpoints(model, min_bytes=0)
    assert same_tensors(gradients(model), expected)
    assert travelled
    stop_offloading(model)
    travelled.clear()
    assert same_tensors(gradients(model), expected)
    assert not travelled


def test_each_layers_input_travels_once_and_beside_it_what_the_last_norm_keeps(llama, travelled):
    model = prepared(llama)
    base = model.get_base_model()
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        base.model.norm(torch.randn(2, 12, 64).to(torch.bfloat16).requires_grad_())
    norms = [(tuple(t.shape), t.dtype) for t in kept if t.nbytes >= CHECKPOINT]
    offload_checkpoints(model, min_bytes=CHECKPOINT)
    gradients(model)
    layers = base.config.num_hidden_layers
    assert [what[:2] for what in travelled] == [((2, 12, 64), torch.bfloat16)] * layers + norms
    assert layers == 2 and norms


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "no checkpointing"])
def test_weights_factors_and_whole_numbers_stay(llama, checkpointing, travelled):
    """Bits=16: here products keep the frozen weights themselves."""
    model = prepared(llama, bits=16, gradient_checkpointing=checkpointing)
    offload_checkpoints(model, min_bytes=0)
    gradients(model)
    assert travelled
    assert not {storage for _, _, storage in travelled} & held_storages(model)
    assert all(dtype.is_floating_point for _, dtype, _ in travelled)


def test_a_view_of_something_larger_stays_and_strides_are_kept(travelled):
    packer = offload._Packer(nn.Identity(), 0)
    whole = torch.randn(2, 3, 4)
    for stays in (
        whole[:1],
        whole[:1].expand(2, 3, 4),
        whole.view(-1)[:4].expand(6, 4),
        whole.unfold(2, 2, 2)[..., :1],
    ):
        assert packer(stays) is stays
    for travels in (whole, whole.transpose(0, 2), whole.permute(1, 2, 0), whole[:, None]):
        back = host_memory.unpack(packer(travels))
        assert back.data_ptr() != whole.data_ptr()
        assert back.stride() == travels.stride() and torch.equal(back, travels)


def test_the_host_s_copy_is_on_the_cpu_whatever_the_default_device_is():
    tensor = torch.randn(4, 6).t()
    with torch.device("meta"):
        away = host_memory.Away(tensor, host_memory.Order())
        away.leave(tensor)
    assert away.host.device.type == "cpu"
    assert torch.equal(away.fetch(), tensor) and away.fetch().stride() == tensor.stride()


def test_tensors_below_the_threshold_stay(llama, travelled):
    model = prepared(llama)
    offload_checkpoints(model)
    gradients(model)
    assert not travelled and MIN_BYTES == 2**20
    offload_checkpoints(model, min_bytes=CHECKPOINT)
    gradients(model)
    assert {shape for shape, _, _ in travelled} == {(2, 12, 64)}


def test_on_a_cpu_nothing_moves(llama, monkeypatch):
    monkeypatch.setattr(host_memory.Away, "__init__", None)  # would fail if one were made
    model = prepared(llama)
    expected = gradients(model)
    offload_checkpoints(model, min_bytes=0)
    assert same_tensors(gradients(model), expected)


def test_without_gradients_nothing_is_entered(llama, travelled, monkeypatch):
    model = prepared(llama)
    offload_checkpoints(model, min_bytes=0)
    monkeypatch.setattr(offload, "saved_tensors_hooks", None)  # would fail if it were used
    with torch.no_grad():
        run(model)
        run(model.eval())
    assert not travelled


def test_a_graph_that_is_kept_gives_its_gradients_twice(llama, travelled):
    model = prepared(llama, gradient_checkpointing=False)
    offload_checkpoints(model, min_bytes=0)
    loss = run(model)
    loss.backward(retain_graph=True)
    first = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss.backward()
    assert same_tensors({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, first)


def test_a_trainer_that_switches_checkpointing_on_itself_still_offloads(llama, travelled, tmp_path):
    results = []
    for offloading in (False, True):
        model = prepared(llama)
        if offloading:
            offload_checkpoints(model, min_bytes=0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            dataloader_pin_memory=False,
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens(4, 10)]
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        results.append(coefficients(model))
        assert bool(travelled) is offloading
    assert same_tensors(*results)


@pytest.mark.parametrize("text", ["floor", "qsvft:rank=32,chunked_loss=false"])
def test_the_ledger_sees_what_is_saved_leave_and_come_back(text, travelled):
    config = model_config("tiny")
    batch, length = 2, 96
    checkpoint = batch * length * config.hidden_size * 2
    peaks = []
    for offloading in (False, True):
        scenario = Scenario(config, parse_method(text), True, "adamw", "meta")
        if offloading:
            offload_checkpoints(scenario.model, min_bytes=checkpoint)
        ledger, _ = scenario.count(batch, length)
        peaks.append(ledger.peaks())
    layers = config.num_hidden_layers
    inputs, norms = travelled[:layers], {storage: (shape, dtype) for shape, dtype, storage in travelled[layers:]}
    assert [what[:2] for what in inputs] == [((batch, length, config.hidden_size), torch.bfloat16)] * layers
    # The first layer's input stays all the same: transformers asks for its gradient, so its graph node holds it.
    expected = (layers - 1) * rounded(checkpoint)
    expected += sum(rounded(math.prod(shape) * dtype.itemsize) for shape, dtype in norms.values())
    before, after = (peak["forward"] for peak in peaks)
    assert before.categories["saved activations"] - after.categories["saved activations"] == expected
    assert before.nbytes - after.nbytes == expected
    assert before.categories["logits and loss"] == after.categories["logits and loss"]


class StopHereError(Exception):
    pass


def interrupted(layer, error):
    """``error`` is a class: an error that the hook held would hold the frames, and what torch's checkpoint has open."""

    def hook(*_):
        raise error

    return layer.register_forward_pre_hook(hook)


def hooks_are_active():
    """Whether a tensor saved now would go through somebody's hooks."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


@pytest.mark.parametrize("place", ["model.layers.1", "model.norm", "model"])
def test_an_exception_in_the_forward_leaves_no_hooks_behind(llama, place, travelled):
    model = prepared(llama)
    offload_checkpoints(model, min_bytes=0)
    handle = interrupted(model.get_base_model().get_submodule(place), StopHereError)
    with pytest.raises(StopHereError):
        run(model)
    assert not hooks_are_active()
    handle.remove()
    assert gradients(model)
    assert not hooks_are_active()


def test_a_forward_interrupted_from_the_keyboard_is_closed_by_the_next(llama, travelled):
    model = prepared(llama)
    expected = gradients(model)
    offload_checkpoints(model, min_bytes=0)
    handle = interrupted(model.get_base_model().model.norm, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    assert hooks_are_active()
    handle.remove()
    assert same_tensors(gradients(model), expected)
    assert not hooks_are_active()


def test_stopping_takes_every_hook_away_and_starting_twice_adds_none(llama, travelled):
    model = prepared(llama)
    before = hooks_of(model)
    attributes = [set(vars(module)) for module in model.modules()]
    offload_checkpoints(model)
    once = hooks_of(model)
    offload_checkpoints(model)
    assert hooks_of(model) == once != before
    stop_offloading(model)
    assert hooks_of(model) == before
    assert [set(vars(module)) for module in model.modules()] == attributes
    stop_offloading(model)
    assert hooks_of(model) == before


def test_what_was_sent_away_before_stopping_is_fetched_after(llama, travelled):
    model = prepared(llama)
    expected = gradients(model)
    offload_checkpoints(model, min_bytes=0)
    model.zero_grad()
    loss = run(model)
    stop_offloading(model)
    loss.backward()
    assert same_tensors({name: p.grad for name, p in model.named_parameters() if p.requires_grad}, expected)


def test_a_copy_offloads_on_its_own(llama, travelled):
    model = prepared(llama).get_base_model()
    expected = gradients(model)
    offload_checkpoints(model, min_bytes=0)
    other = copy.deepcopy(model)
    stop_offloading(other)
    assert same_tensors(gradients(other), expected) and not travelled
    again = copy.deepcopy(model)
    stop_offloading(model)
    assert same_tensors(gradients(model), expected) and not travelled
    assert same_tensors(gradients(again), expected) and travelled
    assert not {storage for _, _, storage in travelled} & held_storages(again)


def test_deleting_a_model_that_offloads_frees_it_without_the_garbage_collector(llama, travelled):
    model = prepared(llama)
    offload_checkpoints(model, min_bytes=0)
    gradients(model)
    references = [weakref.ref(p) for p in model.parameters()]
    gc.collect()
    gc.disable()
    try:
        del model
        assert not [reference for reference in references if reference() is not None]
    finally:
        gc.enable()


def test_the_hooks_stand_on_the_modules_that_run_the_layers():
    shared = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    bart = AutoConfig.for_model(
        "bart", d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32, **shared
    )  # fmt: skip
    bert = AutoConfig.for_model(
        "bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **shared
    )
    for model, expected in (
        (AutoModelForSeq2SeqLM.from_config(bart), {"model.encoder", "model.decoder"}),
        (AutoModel.from_config(bert), {"encoder"}),
    ):
        offload_checkpoints(model)
        assert {name for name, module in model.named_modules() if "qsvft_offload" in vars(module)} == expected


def test_a_model_without_layers_to_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"Sequential: found no layer that transformers can checkpoint"):
        offload_checkpoints(nn.Sequential(nn.Linear(4, 4)))

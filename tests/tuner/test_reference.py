"""An adapter whose M is copied as others do it, to the reference of preference training, is the same map."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small_models import coefficients, load, logits, randomize, same_tensors, tokens
from transformers import AutoTokenizer

import qsvft
from qsvft.maths.updates import unit_of

FORMS = {
    "default": {},
    "one-sided": {"sides": "one", "pattern": "banded", "off_diagonals": 2},
    "random": {"pattern": "random", "off_diagonals": 2},
    "top_k": {"pattern": "top_k", "off_diagonals": 2},
    "from data": {"basis": "data", "rank": 8, "residual": True},
}


def prepared(llama, options):
    batches = [{"input_ids": ids, "labels": ids} for ids in (tokens(4, 16, seed) for seed in range(2))]
    more = {"calibration": batches} if options.get("basis") == "data" else {}
    return qsvft.prepare(load(llama), bits=4, **options, **more)


def reference(model):
    """What TRL does before DPO, GRPO, KTO and RLOO."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    return model


def as_reference(model):
    model.set_adapter("ref")
    return logits(model)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_copied_by_its_tensors_names_is_the_same_map(llama, tmp_path, monkeypatch, form, loaded):
    with monkeypatch.context() as before:  # as one that was made when alpha was another
        before.setattr("qsvft.tuner.layer.unit_of", lambda *of: 3 * unit_of(*of))
        model = randomize(prepared(llama, FORMS[form]))
    if loaded:
        model.save_pretrained(tmp_path)
        base = qsvft.quantize(load(llama), 4)
        model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    expected = logits(model)
    reference(model)
    assert all(M.any() for M in coefficients(model, "ref").values())
    assert len(coefficients(model, "ref")) == 14
    assert torch.equal(as_reference(model), expected)
    with torch.no_grad():
        model.get_parameter(next(iter(coefficients(model)))).add_(1.0)  # nothing but what was is shared
    assert torch.equal(as_reference(model), expected)


def test_newer_directions_from_data_are_not_those_of_an_adapter_with_the_same_config(llama):
    model = randomize(prepared(llama, {"basis": "data", "rank": 8, "residual": False}))
    expected, ids = logits(model), tokens(4, 16, seed=9)
    qsvft.calibrate(model.get_base_model(), model.peft_config["default"], [{"input_ids": ids, "labels": ids}])
    assert not torch.equal(as_reference(reference(model)), expected)


def test_the_first_loss_of_dpo_on_a_trained_adapter_is_ln_2(llama, tmp_path):
    from trl import DPOConfig, DPOTrainer

    model = randomize(prepared(llama, {"gradient_checkpointing": False}))
    rows = [{"prompt": "3 4", "chosen": " 5 6 7", "rejected": " 8 9"}] * 4
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=1,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            learning_rate=0.0,
            gradient_checkpointing=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(llama),
    )
    trainer.train()
    # TRL 1.0 computes the loss of a model in bf16 in bf16: to half of a step.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=2**-9)
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-3)


def test_names_of_before_load_from_a_file_and_from_a_state(llama, tmp_path):
    model = randomize(prepared(llama, {}))
    expected, trained = logits(model), coefficients(model)
    assert all(name.endswith(".qsvft_M.default.weight") for name in trained)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name.replace(".qsvft_M.weight", ".qsvft_M"): tensor for name, tensor in load_file(path).items()}
    assert sum(name.endswith(".qsvft_M") for name in tensors) == 14
    save_file(tensors, path, {"format": "pt"})
    assert torch.equal(logits(PeftModel.from_pretrained(qsvft.quantize(load(llama), 4), tmp_path)), expected)
    old = {name.replace(".default.weight", ".default"): tensor for name, tensor in model.state_dict().items()}
    fresh = prepared(llama, {})
    old = {name: tensor for name, tensor in old.items() if "qsvft_" in name}
    assert not fresh.load_state_dict(old, strict=False).unexpected_keys
    assert same_tensors(coefficients(fresh), trained)

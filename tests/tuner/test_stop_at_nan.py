"""Training that meets NaN ends at that step, names the module, and leaves the last finite adapter on the disk."""

import pytest
from peft import PeftModel
from small_models import coefficients, load, randomize, same_tensors, tokens
from transformers import Trainer, TrainingArguments

import qsvft

COMMON = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_steps": 4,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
}


class Spoiled(Trainer):
    """At one step something is done to the model or the batch."""

    at, spoil = 2, None

    def training_step(self, model, inputs, *args, **kwargs):
        if self.state.global_step == self.at and self.spoil is not None:
            self.kept = coefficients(self.model)
            inputs = type(self).spoil(self.model, inputs) or inputs
        return super().training_step(model, inputs, *args, **kwargs)


def trainer(llama, folder, spoil, **options):
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 10, seed=4)]
    model = randomize(qsvft.prepare(load(llama), 4, progress=False))
    arguments = TrainingArguments(str(folder), **{**COMMON, **options})
    kind = type("Once", (Spoiled,), {"spoil": staticmethod(spoil)})
    return kind(model, arguments, train_dataset=rows, callbacks=[qsvft.StopAtNaN()])


def overflow(name):
    def spoil(model, _):
        model.get_submodule(f"base_model.model.{name}").weight.data.fill_(float("inf"))

    return spoil


def huge_M(model, _):
    parameter = model.get_parameter("base_model.model.model.layers.1.mlp.up_proj.qsvft_M.default.weight")
    parameter.data.fill_(float("inf"))


FAULTS = {
    "a norm": (overflow("model.layers.1.post_attention_layernorm"), r"model\.layers\.1\.post_attention_layernorm, a"),
    "an adapted layer": (huge_M, r"model\.layers\.1\.mlp\.up_proj, a QSVFTLinear"),
}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0}, {"gradient_accumulation_steps": 3}], ids=str)
@pytest.mark.parametrize(("spoil", "said"), FAULTS.values(), ids=FAULTS)
def test_it_ends_at_the_step_and_names_the_first_module(llama, tmp_path, spoil, said, options):
    run = trainer(llama, tmp_path, spoil, **options)
    if spoil is huge_M:  # what training left broken is not saved either
        with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj: M of adapter 'default' holds"):
            run.train()
        return
    with pytest.raises(FloatingPointError, match=rf"^step 3: the loss is NaN or Inf; .*{said}"):
        run.train()
    assert same_tensors(coefficients(run.model), run.kept)
    again = PeftModel.from_pretrained(qsvft.quantize(load(llama), 4, progress=False), tmp_path / "before-nan")
    assert same_tensors(coefficients(again), run.kept)
    assert not run.model._forward_pre_hooks


def nan_loss(model, _):
    """As of a batch without labels: the loss is NaN, the gradient is finite."""
    hook = model.get_base_model().register_forward_hook(
        lambda _, __, out: setattr(out, "loss", out.loss + float("nan"))
    )
    model.hook = hook


def test_a_loss_that_is_nan_while_every_module_is_finite_is_said(llama, tmp_path):
    run = trainer(llama, tmp_path, nan_loss)
    with pytest.raises(FloatingPointError, match=r"^step 3: the loss is NaN .* module that gives some is base_model"):
        run.train()
    assert same_tensors(coefficients(run.model), run.kept)


def test_without_a_fault_it_changes_nothing(llama, tmp_path):
    found = []
    for callbacks in ([], [qsvft.StopAtNaN()]):
        run = trainer(llama, tmp_path, None)
        run.callback_handler.callbacks = [c for c in run.callback_handler.callbacks if type(c) is not qsvft.StopAtNaN]
        for callback in callbacks:
            run.add_callback(callback)
        run.train()
        found.append(coefficients(run.model))
        assert not run.model._forward_pre_hooks and not (tmp_path / "before-nan").exists()
    assert same_tensors(*found)

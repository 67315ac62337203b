"""Training through Trainer, TRL, accelerate and torch.compile, generation, and what stays in memory."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from small_models import coefficients, load, logits, randomize, same_tensors, save_llama, state, tokens
from transformers import AutoTokenizer, Trainer, TrainingArguments

import qsvft
from qsvft.tuner import QSVFTLinear

SCRIPTS = Path(__file__).parent / "scripts"
ONE_SIDED = {"sides": "one", "pattern": "banded", "off_diagonals": 2}
FORMS = {"one-sided": ONE_SIDED, "default": {}}
TWO_LAYERS = ["layers.1.self_attn.k_proj", "layers.0.mlp.up_proj"]
"""Of one-sided forms k_proj holds the output's factor, up_proj the input's."""
EACH_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
COMMON = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "seed": 3,
}


def rows(count=16):
    return [{"input_ids": row, "labels": row} for row in tokens(count, 10, seed=4)]


def trainer(model, folder, **options):
    arguments = TrainingArguments(output_dir=str(folder), **{**COMMON, "max_steps": 4, **options})
    return Trainer(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(4))


def trained(llama, folder, form, **options):
    model = qsvft.prepare(load(llama), bits=4, **form)
    trainer(model, folder, **options).train()
    return model


@pytest.fixture(scope="module", params=FORMS)
def uninterrupted(llama, tmp_path_factory, request):
    """A form, and M after four steps without evaluation or interruption."""
    form = FORMS[request.param]
    return form, coefficients(trained(llama, tmp_path_factory.mktemp("uninterrupted"), form))


@EACH_FORM
def test_trainer_moves_M_alone_and_lowers_the_loss(llama, tmp_path, form):
    model = qsvft.prepare(load(llama), bits=4, **form)
    before = state(model)
    run = trainer(model, tmp_path, max_steps=12, learning_rate=1e-1)
    start = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.9 * start
    after = state(model)
    assert {name for name in after if not torch.equal(before[name], after[name])} == set(coefficients(model))


def test_evaluating_between_steps_changes_no_bit_of_M(llama, tmp_path, uninterrupted):
    """On CPUs with AVX512-BF16 an eval forward of bitsandbytes repacks 4-bit weights in place."""
    form, expected = uninterrupted
    model = trained(llama, tmp_path, form, eval_strategy="steps", eval_steps=1)
    assert same_tensors(coefficients(model), expected)
    assert all(M.any() for M in expected.values())


def test_a_resumed_run_ends_with_bitwise_the_same_M(llama, tmp_path, uninterrupted):
    form, expected = uninterrupted
    trained(llama, tmp_path, form, save_strategy="steps", save_steps=2)
    model = qsvft.prepare(load(llama), bits=4, **form)
    trainer(model, tmp_path, save_strategy="steps", save_steps=2).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert same_tensors(coefficients(model), expected)


@EACH_FORM
def test_a_checkpoint_of_the_trainer_is_an_adapter(llama, tmp_path, form):
    model = trained(llama, tmp_path, form, save_strategy="steps", save_steps=4)
    again = PeftModel.from_pretrained(qsvft.quantize(load(llama), 4), tmp_path / "checkpoint-4")
    assert torch.equal(logits(again), logits(model))


@EACH_FORM
def test_the_best_checkpoint_is_loaded_at_the_end(llama, tmp_path, form):
    every_step = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    model = qsvft.prepare(load(llama), bits=4, **form)
    run = trainer(model, tmp_path, load_best_model_at_end=True, learning_rate=0.5, **every_step)
    run.train()
    losses = {log["step"]: log["eval_loss"] for log in run.state.log_history if "eval_loss" in log}
    assert run.evaluate()["eval_loss"] == min(losses.values())


def test_the_trainers_own_checkpointing_changes_no_bit_of_M(llama, tmp_path, uninterrupted):
    form, expected = uninterrupted
    model = trained(llama, tmp_path, form, gradient_checkpointing=True)
    assert same_tensors(coefficients(model), expected)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize(
    ("form", "held", "dtypes"),
    [(ONE_SIDED, 14, {torch.bfloat16}), ({}, 2 * 28, {torch.int8, torch.bfloat16})],  # codes and scales
    ids=FORMS,
)
def test_after_training_nothing_but_M_is_held_in_fp32(llama, tmp_path, options, form, held, dtypes):
    model = trained(llama, tmp_path, form, **options)
    fp32 = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert fp32 == set(coefficients(model))
    assert all(M.any() and torch.isfinite(M).all() for M in coefficients(model).values())
    factors = {name: b.dtype for name, b in model.named_buffers() if "qsvft_bases" in name}
    assert len(factors) == held and set(factors.values()) == dtypes


@EACH_FORM
def test_trl_keeps_M_in_fp32_and_small_steps_move_it(llama, tmp_path, form):
    """TRL casts trainable parameters of a 4-bit model to bf16, where a step of 1e-4 on 0.3 is lost."""
    from trl import SFTConfig, SFTTrainer

    model = randomize(qsvft.prepare(load(llama), bits=4, **form), scale=0.3)
    assert model.get_base_model().is_loaded_in_4bit
    before = coefficients(model)
    run = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path), **{**COMMON, "learning_rate": 1e-4}, max_steps=2, max_length=16, bf16=False
        ),
        train_dataset=Dataset.from_dict({"input_ids": tokens(8, 10).tolist()}),
        processing_class=AutoTokenizer.from_pretrained(llama),
    )
    assert same_tensors(coefficients(model), before)
    run.train()
    after = coefficients(model)
    assert {M.dtype for M in after.values()} == {torch.float32}
    moved = torch.cat([(after[name] != before[name]).float() for name in after])
    assert float(moved.mean()) > 0.95
    assert max(float((after[name] - before[name]).abs().max()) for name in after) < 1e-3


@EACH_FORM
def test_generating_with_the_cache_gives_the_tokens_without_it(llama, form):
    model = randomize(qsvft.prepare(load(llama, torch.float32), bits=4, **form)).eval()
    ids = tokens(2, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(input_ids=ids, use_cache=True, **options)
    assert cached.shape == (2, 13)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **options), cached)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=ids, use_cache=True, **options), cached)


def test_in_training_it_generates_what_it_generates_in_evaluation(llama):
    """A checkpointed layer takes no cache in training, of which generate() knows nothing."""
    model = randomize(qsvft.prepare(load(llama, torch.float32, attention_dropout=0.5), bits=4)).train()
    norm = model.base_model.model.model.norm.eval()
    ids = tokens(2, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = model.generate(input_ids=ids, **options)
    assert model.training and not norm.training and model.base_model.model.model.layers[0].mlp.training
    assert torch.equal(model.eval().generate(input_ids=ids, **options), found)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.train().generate(input_ids=ids, max_new_tokens=-1)
    assert all(module.training for module in model.modules())


@EACH_FORM
def test_generating_between_steps_changes_no_bit_of_the_gradients(llama, form):
    gradients = []
    for generate in (False, True):
        model = randomize(qsvft.prepare(load(llama), bits=4, **form))
        if generate:
            ids = tokens(1, 4)
            model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        model.train()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert same_tensors(*gradients)


def test_a_4_bit_base_that_fsdp_shards_trains_and_saves_the_adapter_of_one_process(llama, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(SCRIPTS / "train_sharded.py"), str(llama), str(tmp_path / "adapter")]
    done = subprocess.run([*launcher, *script], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["sharded"] > found["trained"] == 14
    assert found["whole_factors"] == 0 and found["factors"] >= 2 * 14
    assert found["error_to_one_process"] < 1e-5
    loaded = PeftModel.from_pretrained(qsvft.quantize(load(llama, torch.float32), 4), tmp_path / "adapter")
    assert sum(float(M.norm()) for M in coefficients(loaded).values()) == pytest.approx(found["size"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("form", [ONE_SIDED, {}], ids=["one-sided", "default"])
def test_the_compiled_model_has_the_eager_loss_and_gradients_with_checkpointing(tmp_path, form):
    """Of one layer, since tracing takes long: both kinds of its projections are adapted."""
    torch._dynamo.reset()
    base = load(save_llama(tmp_path, num_hidden_layers=1), torch.float32)
    model = qsvft.prepare(base, bits=4, target_modules=["k_proj", "up_proj"], **form)
    randomize(model, scale=0.1).train()

    def step(module):
        model.zero_grad()
        loss = module(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    loss, gradients = step(model)
    compiled_loss, compiled = step(torch.compile(model, backend="aot_eager"))
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    assert compiled.keys() == gradients.keys()
    for name in gradients:
        assert float((compiled[name] - gradients[name]).norm()) < 1e-4 * float(gradients[name].norm())


@pytest.mark.parametrize("form", [*FORMS.values(), {"calibration": True, "rank": 8}], ids=[*FORMS, "calibrated"])
def test_a_whole_model_compiles_into_one_graph_before_it_has_run(llama, form):
    torch._dynamo.reset()
    batches = [{"input_ids": tokens(2, 10, seed=seed), "labels": tokens(2, 10, seed=seed)} for seed in range(2)]
    options = {**form, **({"calibration": batches} if "calibration" in form else {}), "target_modules": TWO_LAYERS}
    model = qsvft.prepare(load(llama, torch.float32), bits=4, gradient_checkpointing=False, **options).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_compiled_model_refuses_what_does_not_fit_its_base_and_is_loaded_later(llama, other_llama):
    torch._dynamo.reset()
    options = {"target_modules": TWO_LAYERS, "gradient_checkpointing": False}
    one, other = (qsvft.prepare(load(path, torch.float32), bits=4, **options) for path in (llama, other_llama))
    compiled = torch.compile(one, backend="eager", fullgraph=True)
    compiled(input_ids=tokens())
    probes = {name: tensor for name, tensor in other.state_dict().items() if "qsvft_probe" in name}
    one.load_state_dict(probes, strict=False)
    # What is raised while a graph is traced comes wrapped.
    with pytest.raises(RuntimeError, match="does not fit this base model"):
        compiled(input_ids=tokens())


@pytest.mark.parametrize("checkpointing", [True, False])
@EACH_FORM
def test_deleting_a_trained_model_frees_it_without_the_garbage_collector(llama, form, checkpointing):
    model = qsvft.prepare(load(llama), bits=4, gradient_checkpointing=checkpointing, **form)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    layers = [module for module in model.modules() if isinstance(module, QSVFTLinear)]
    held = [t for layer in layers for t in (*layer.qsvft_bases.buffers(), layer.base_layer.weight)]
    references = [weakref.ref(thing) for thing in (*layers, *held)]
    gc.collect()
    gc.disable()
    try:
        del model, optimizer, layers, held
        assert not [reference() for reference in references if reference() is not None]
    finally:
        gc.enable()

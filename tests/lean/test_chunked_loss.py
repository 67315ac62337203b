"""The chunked loss inside transformers' models: same loss and gradients, and nothing else changes."""

import copy
import gc
import inspect
import logging
import pickle
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from small_models import VOCABULARY, load, tokens
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from qsvft.lean import chunked_loss
from qsvft.lean.chunked_loss import chunked_loss_obstacle, disable_chunked_loss, enable_chunked_loss
from qsvft.lean.deferred_logits import DeferredLogits
from qsvft.memory.ledger import Ledger

ROWS, LENGTH = 3, 333
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE = {"num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0}
# What lies between head and loss, and whether the head is tied: small enough caps and scales to matter.
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "granite": {"logits_scaling": 4.0, "tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.25},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 400},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 400, "rotary_dim": 8},
}


def small(name="llama", dtype=torch.float32, vocabulary=300, **changes):
    sizes = {} if name in ("gpt2", "gptj") else {**SIZES, **MORE}
    config = AutoConfig.for_model(
        name, vocab_size=vocabulary, **{**sizes, "bos_token_id": 1, "eos_token_id": 2, **ARCHITECTURES[name], **changes}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(rows=ROWS, length=LENGTH, ignored=0.3, vocabulary=300):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=generator) < ignored, -100)}


def step(model, **inputs):
    """(loss, the gradients of all parameters)."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(ours, theirs, rtol=1e-4):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert float((ours[1][name] - gradient).norm()) <= rtol * float(gradient.norm()) + 1e-7, name


@pytest.fixture
def calls(monkeypatch):
    """How often the chunked loss was computed, by the kind of head."""
    counter = Counter()
    compute = chunked_loss.chunked_cross_entropy

    def counting(hidden, head, *args, **kwargs):
        kind = "matrix" if isinstance(head, torch.Tensor) else "stored" if hasattr(head, "dense") else "called"
        counter[kind] += 1
        return compute(hidden, head, *args, **kwargs)

    monkeypatch.setattr(chunked_loss, "chunked_cross_entropy", counting)
    return counter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_the_models_own(name, dtype, calls):
    model, inputs = small(name, dtype), batch()
    theirs = step(model, **inputs)
    ours = step(enable_chunked_loss(model), **inputs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert calls == {"matrix": 1}
    if dtype == torch.float32:
        assert_same_step(ours, theirs)
        return
    exact = step(disable_chunked_loss(model).float(), **inputs)
    assert ours[1].keys() == theirs[1].keys() == exact[1].keys()
    for key, true in exact[1].items():
        error, own = (float((g[1][key] - true).norm()) for g in (ours, theirs))
        assert error <= 1.5 * own + torch.finfo(dtype).eps / 2 * float(true.norm()), key


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "extra",
    [
        {"num_items_in_batch": 17},
        {"num_items_in_batch": torch.tensor(1234)},
        {"ignore_index": 7},
        {"shift_labels": batch()["labels"].roll(2, 1)},
        {"something_else": 1},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_the_arguments_of_the_loss_mean_what_they_mean_in_transformers(name, extra, calls):
    model, inputs = small(name), batch(ignored=0 if "ignore_index" in extra else 0.3)
    theirs = step(model, **inputs, **extra)
    assert_same_step(step(enable_chunked_loss(model), **inputs, **extra), theirs)
    assert calls == {"matrix": 1}


def test_label_smoothing_is_that_of_torch():
    model, inputs = enable_chunked_loss(small()), batch()
    output = model(**inputs, label_smoothing=0.2)
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].flatten()
    expected = F.cross_entropy(output.logits.flatten(0, 1), shifted, label_smoothing=0.2)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: logits + 0)  # whole logits: the same loss
    torch.testing.assert_close(model(**inputs, label_smoothing=0.2).loss, expected, rtol=1e-5, atol=0)


def test_a_batch_without_labels_that_count_does_what_it_does_in_transformers():
    inputs = batch(ignored=1.1)
    for extra in ({}, {"num_items_in_batch": 5}):
        found = [step(model, **inputs, **extra) for model in (small(), enable_chunked_loss(small()))]
        torch.testing.assert_close(found[1][0], found[0][0], equal_nan=True)
        assert all(torch.equal(g, torch.zeros_like(g)) for g in found[1][1].values())


def test_labels_may_be_positional():
    model, inputs = small(), batch()
    names = list(inspect.signature(model.forward).parameters)
    arguments = [inputs.get(name) for name in names[: names.index("labels") + 1]]
    theirs = model(**inputs).loss
    output = enable_chunked_loss(model)(*arguments)
    assert isinstance(output.logits, DeferredLogits)
    torch.testing.assert_close(output.loss, theirs, rtol=1e-5, atol=0)


def test_evaluation_generation_and_forwards_without_labels_are_untouched():
    model, inputs = small(), batch(2, 20)
    chunked = enable_chunked_loss(copy.deepcopy(model))

    for mode, given, gradients in (
        ("eval", inputs, True),
        ("train", {"input_ids": inputs["input_ids"]}, True),
        ("train", inputs, False),
    ):
        with torch.set_grad_enabled(gradients):
            theirs, ours = (getattr(m, mode)()(**given) for m in (model, chunked))
        assert type(ours.logits) is torch.Tensor and torch.equal(ours.logits, theirs.logits)
        assert ours.loss is theirs.loss is None or torch.equal(ours.loss, theirs.loss)
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(inputs["input_ids"])}
    generated = [m.eval().generate(inputs["input_ids"], **options) for m in (model, chunked)]
    assert torch.equal(*generated)
    with pytest.raises(ValueError, match="not_an_argument"):  # generate knows the forward's arguments
        chunked.generate(inputs["input_ids"], not_an_argument=1, **options)


@pytest.mark.parametrize("name", ["gemma2", "granite", "gptj"])
def test_logits_that_are_read_are_the_models_with_their_graph(name):
    model, inputs = small(name, torch.bfloat16), batch(2, 20)
    theirs = model(**inputs)
    ours = enable_chunked_loss(model)(**inputs)
    logits = ours.logits
    assert isinstance(logits, DeferredLogits)
    assert (logits.shape, logits.dtype, logits.device, logits.ndim) == (
        theirs.logits.shape,
        theirs.logits.dtype,
        theirs.logits.device,
        3,
    )
    assert logits.size(-1) == 300 and "shape=(2, 20, 300)" in repr(logits)
    assert logits._computed is None
    with torch.no_grad():
        assert torch.equal(logits[:, -1], theirs.logits[:, -1])
    assert torch.equal(torch.argmax(logits, -1), logits.argmax(-1))
    assert torch.equal((logits * 2 + 1).float(), theirs.logits * 2 + 1)
    assert torch.equal(1 - logits, 1 - theirs.logits) and torch.equal(logits.to("cpu"), theirs.logits)
    assert len(logits) == 2 and bool((logits == theirs.logits).all())
    elsewhere = enable_chunked_loss(model)(**inputs).logits.to("meta")
    assert isinstance(elsewhere, DeferredLogits) and elsewhere.device.type == elsewhere[:1].device.type == "meta"
    assert not hasattr(elsewhere, "nothing_of_a_tensor") and copy.copy(elsewhere).shape == theirs.logits.shape
    found = []
    for output in (ours, theirs):
        model.zero_grad()
        F.log_softmax(output.logits.float(), -1).square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_logits_are_read_in_the_autocast_of_the_forward_and_before_the_head_moves():
    model, inputs = small(), batch(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = model(**inputs)
        ours = enable_chunked_loss(model)(**inputs)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    assert ours.logits.dtype == theirs.logits.dtype == torch.bfloat16
    assert torch.equal(ours.logits.float(), theirs.logits.float())
    later = model(**inputs)
    later.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"Linear: found the output head changed.*before the optimizer's step"):
        later.logits.argmax(-1)


def test_a_head_in_another_dtype_is_taken_as_autocast_takes_it_and_refused_without(calls):
    model, inputs = small(dtype=torch.bfloat16), batch()
    model.lm_head.float()
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model, **inputs)
        ours = step(enable_chunked_loss(model), **inputs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert ours[1]["lm_head.weight"].dtype == torch.float32
    assert calls == {"matrix": 1}
    for each in (model, disable_chunked_loss(model)):
        with pytest.raises(RuntimeError, match="dtype"):
            each(**inputs)


class Masking(LlamaForCausalLM):
    """Writes into its logits before it takes their loss."""

    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(hidden)
        logits[:, :, 100:] = -30.0
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return loss, logits / 2


def test_a_model_that_works_on_its_logits_gets_true_ones(calls):
    model, inputs = Masking(small().config).train(), batch()
    theirs = model(**inputs)
    ours = enable_chunked_loss(model)(**inputs)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert not calls


def test_a_loss_function_of_the_users_gets_true_logits(calls):
    model, seen = enable_chunked_loss(small()), []

    def mine(logits, labels, **kwargs):
        seen.append(type(logits))
        return logits.square().mean()

    model.loss_function = mine
    model(**batch())
    assert seen == [torch.Tensor] and not calls
    assert chunked_loss_obstacle(disable_chunked_loss(model)) == (
        "LlamaForCausalLM: found the loss mine, expected transformers' ForCausalLMLoss. Train it with its own loss."
    )


def test_hooks_of_the_head_see_hidden_states_and_logits_and_all_is_put_back_after_an_error(calls):
    model, inputs = enable_chunked_loss(small()), batch()
    head, seen = model.get_output_embeddings(), []
    before = [dict(vars(module)) for module in (model, head)]
    with_hooks = [
        head.register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        head.register_forward_hook(lambda _, args, logits: seen.append(tuple(logits.shape))),
    ]
    model(**inputs)
    assert seen[0].shape == (ROWS, LENGTH, 32) and seen[0].requires_grad
    assert seen[1] == (ROWS, LENGTH, 300) and calls == {"matrix": 1}
    with pytest.raises(ValueError, match="labels"):
        model(input_ids=inputs["input_ids"], labels=inputs["labels"][:, 1:])
    for handle in with_hooks:
        handle.remove()
    assert [dict(vars(module)) for module in (model, head)] == before


def test_the_ledger_sees_no_whole_logits_and_follows_the_loss_to_its_end():
    peaks = {}
    for chunked in (False, True):
        model = small(dtype=torch.bfloat16, vocabulary=4000)
        if chunked:
            enable_chunked_loss(model)
        ledger = Ledger()
        with ledger, ledger.watch(model, model.get_output_embeddings()):
            ledger.phase = "forward"
            loss = model(**batch()).loss
            ledger.phase = "backward"
            assert ledger.loss_region
            loss.backward()
        assert not ledger.loss_region
        of_loss = [event for event in ledger.events if event.allocation.category == "logits and loss"]
        peaks[chunked] = max(event.nbytes for event in of_loss)
    whole = ROWS * LENGTH * 4000
    assert peaks[False] == pytest.approx(4 * whole, rel=1e-3)
    assert peaks[True] == pytest.approx(4 * 256 * 4000, rel=1e-3)


def test_the_class_is_the_models_own_to_everyone_who_looks(tmp_path):
    model = small()
    plain, ours = type(model), type(enable_chunked_loss(model))
    assert enable_chunked_loss(model) is model and type(model) is ours is not plain
    assert (ours.__name__, ours.__qualname__, ours.__module__) == (
        "LlamaForCausalLM",
        "LlamaForCausalLM",
        plain.__module__,
    )
    assert isinstance(model, plain) and model.can_generate()
    assert inspect.signature(model.forward) == inspect.signature(small().forward)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is plain
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is ours and twin.lm_head.weight is not model.lm_head.weight
        assert_same_step(step(twin, **batch()), step(model, **batch()), rtol=0)
    assert disable_chunked_loss(model) is model and type(model) is plain
    assert type(disable_chunked_loss(model)) is plain


@pytest.mark.parametrize("adapters", [False, True])
def test_a_deleted_model_is_freed_without_the_garbage_collector(adapters):
    model = small()
    if adapters:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
    output = enable_chunked_loss(model)(**batch())
    output.loss.backward()
    output.logits.argmax(-1)
    references = [weakref.ref(module) for module in model.modules()]
    gc.collect()
    gc.disable()
    try:
        del model, output
        assert not [reference for reference in references if reference() is not None]
    finally:
        gc.enable()


def with_lora(model, **options):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options))
    return model.train()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, "matrix"),
        ({"target_modules": ["q_proj", "lm_head"]}, "called"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "matrix"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 6]}}, "called"),
    ],
    ids=["frozen", "adapted", "trained", "tokens"],
)
def test_every_head_that_peft_makes_gets_its_gradients(options, kind, calls):
    model = with_lora(small(), **options)
    theirs = step(model, **batch())
    assert enable_chunked_loss(model) is model
    assert_same_step(step(model, **batch()), theirs)
    with model.disable_adapter():
        plain = model(**batch()).loss
    assert (
        calls == {kind: 1, "matrix": 1}
        if kind == "called" and "modules_to_save" in options
        else sum(calls.values()) == 2
    )
    torch.testing.assert_close(plain, small()(**batch()).loss, rtol=1e-5, atol=0)


class Stored:
    """The head's weight as it is held elsewhere: rows are made dense where they are used."""

    def __init__(self, weight):
        self.weight, (self.rows, self.columns) = weight, weight.shape

    def dense(self, dtype, start=0, stop=None):
        return self.weight[start:stop].to(dtype)


class StoredHead(nn.Module):
    def __init__(self, linear, bias):
        super().__init__()
        self.stored, self.bias = Stored(linear.weight.detach()), bias

    def forward(self, x):
        return F.linear(x, self.stored.dense(x.dtype), self.bias)


@pytest.mark.parametrize("kind", ["stored", "stored with bias", "4 bits"])
def test_a_head_that_is_held_in_another_way_gives_the_same_gradients(kind, calls):
    model = small()
    if kind == "4 bits":
        head = Linear4bit(32, 300, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        head.load_state_dict(model.lm_head.state_dict())
        model.lm_head = head.to("cpu").requires_grad_(False)
    else:
        model.lm_head = StoredHead(model.lm_head, torch.randn(300) if "bias" in kind else None)
    theirs = step(model, **batch())
    assert_same_step(step(enable_chunked_loss(model), **batch()), theirs)
    assert calls == {"called" if kind == "4 bits" else "stored": 1}


@pytest.mark.parametrize("hooks_first", [True, False])
def test_a_model_with_accelerates_device_hooks_is_chunked_too(hooks_first, calls):
    model = small()
    theirs = step(model, **batch())
    if not hooks_first:
        enable_chunked_loss(model)
    add_hook_to_module(model, AlignDevicesHook("cpu", io_same_device=True))
    add_hook_to_module(model.lm_head, AlignDevicesHook("cpu"))
    assert_same_step(step(enable_chunked_loss(model), **batch()), theirs)
    assert calls == {"matrix": 1}
    assert_same_step(step(disable_chunked_loss(model), **batch()), theirs, rtol=0)
    assert calls == {"matrix": 1}


@pytest.mark.parametrize("mark", ["full_tensor", "ds_id", "_is_replica"])
def test_a_sharded_head_and_a_replica_step_aside(mark, calls):
    model = enable_chunked_loss(small())
    setattr(model if mark == "_is_replica" else model.lm_head.weight, mark, True)
    assert type(model(**batch()).logits) is torch.Tensor and not calls


def test_a_compiled_model_computes_its_own_loss(calls):
    torch._dynamo.reset()
    model, inputs = enable_chunked_loss(small(num_hidden_layers=1)), batch(2, 20)
    expected = model(**inputs).loss
    output = torch.compile(model, backend="eager")(**inputs)
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
    assert isinstance(output.logits, torch.Tensor) and calls == {"matrix": 1}


def test_a_model_whose_loss_cannot_be_chunked_is_refused_with_the_reason():
    bert = {"vocab_size": 60, **SIZES}
    bart = BartConfig(vocab_size=60, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16)
    patched = small()
    patched.forward = lambda **kwargs: None
    for model, reason in [
        (nn.Linear(2, 2), "Linear: expected a transformers causal language model"),
        (BertModel(BertConfig(**bert)), "BertModel: found no output head"),
        (BertForMaskedLM(BertConfig(**bert)), "BertForMaskedLM: its forward computes the loss itself"),
        (BartForCausalLM(bart), "BartForCausalLM: its forward computes the loss itself"),
        (patched, "LlamaForCausalLM: found a forward put on the model itself"),
    ]:
        with pytest.raises(ValueError, match=f"^enable_chunked_loss\\(\\): {reason}.*\\. [A-Z]"):
            enable_chunked_loss(model)
        assert chunked_loss_obstacle(model).startswith(reason)
        assert disable_chunked_loss(model) is model
    assert chunked_loss_obstacle(small()) is None
    assert chunked_loss_obstacle(enable_chunked_loss(small())) is None


def rows(count=8, length=20):
    """Sequences of which ever less counts, so that a mean over batches is not the mean over tokens."""
    ids = tokens(count, length, seed=4)
    return [{"input_ids": row, "labels": row.masked_fill(torch.arange(length) < i, -100)} for i, row in enumerate(ids)]


def arguments(folder, kind=TrainingArguments, **options):
    return kind(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
            "bf16": False,
            **options,
        },
    )


def logged(trainer, *keys):
    trainer.train()
    return [[log[key] for key in keys] for log in trainer.state.log_history if keys[0] in log]


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}, {"bf16": True}], ids=str
)
def test_trainer_logs_the_losses_of_the_plain_model(llama, tmp_path, options, calls):
    found = []
    for prepare in (lambda model: model, enable_chunked_loss):
        model = with_lora(prepare(load(llama, torch.float32)), target_modules="all-linear")
        trainer = Trainer(model=model, args=arguments(tmp_path, **options), train_dataset=rows())
        found.append(logged(trainer, "loss", "grad_norm"))
    assert sum(calls.values()) == 4 * options.get("gradient_accumulation_steps", 1)
    assert len(found[1]) == 4
    torch.testing.assert_close(
        torch.tensor(found[1]), torch.tensor(found[0]), rtol=2e-2 if "bf16" in options else 1e-4, atol=0
    )


def test_trainer_evaluates_on_the_true_logits(llama, tmp_path, calls):
    def metrics(prediction):
        return {"sum": float(abs(prediction.predictions).sum()), "shape": prediction.predictions.shape}

    found = []
    for prepare in (lambda model: model, enable_chunked_loss):
        model = prepare(load(llama, torch.float32))
        trainer = Trainer(model=model, args=arguments(tmp_path), eval_dataset=rows(), compute_metrics=metrics)
        found.append(trainer.evaluate())
    for key in ("eval_loss", "eval_sum", "eval_shape"):
        assert found[1][key] == found[0][key]
    assert found[1]["eval_shape"] == (8, 20, VOCABULARY) and not calls


def test_trainers_label_smoothing_reads_whole_logits_and_says_so_once(llama, tmp_path, calls, caplog):
    logging.Logger.info_once.cache_clear()
    found = []
    with caplog.at_level(logging.INFO, "qsvft.lean.chunked_loss"):
        for prepare in (lambda model: model, enable_chunked_loss):
            model = prepare(load(llama, torch.float32))
            options = arguments(tmp_path, label_smoothing_factor=0.1)
            found.append(logged(Trainer(model=model, args=options, train_dataset=rows()), "loss"))
    assert found[1] == found[0] and not calls
    said = [record.getMessage() for record in caplog.records if record.name == "qsvft.lean.chunked_loss"]
    assert len(said) == 1 and "LlamaForCausalLM is trained without labels" in said[0]


@pytest.mark.parametrize("order", ["before", "after"])
def test_sft_trainer_trains_as_it_does_without(llama, tmp_path, order):
    from trl import SFTConfig, SFTTrainer

    found = []
    for enable in (lambda model: model, enable_chunked_loss):
        model = load(llama, torch.float32)
        if order == "before":
            enable(model)
        model = with_lora(model, target_modules=["q_proj"])
        if order == "after":
            enable(model)
        trainer = SFTTrainer(
            model=model,
            args=arguments(tmp_path, SFTConfig, max_length=16, gradient_accumulation_steps=2),
            train_dataset=Dataset.from_dict({"input_ids": tokens(8, 10).tolist()}),
            processing_class=AutoTokenizer.from_pretrained(llama),
        )
        found.append(logged(trainer, "loss"))
    assert len(found[0]) == 4 and found[0][3] != found[0][0]
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-5, atol=0)


def test_a_loop_of_ones_own_accumulates_the_gradients_of_the_plain_model():
    found = []
    for model in (small("gemma2"), enable_chunked_loss(small("gemma2"))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            for part in batch(4, 100)["input_ids"].split(2):
                loss = model(input_ids=part, labels=part, num_items_in_batch=396).loss
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.stack(losses))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)

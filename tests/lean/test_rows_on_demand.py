"""A head in few bits trains in TRL's trainers, which take its rows a stretch at a time; all of it is never dense."""

import gc

import pytest
import torch
from datasets import Dataset
from small_models import load, logits
from torch.nn import functional
from transformers import AutoTokenizer

import qsvft
from qsvft.lean.rows_on_demand import RowsOnDemand
from qsvft.lean.vocabulary import dequantize_vocabulary, quantize_embeddings


@pytest.fixture(params=[8, 4])
def head(llama, request):
    return quantize_embeddings(load(llama), request.param).lm_head


def test_what_it_is_can_be_asked_for(head):
    W = head.weight
    assert isinstance(W, torch.Tensor) and W.shape == (96, 64) and W.dtype == torch.bfloat16
    assert (W.device, W.dim(), W.numel(), W.requires_grad) == (torch.device("cpu"), 2, 96 * 64, False)
    assert f"{head.stored.bits} bits" in repr(W) and W.size(0) == 96 and W.is_floating_point()


@pytest.mark.parametrize("rows", [slice(0, 10), slice(90, 200), slice(None), slice(5, 5), slice(-7, None)], ids=str)
def test_its_rows_are_those_that_the_dense_head_would_have(head, rows):
    dense = head.stored.dense(head.dtype)
    assert type(head.weight[rows]) is torch.Tensor and torch.equal(head.weight[rows], dense[rows])


def test_a_product_is_the_heads_own_and_has_its_gradient(head):
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    expected, found = head(x), functional.linear(x, head.weight, head.bias)
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (expected, found)]
    assert torch.equal(*grads)


class Keeps(torch.autograd.Function):
    """As TRL's: the weight is an argument and kept for the backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight[10:20].t()

    @staticmethod
    def backward(ctx, g):
        (weight,) = ctx.saved_tensors
        assert isinstance(weight, RowsOnDemand)
        return g @ weight[10:20], None


def test_it_goes_through_a_function_that_keeps_it(head):
    dense = head.stored.dense(head.dtype)[10:20]
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    y = Keeps.apply(x, head.weight)
    y.sum().backward()
    assert torch.equal(y, x @ dense.t()) and torch.equal(x.grad, torch.ones_like(y) @ dense)


WHOLE = {
    "transposed": lambda W: W.t(),
    "multiplied": lambda W: torch.ones(2, 64, dtype=W.dtype) @ W.t(),
    "copied": lambda W: W.clone(),
    "cast": lambda W: W.float(),
    "changed": lambda W: W.add_(1),
    "other rows": lambda W: W[torch.tensor([1, 2])],
    "columns": lambda W: W[:, 3],
}


@pytest.mark.parametrize("what", WHOLE)
def test_what_would_make_all_of_it_dense_is_refused(head, what):
    with pytest.raises(AttributeError, match=r"lm_head: expected a dense weight, found one in . bits"):
        WHOLE[what](head.weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["SFT", "DPO", "KTO"])
def test_the_losses_of_trls_trainers_are_those_of_the_dense_head(llama, tmp_path, method):
    import trl

    words = [f"w{5 + i} w{9 + i}" for i in range(8)]
    rows = {
        "SFT": [{"prompt": one, "completion": f" {one} w7"} for one in words],
        "DPO": [{"prompt": one, "chosen": f" {one} w7", "rejected": " w30"} for one in words],
        "KTO": [{"prompt": one, "completion": f" {one} w7", "label": i % 2 == 0} for i, one in enumerate(words)],
    }[method]
    trainer, settings = getattr(trl, f"{method}Trainer"), getattr(trl, f"{method}Config")
    losses = []
    for dense in (False, True):
        torch.manual_seed(0)
        model = qsvft.prepare(load(llama, torch.float32), 4, rank=8, quantize_embeddings=8, progress=False)
        if dense:
            dequantize_vocabulary(model)
        options = settings(
            output_dir=str(tmp_path / f"{dense}"), max_steps=3, use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, bf16=False, max_length=32, learning_rate=1e-2, logging_steps=1,
            per_device_train_batch_size=4, seed=1,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(llama)
        run = trainer(model=model, args=options, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        run.train()
        losses.append([step["loss"] for step in run.state.log_history if "loss" in step])
        del run, model
        gc.collect()
    assert len(losses[0]) == 3 and losses[0][0] != losses[0][-1]
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3)


def test_generating_and_saving_are_as_before(llama, tmp_path):
    model = qsvft.prepare(load(llama), 4, rank=8, quantize_embeddings=8, progress=False)
    before = logits(model)
    _ = model.get_output_embeddings().weight[:3]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), before)

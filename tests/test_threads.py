"""Forwards at the same time, in threads that take turns at every step, give what each gives alone."""

import sys
import threading

import pytest
import torch
from small_models import load, randomize, save_llama, tokens

import qsvft

FORMS = {"default": {}, "one-sided": {"sides": "one", "pattern": "banded", "off_diagonals": 2}, "residual": {}}
FORMS["residual"] = {"residual": True, "rank": 16}
EACH_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(autouse=True)
def _take_turns_at_every_step():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


def model_of(folder, form, **options):
    return randomize(qsvft.prepare(load(folder, torch.float32), 4, progress=False, **form, **options), scale=0.3)


def together(works, rounds=6):
    """Each work alone, then all at the same time, some rounds of each; what came out alone, and every time."""
    alone = [work() for work in works]
    found, failed, start = [[] for _ in works], [], threading.Barrier(len(works))

    def run(number):
        try:
            start.wait()
            for _ in range(rounds):
                found[number].append(works[number]())
        except Exception as error:  # a thread's own would be lost
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return alone, found


def ids_of(number):
    return tokens(2, 10 + number)


@EACH_FORM
def test_evaluation(folder, form):
    model = model_of(folder, form).eval()

    def work(number):
        with torch.no_grad():
            return model(input_ids=ids_of(number)).logits

    alone, found = together([lambda number=number: work(number) for number in range(4)])
    for expected, every in zip(alone, found, strict=True):
        assert all(torch.equal(one, expected) for one in every)


@EACH_FORM
def test_training_with_the_chunked_loss(folder, form):
    model = model_of(folder, form).train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def train(number):
        loss = model(input_ids=ids_of(number), labels=ids_of(number)).loss
        return {str(place): g for place, g in enumerate(torch.autograd.grad(loss, parameters))} | {"": loss.detach()}

    def look(number):
        with torch.no_grad():
            return {"": model(input_ids=ids_of(number)).logits}

    works = [lambda number=number, work=work: work(number) for work in (train, look) for number in range(2)]
    alone, found = together(works)
    for expected, every in zip(alone, found, strict=True):
        assert {type(one[""]) for one in every} == {torch.Tensor}
        for one in every:  # a thread may sum in another order
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)
    base = model.get_base_model()
    assert "forward" not in vars(base.get_output_embeddings()) and "_loss_function" not in vars(base)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_rows_with_adapters_of_their_own(folder, saved):
    model = model_of(folder, {"rank": 8, "modules_to_save": saved})
    model.add_adapter("b", qsvft.QSVFTConfig(rank=4, modules_to_save=saved, task_type="CAUSAL_LM"))
    randomize(model, "b", scale=0.5, seed=4).eval()
    ways = [
        {},
        {"adapter_names": ["b", "default"]},
        {"adapter_names": ["__base__", "b"]},
        {"adapter_names": ["b", "b"]},
    ]

    def work(options):
        with torch.no_grad():
            return model(input_ids=tokens(2, 10), **options).logits

    alone, found = together([lambda options=options: work(options) for options in ways])
    for expected, every in zip(alone, found, strict=True):
        assert all(torch.equal(one, expected) for one in every)


def test_generation_in_training(folder):
    model = model_of(folder, {}).train()

    def work(number):
        ids = tokens(1, 6 + number)
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)

    alone, found = together([lambda number=number: work(number) for number in range(3)], rounds=3)
    for expected, every in zip(alone, found, strict=True):
        assert all(torch.equal(one, expected) for one in every)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_within_a_forward(folder, training):
    model = model_of(folder, {}).train(training)

    def loss(number):
        return model(input_ids=ids_of(number), labels=ids_of(number)).loss.detach()

    expected, within = [loss(0), loss(1)], []
    layer = model.get_base_model().model.layers[0]

    def again(*_):
        handle.remove()
        within.append(loss(1))

    handle = layer.register_forward_pre_hook(again)
    assert torch.equal(loss(0), expected[0])
    assert torch.equal(within[0], expected[1])
    assert torch.equal(loss(0), expected[0])

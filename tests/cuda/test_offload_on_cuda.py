"""Offloading on a card: the gradients are bitwise the same, also where every copy is late."""

import pytest
import torch
from small_models import load, randomize, same_tensors, tokens

import qsvft
from qsvft.lean import host_memory, offload
from qsvft.lean.offload import offload_checkpoints

DEVICE = "cuda"
LATE = 20_000_000  # cycles that the copying stream sleeps before each copy: some ten milliseconds
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=[False, True], ids=["at full speed", "late"])
def late(request, monkeypatch):
    """Whether copies come so late that whatever does not wait for them is wrong."""
    copy = host_memory.CopyStream.copy

    def sleep_and_copy(self, target, source):
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(LATE)
        return copy(self, target, source)

    if request.param:
        monkeypatch.setattr(host_memory.CopyStream, "copy", sleep_and_copy)


def prepared(llama, **options):
    return randomize(qsvft.prepare(load(llama).to(DEVICE), bits=4, progress=False, **options), scale=0.1).train()


def loss_of(model):
    ids = tokens().to(DEVICE)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients_of(loss, model, **options):
    """On the host: what comes next may take their memory."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), **options)
    return {name: gradient.cpu() for name, gradient in zip(trained, found, strict=True)}


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "no checkpointing"])
def test_the_gradients_are_bitwise_those_without_offloading(llama, checkpointing):
    model = prepared(llama, gradient_checkpointing=checkpointing)
    expected = gradients_of(loss_of(model), model)
    assert same_tensors(gradients_of(loss_of(model), model), expected)
    offload_checkpoints(model, min_bytes=0)
    for _ in range(3):
        assert same_tensors(gradients_of(loss_of(model), model), expected)


@pytest.mark.usefixtures("late")
def test_several_forwards_and_a_graph_that_is_kept_give_the_same_gradients(llama):
    model = prepared(llama)
    expected = gradients_of(loss_of(model), model)
    offload_checkpoints(model, min_bytes=0)
    losses = [loss_of(model) for _ in range(3)]
    for keep in (True, False):
        for loss in losses:
            assert same_tensors(gradients_of(loss, model, retain_graph=keep), expected)


@pytest.mark.usefixtures("late")
def test_on_a_stream_of_the_callers_own_the_gradients_are_the_same(llama):
    model = prepared(llama)
    expected = gradients_of(loss_of(model), model)
    offload_checkpoints(model, min_bytes=0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = gradients_of(loss_of(model), model)
    torch.cuda.current_stream().wait_stream(stream)
    assert same_tensors(found, expected)


@pytest.mark.usefixtures("late")
def test_memory_that_is_taken_again_at_once_is_never_that_of_a_copy_under_way():
    """Each tensor is overwritten by the next of its size, sent or fetched, as soon as the allocator allows."""
    packer = offload._Packer(torch.nn.Identity(), 0)
    packed = []
    for number in range(8):
        packed.append(packer(torch.full((2**20,), float(number), device=DEVICE)))
        torch.full((2**20,), -1.0, device=DEVICE)
    packer.release()
    for number in reversed(range(8)):
        tensor = host_memory.unpack(packed.pop())
        torch.full((2**20,), -1.0, device=DEVICE)
        assert bool((tensor == number).all())
        del tensor


@pytest.mark.usefixtures("late")
def test_a_graph_that_is_dropped_with_a_copy_under_way_spoils_nothing():
    packer = offload._Packer(torch.nn.Identity(), 0)
    packed = [packer(torch.full((2**20,), float(number), device=DEVICE)) for number in range(3)]
    packer.release()
    host_memory.unpack(packed[2])
    packed.clear()
    others = [torch.full((2**20,), -1.0, device=DEVICE) for _ in range(4)]
    torch.cuda.synchronize()
    assert all(bool((other == -1).all()) for other in others)


def test_two_tensors_at_most_are_on_the_card():
    packer = offload._Packer(torch.nn.Identity(), 0)
    before = torch.cuda.memory_allocated()
    packed = [packer(torch.full((2**20,), float(number), device=DEVICE)) for number in range(6)]
    assert torch.cuda.memory_allocated() - before == 2**22  # the last, which is still held
    packer.release()
    assert torch.cuda.memory_allocated() == before
    while packed:
        tensor = host_memory.unpack(packed.pop())
        assert torch.cuda.memory_allocated() - before == (2 if packed else 1) * 2**22
        del tensor
    assert torch.cuda.memory_allocated() == before

"""Copies of offloaded checkpoints run beside the computation: nothing is read, or given out again, too early."""

import copy
import gc
import random
import threading
import types
import weakref

import pytest
import torch
from small_models import load, randomize, same_tensors, tokens
from torch import nn

import qsvft
from qsvft.lean import host_memory, offload
from qsvft.lean.offload import offload_checkpoints
from qsvft.memory.methods import parse_method
from qsvft.memory.presets import model_config
from qsvft.memory.scenario import Scenario

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
SECONDS = 60  # ends what hangs


class LateCopies:
    """A stream whose copies happen as late as they may, when somebody waits for one; until then their target is NaN.

    Of a tensor on the device nothing is held but its storage's weak reference: one that died before its copy was
    waited for would have been given out again, and is noted in ``faults``. ``log`` has what was asked for, in order.
    """

    def __init__(self):
        self.lock = threading.RLock()
        self.queue, self.log, self.faults, self.hosts, self.device = [], [], [], {}, []
        self.stream = "computing"

    def computing(self):
        return self.stream

    def copy(self, target, source):
        with self.lock, torch.no_grad():
            inward = source.untyped_storage()._cdata in self.hosts
            host, away = (source, target) if inward else (target, source)
            self.hosts[host.untyped_storage()._cdata] = host
            number = list(self.hosts).index(host.untyped_storage()._cdata)
            target.fill_(float("nan"))
            storage = weakref.ref(away.untyped_storage())
            self.device.append(storage)
            done = Late(self, number, "in" if inward else "out")
            self.queue.append((done, host, storage, away.storage_offset()))
            self.log.append((done.way, number))
            return done

    def run(self, last=None):
        """All copies up to this one, in order."""
        with self.lock, torch.no_grad():
            while self.queue and (last is None or any(done is last for done, *_ in self.queue)):
                done, host, storage, offset = self.queue.pop(0)
                if storage() is None:
                    self.faults.append(f"{done.way} {done.number}: its memory was given back before the copy was done")
                    continue
                away = torch.empty(0, dtype=host.dtype).set_(storage(), offset, host.size(), host.stride())
                target, source = (away, host) if done.way == "in" else (host, away)
                target.copy_(source)

    def on_device(self):
        """How many of the tensors that were sent or fetched are alive."""
        return sum(storage() is not None for storage in self.device)


class Late:
    """The event after a copy."""

    def __init__(self, copies, number, way):
        self.copies, self.number, self.way = copies, number, way

    def wait(self, stream):
        self.copies.log.append(("wait", self.way, self.number, stream))
        self.copies.run(self)


@pytest.fixture
def late(monkeypatch):
    copies = LateCopies()
    monkeypatch.setattr(offload, "_HOSTS", ())
    monkeypatch.setattr(host_memory, "copies_on", lambda device: copies)
    yield copies
    copies.run()
    assert not copies.faults


def sent(count, packer=None):
    """Tensors and what stands for them, in the order in which they were sent."""
    packer = packer or offload._Packer(nn.Identity(), 0)
    expected = [torch.randn(3, 4) for _ in range(count)]
    packed = [packer(tensor.clone()) for tensor in expected]
    packer.release()
    return expected, packed


def prepared(llama, **options):
    options = {"bits": 4, "progress": False, **options}
    return randomize(qsvft.prepare(load(llama), **options)).train()


def run(model):
    return model(input_ids=tokens(), labels=tokens(), use_cache=False).loss


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients_of(loss, model, **options):
    """As autograd.grad gives them, which adds to nobody's."""
    found = torch.autograd.grad(loss, list(trained(model).values()), **options)
    return dict(zip(trained(model), found, strict=True))


# One tensor after another


def test_a_source_is_held_until_the_computing_stream_waits_for_its_copy_and_no_longer(late):
    packer = offload._Packer(nn.Identity(), 0)
    first, second = (torch.randn(3, 4) for _ in range(2))
    storages = [weakref.ref(tensor.untyped_storage()) for tensor in (first, second)]
    packed = [packer(first)]
    del first
    assert late.log == [("out", 0)] and storages[0]() is not None
    packed.append(packer(second))
    del second
    assert late.log == [("out", 0), ("wait", "out", 0, "computing"), ("out", 1)]
    assert [storage() is None for storage in storages] == [True, False]
    packer.release()
    assert late.log[3:] == [("wait", "out", 1, "computing")]
    assert [storage() is None for storage in storages] == [True, True] and len(packed) == 2


def test_a_packer_that_is_dropped_waits_for_the_copy_under_way(late):
    packer = offload._Packer(nn.Identity(), 0)
    packed = packer(torch.ones(3))
    del packer
    assert late.log == [("out", 0), ("wait", "out", 0, "computing")] and late.on_device() == 0
    assert torch.equal(host_memory.unpack(packed), torch.ones(3))


def test_each_tensor_is_copied_back_once_and_one_ahead_of_its_use(late):
    expected, packed = sent(4)
    late.log.clear()
    steps = []
    for tensor in reversed(expected):
        assert torch.equal(host_memory.unpack(packed.pop()), tensor)
        steps.append(late.log[:])
        late.log.clear()
    waits = [("wait", "in", number, "computing") for number in range(4)]
    assert steps == [[("in", 3), waits[3], ("in", 2)], [waits[2], ("in", 1)], [waits[1], ("in", 0)], [waits[0]]]
    assert late.on_device() == 0


def test_two_tensors_at_most_are_on_the_device(late):
    _, packed = sent(6)
    while packed:
        tensor = host_memory.unpack(packed.pop())
        assert late.on_device() == 1 + bool(packed)
        del tensor


@pytest.mark.parametrize("seed", range(20))
def test_in_any_order_and_any_number_of_times_the_bytes_are_right_and_at_most_one_is_ahead(late, seed):
    generator = random.Random(seed)
    expected, packed = sent(6)
    for _ in range(30):
        number = generator.randrange(6)
        assert torch.equal(host_memory.unpack(packed[number]), expected[number])
        assert late.on_device() <= 1
        if generator.random() < 0.1:
            packed[number], expected[number] = sent(1)[1][0], None
            expected[number] = packed[number].host.clone()
    assert late.on_device() <= 7


def test_what_a_node_saved_together_is_fetched_first_to_last_and_nothing_is_copied_twice(late):
    expected, packed = sent(6)
    late.log.clear()
    for first in (4, 2, 0):  # each node saved two
        for number in (first, first + 1):
            assert torch.equal(host_memory.unpack(packed[number]), expected[number])
    assert sorted(entry[1] for entry in late.log if entry[0] == "in") == list(range(6))


def test_a_second_backward_is_ahead_as_the_first_was(late):
    expected, packed = sent(3)
    for _ in range(3):
        late.log.clear()
        for number in (2, 1, 0):
            assert torch.equal(host_memory.unpack(packed[number]), expected[number])
        assert [entry[1] for entry in late.log if entry[0] == "in"] == [2, 1, 0]
        assert late.log[2] == ("in", 1)


def test_a_backward_that_never_comes_leaves_nothing(late):
    _, packed = sent(4)
    host_memory.unpack(packed[3])
    assert late.on_device() == 1  # number 2, ahead
    hosts = [weakref.ref(away.host) for away in packed]
    late.run()
    late.queue.clear()
    late.hosts.clear()
    gc.disable()
    try:
        del packed[2]
        assert late.on_device() == 0
        packed.clear()
        assert not [host for host in hosts if host() is not None]
    finally:
        gc.enable()


def test_a_tensor_ahead_that_nobody_fetches_is_given_back_after_its_copy(late):
    _, packed = sent(2)
    host_memory.unpack(packed[1])
    late.log.clear()
    packed.clear()
    assert late.log == [("wait", "in", 0, "computing")] and late.on_device() == 0


def test_on_another_stream_than_the_one_it_was_allocated_on_a_tensor_is_copied_anew(late):
    expected, packed = sent(2)
    host_memory.unpack(packed[1])
    late.log.clear()
    late.stream = "another"
    assert torch.equal(host_memory.unpack(packed[0]), expected[0])
    assert late.log == [("in", 0), ("wait", "in", 0, "computing"), ("wait", "in", 0, "another")]


def test_each_forward_has_an_order_of_its_own(late):
    first, second = sent(2), sent(2)
    late.log.clear()
    assert torch.equal(host_memory.unpack(first[1][1]), first[0][1])
    assert torch.equal(host_memory.unpack(second[1][1]), second[0][1])
    assert torch.equal(host_memory.unpack(first[1][0]), first[0][0])
    assert torch.equal(host_memory.unpack(second[1][0]), second[0][0])
    assert [entry[1] for entry in late.log if entry[0] == "in"] == [1, 0, 3, 2]


def test_a_tensor_changed_in_place_while_it_is_copied_is_refused(late):
    packer = offload._Packer(nn.Identity(), 0)
    tensor = torch.randn(3)
    packed = packer(tensor)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match=r"^Identity: found a tensor changed in place .* expected it unchanged"):
        packer(torch.randn(3))
    packer.release()
    assert packed.host is not None


def test_on_cuda_a_copy_waits_for_what_computes_and_runs_beside_it(monkeypatch):
    log = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            log.append(("waits for", other))

        def record_event(self):
            log.append("event")
            return "the event"

    class On:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            log.append(("on", self.stream))

        def __exit__(self, *_):
            log.append("off")

    target = types.SimpleNamespace(copy_=lambda source, non_blocking: log.append(("copy", source, non_blocking)))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"computing on {device}")
    monkeypatch.setattr(torch.cuda, "stream", On)
    copies = host_memory.CopyStream(torch.device("cuda", 1))
    assert copies.computing() == "computing on cuda:1"
    assert copies.copy(target, "source") == "the event"
    assert log == [
        ("waits for", "computing on cuda:1"),
        ("on", copies.stream),
        ("copy", "source", True),
        "off",
        "event",
    ]
    host_memory.copies_on.cache_clear()
    assert host_memory.copies_on(torch.device("cuda", 1)) is host_memory.copies_on(torch.device("cuda", 1))
    assert host_memory.copies_on(torch.device("cuda", 0)) is not host_memory.copies_on(torch.device("cuda", 1))
    assert isinstance(host_memory.copies_on(torch.device("meta")), host_memory.CopiesAtOnce)
    host_memory.copies_on.cache_clear()


# A model


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "no checkpointing"])
@pytest.mark.parametrize("options", [{}, {"bits": 16, "sides": "one", "pattern": "banded"}], ids=str)
def test_the_gradients_are_bitwise_those_without_offloading_however_late_copies_are(
    llama, options, checkpointing, late
):
    model = prepared(llama, gradient_checkpointing=checkpointing, **options)
    expected = gradients_of(run(model), model)
    assert not late.log
    offload_checkpoints(model, min_bytes=0)
    assert same_tensors(gradients_of(run(model), model), expected)
    assert late.log and late.on_device() == 0


def test_a_checkpoint_is_sent_and_fetched_once_and_its_source_goes_with_the_next(llama, late):
    model = prepared(llama)
    offload_checkpoints(model, min_bytes=0)
    loss = run(model)
    out = [entry[1] for entry in late.log if entry[0] == "out"]
    assert [entry for entry in late.log if entry[0] == "wait"] == [("wait", "out", n, "computing") for n in out]
    assert not late.queue
    late.log.clear()
    gradients_of(loss, model)
    assert [entry[1] for entry in late.log if entry[0] == "in"] == out[::-1]


@pytest.mark.parametrize("first", [0, 1])
def test_several_forwards_before_their_backwards(llama, late, first):
    """In either order, of two models in turns; and a graph that is kept is gone through twice."""
    models = [prepared(llama), prepared(llama, gradient_checkpointing=False)]
    expected = [gradients_of(run(model), model) for model in models]
    for model in models:
        offload_checkpoints(model, min_bytes=0)
    losses = [(model, run(model), right) for _ in range(2) for model, right in zip(models, expected, strict=True)]
    for keep in (True, False):
        for model, loss, right in losses[first:] + losses[:first]:
            assert same_tensors(gradients_of(loss, model, retain_graph=keep), right)
    del losses, loss
    assert late.on_device() == 0


def test_threads_that_share_a_model_have_a_forward_each(llama, late):
    model = prepared(llama, chunked_loss=False)  # in chunks a thread may sum in another order
    expected = gradients_of(run(model), model)
    offload_checkpoints(model, min_bytes=0)
    both_are_inside_the_decoder, found = threading.Barrier(2), []

    def meet(*_):
        both_are_inside_the_decoder.wait(SECONDS)

    handle = model.get_base_model().model.norm.register_forward_pre_hook(meet)

    def work():
        found.append(gradients_of(run(model), model))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    handle.remove()
    assert len(found) == 2 and all(same_tensors(each, expected) for each in found)


class StopHereError(Exception):
    pass


def test_a_backward_that_fails_leaves_nothing_on_the_device(llama, late):
    model = prepared(llama)
    expected = gradients_of(run(model), model)
    offload_checkpoints(model, min_bytes=0)
    offloaded = model.get_base_model().model.layers[0]

    def stop(*_):
        raise StopHereError

    handle = offloaded.register_full_backward_pre_hook(stop)
    loss = run(model)
    with pytest.raises(StopHereError):
        gradients_of(loss, model)
    handle.remove()
    del loss
    gc.collect()
    assert late.on_device() == 0
    assert same_tensors(gradients_of(run(model), model), expected)


def test_a_forward_that_nobody_goes_back_from_leaves_nothing(llama, late):
    model = prepared(llama)
    offload_checkpoints(model, min_bytes=0)
    before = len(late.hosts)
    loss = run(model)
    assert len(late.hosts) > before
    hosts = [weakref.ref(host) for host in late.hosts.values()]
    late.hosts.clear()
    del loss
    gc.collect()
    assert late.on_device() == 0 and not [host for host in hosts if host() is not None]


def test_a_model_is_copied_after_its_forward_was_interrupted(llama, late):
    model = prepared(llama).get_base_model()
    expected = gradients_of(run(model), model)
    offload_checkpoints(model, min_bytes=0)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.norm.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    handle.remove()
    other = copy.deepcopy(model)
    assert same_tensors(gradients_of(run(model), model), expected)
    assert same_tensors(gradients_of(run(other), other), expected)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def test_the_ledger_counts_one_checkpoint_more_in_the_backward_and_none_in_the_forward(monkeypatch):
    config = model_config("tiny")
    batch, length = 2, 96
    checkpoint = batch * length * config.hidden_size * 2
    peaks = []
    for ahead in (False, True):
        with monkeypatch.context() as patch:
            if not ahead:  # and none held
                nothing = host_memory.Transfer(host_memory.CopiesAtOnce(), torch.empty(0), None, None)
                patch.setattr(host_memory.Order, "next_after", lambda *_: None)
                patch.setattr(host_memory.Away, "leave", lambda *_, nothing=nothing: nothing)
            scenario = Scenario(config, parse_method("floor"), True, "adamw", "meta")
            offload_checkpoints(scenario.model, min_bytes=checkpoint)
            peaks.append(scenario.count(batch, length)[0].peaks())
    alone, ahead = peaks
    assert alone["forward"].nbytes == ahead["forward"].nbytes
    assert 0 < ahead["backward"].nbytes - alone["backward"].nbytes <= checkpoint

"""Tensors that wait in host memory between a forward and its backward, and the copies there and back.

On CUDA the copies run on a stream of their own, beside what computes, and each is ordered by events:

    forward     copy waits for what was computed; its source is held until the next one is sent or the forward
                ends, when the computing stream waits for the copy
    backward    as one is fetched, the one sent before it, which comes next, is copied ahead; whoever fetches it
                waits for that copy, and for a new one if none was made ahead

Each forward has a list of its own, of weak references: what no graph keeps any more is gone, host memory too.
"""

from __future__ import annotations

import threading
import weakref
from functools import cache

import torch
from torch import Tensor


class Order:
    """What one forward sent away, in order: its backward needs the last first."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sent: list[weakref.ref[Away]] = []
        self.ahead: weakref.ref[Away] | None = None

    def next_after(self, away: Away) -> Away | None:
        """The one to copy ahead when ``away`` is fetched, if none is ahead already: never more than one.

        It was sent before and was fetched less often: a node fetches what it saved first to last.
        """
        ahead = self.ahead and self.ahead()
        if ahead and ahead.transfer:
            return None
        for reference in reversed(self.sent[: away.place]):
            earlier = reference()
            if earlier and earlier.fetched < away.fetched:
                self.ahead = reference
                return earlier
        return None


class Away:
    """A tensor that waits in host memory; of one without values (meta) only the shape is kept.

    Pinned memory may be dropped while a copy is under way: with each ``non_blocking`` copy torch notes the stream it
    was queued on (``record_event`` in ATen's cuda/Copy.cu), and its host allocator gives a dropped block out again
    only after an event on that stream.
    """

    def __init__(self, tensor: Tensor, order: Order) -> None:
        self.device, self.dtype = tensor.device, tensor.dtype
        self.size, self.stride = tensor.size(), tensor.stride()
        self.copies = copies_on(tensor.device)  # there and back on one stream, which keeps their order
        # The device is named: torch's default device may be the card.
        self.host = None if tensor.is_meta else self._empty(torch.device("cpu"), pinned=tensor.is_cuda)
        self.order, self.place = order, len(order.sent)
        order.sent.append(weakref.ref(self))
        self.transfer: Transfer | None = None
        self.fetched = 0

    def _empty(self, device: torch.device, pinned: bool = False) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device, pin_memory=pinned)

    def leave(self, tensor: Tensor) -> Transfer:
        """Copy the tensor to the host. Detached, so that its graph is not held with it."""
        tensor = tensor.detach()
        return Transfer(self.copies, tensor, self.host, tensor)

    def _come_back(self) -> Transfer:
        tensor = self._empty(self.device)
        return Transfer(self.copies, tensor, tensor, self.host)

    def fetch(self) -> Tensor:
        """The tensor on its device again, with its strides; the one that the backward needs next is sent for."""
        with self.order.lock, torch.no_grad():
            transfer, self.transfer = self.transfer, None
            # On another stream the memory could be given out again while that one still reads.
            if transfer is None or transfer.computing != self.copies.computing():
                transfer = self._come_back()
            tensor = transfer.wait()
            self.fetched += 1
            following = self.order.next_after(self)
            if following is not None:
                following.transfer = following._come_back()
            return tensor


def unpack(packed: Tensor | Away) -> Tensor:
    return packed.fetch() if isinstance(packed, Away) else packed


class Transfer:
    """A copy under way, and the tensor on the device that it reads or writes.

    A tensor's memory is given out again, to the stream that it was allocated on, as soon as nobody holds it. So it is
    held here until that stream was told to wait for the copy, whoever lets go of this, and whenever.
    """

    def __init__(
        self, copies: CopyStream | CopiesAtOnce, tensor: Tensor, target: Tensor | None, source: Tensor | None
    ) -> None:
        self.tensor = tensor
        self.done: torch.cuda.Event | None = None
        self.computing = copies.computing()
        if target is not None and source is not None:
            self.done = copies.copy(target, source)

    def wait(self) -> Tensor:
        """The tensor, for use on the stream that computes."""
        done, self.done = self.done, None
        if done is not None:
            done.wait(self.computing)
        return self.tensor

    def __del__(self) -> None:
        self.wait()


class CopyStream:
    """The stream of a CUDA device on which nothing but these copies run, one after another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def computing(self) -> torch.cuda.Stream | None:
        """The stream that computes: what is allocated now is allocated on it."""
        return torch.cuda.current_stream(self.device)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        """Copy after all that the computing stream has been given so far; the event says when it is done."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), torch.no_grad():
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()


class CopiesAtOnce:
    """Devices other than CUDA: a copy is done when it returns."""

    def computing(self) -> None:
        return None

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.no_grad():
            target.copy_(source)


@cache
def copies_on(device: torch.device) -> CopyStream | CopiesAtOnce:
    return CopyStream(device) if device.type == "cuda" else CopiesAtOnce()

"""The ledger: counts every byte that a piece of PyTorch code allocates, on meta or on real tensors.

A TorchDispatchMode sees the result of every operation. Each new storage is entered with its size,
rounded up to 512 bytes as CUDA's allocator does, and leaves when its last tensor dies (a weak
reference per storage). On meta tensors nothing is computed, so a training step of an 8B model is
counted in seconds on a laptop; on real tensors the same code gives the same numbers.

What an operation allocates inside its own kernel and frees before it returns is not seen. Where
that matters (bitsandbytes' 4-bit product dequantises the weight) the operation is expanded into its
parts, see ``_EXPANSIONS``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .outcomes import Outcomes

GRANULARITY = 512

CATEGORIES = (
    "base weights",
    "other weights",
    "factors",
    "trainable",
    "gradients",
    "optimizer",
    "saved activations",
    "logits and loss",
    "temporaries",
)
PHASES = ("forward", "backward", "optimizer")


@dataclass
class Allocation:
    """One storage, from its first tensor to its last."""

    nbytes: int
    category: str
    phase: str
    module: str
    in_forward: bool


@dataclass
class Event:
    """A change of the live bytes: an allocation or (negative) the end of one."""

    allocation: Allocation
    nbytes: int
    phase: str
    module: str


@dataclass
class Peak:
    """Where the live bytes stand highest."""

    nbytes: int = 0
    categories: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    module: str = ""


def rounded(nbytes: int) -> int:
    """Bytes as the allocator hands them out, in multiples of 512."""
    return -(-nbytes // GRANULARITY) * GRANULARITY


class Ledger(TorchDispatchMode):
    """Record allocations between ``with ledger:``.

    Tensors that exist already are entered with :meth:`register`. ``phase`` and the module hooks of
    :meth:`watch` say where the code is; :meth:`close_region` settles what survived a forward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "setup"
        self.loss_region = False
        self.events: list[Event] = []
        self._live: dict[int, tuple[weakref.ref[Any], Allocation]] = {}
        self._modules: list[str] = []
        self._open: list[Allocation] = []
        self._outcomes = Outcomes()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        expansion = _EXPANSIONS.get(func)
        if expansion is not None:
            with self:
                return expansion(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True  # whether positions follow one another and a mask has no padding: of such a batch they do
        out = self._outcomes.of(func, args, kwargs or {})
        self._enter_all(out)
        return out

    def register(self, tensor: Tensor, category: str) -> None:
        """Enter a tensor that exists already, or move its storage to another category."""
        self._enter(tensor, category)

    def _enter_all(self, out: Any) -> None:
        """Enter what an operation gives: a tensor, or a list or tuple with tensors in it."""
        if isinstance(out, Tensor):
            self._enter(out, None)
        elif isinstance(out, list | tuple):
            for each in out:
                self._enter_all(each)

    def _enter(self, tensor: Tensor, category: str | None) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # torch keeps one object for a storage, as long as the storage lives
        known = self._live.get(key)
        if known is not None:
            if category is not None:
                known[1].category = category
            return
        nbytes = rounded(storage.nbytes())
        if nbytes == 0:
            return
        kind = category or ("logits and loss" if self.loss_region else "temporaries")
        in_forward = bool(self._modules) or self.phase == "forward"
        allocation = Allocation(nbytes, kind, self.phase, self.module, in_forward)
        reference = weakref.ref(storage, lambda _, key=key, a=allocation: self._leave(key, a))  # type: ignore[misc]
        self._live[key] = (reference, allocation)
        self.events.append(Event(allocation, nbytes, self.phase, self.module))
        if category is None and in_forward and not self.loss_region:
            self._open.append(allocation)

    def _leave(self, key: int, allocation: Allocation) -> None:
        known = self._live.get(key)
        if known is not None and known[1] is allocation:
            del self._live[key]
        self.events.append(Event(allocation, -allocation.nbytes, self.phase, self.module))
        allocation.in_forward = False

    @property
    def module(self) -> str:
        """Name of the innermost module whose forward runs."""
        return self._modules[-1] if self._modules else ""

    @contextmanager
    def watch(self, model: nn.Module, head: nn.Module | None = None) -> Iterator[None]:
        """Follow the modules of a model; what the output head and all after it allocate is the loss's."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(name)))
            handles.append(module.register_forward_hook(self._leaving, always_call=True))
        if head is not None:
            handles.append(head.register_forward_pre_hook(self._enter_loss))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._modules.append(name)

        return hook

    def _leaving(self, *_: Any) -> None:
        self._modules.pop()
        if not self._modules:
            self.close_region()

    def _enter_loss(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.loss_region = True
        hidden = next((a for a in args if isinstance(a, Tensor)), None)
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(self._leave_loss)

    def _leave_loss(self, gradient: Tensor) -> None:
        """The gradient of the head's input is there: the loss's part of the backward is over."""
        self.loss_region = False

    def close_region(self) -> None:
        """A forward (or a recomputation) is over: what it made and is still alive was saved."""
        for allocation in self._open:
            if allocation.in_forward and allocation.category == "temporaries":
                allocation.category = "saved activations"
        self._open.clear()

    def live_bytes(self) -> int:
        """Bytes alive now."""
        return sum(allocation.nbytes for _, allocation in self._live.values())

    def high_water(self) -> int:
        """The most bytes that were ever alive, setup included."""
        total = highest = 0
        for event in self.events:
            total += event.nbytes
            highest = max(highest, total)
        return highest

    def peaks(self) -> dict[str, Peak]:
        """The highest point of each phase, and of the whole under "total"."""
        peaks = {name: Peak() for name in (*PHASES, "total")}
        live = dict.fromkeys(CATEGORIES, 0)
        total = 0
        for event in self.events:
            live[event.allocation.category] += event.nbytes
            total += event.nbytes
            if event.phase not in PHASES:
                continue
            for name in (event.phase, "total"):
                if total > peaks[name].nbytes:
                    peaks[name] = Peak(total, dict(live), event.phase, event.module)
        return peaks


def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """bitsandbytes' 4-bit product for many tokens: dequantise the whole weight, then multiply."""
    if absmax_8bit is not None:
        absmax = bnb.functional.dequantize_blockwise(absmax_8bit, absmax=absmax, code=absmax_code, blocksize=256)
        assert absmax_offset is not None
        absmax = absmax + absmax_offset
    state = QuantState(absmax=absmax, shape=shapeB, blocksize=blocksize, quant_type=quant_type, dtype=A.dtype)
    return torch.nn.functional.linear(A, bnb.functional.dequantize_4bit(B, state), bias)


# bitsandbytes before 0.50 has no such operation: there the parts are seen as they are.
_EXPANSIONS: dict[Any, Callable[..., Any]] = (
    {torch.ops.bitsandbytes.gemm_4bit.default: _gemm_4bit} if hasattr(torch.ops.bitsandbytes, "gemm_4bit") else {}
)

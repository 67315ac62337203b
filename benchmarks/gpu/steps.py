"""A method's training step: built, stepped, its bytes read and its time taken; and how long a sequence a card takes.

Two devices have the same face: ``Card`` is the CUDA device, ``Rehearsal`` a CPU on which the ledger on real
tensors stands in for the allocator, to try the suite's own code.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from cases import BATCH_SIZE, FACTORED, Plan, checkpointed
from torch import Tensor
from transformers import PretrainedConfig

from qsvft.lean.checkpointing import disable_checkpointing, enable_checkpointing
from qsvft.memory.cards import CONTEXT_BYTES
from qsvft.memory.methods import parse_method
from qsvft.memory.profiler import LENGTH_STEP
from qsvft.memory.scenario import Scenario
from qsvft.memory.step import make_optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_factors import random_factors

OPTIMIZER = "adamw"
AUTOCAST = torch.bfloat16
TOLERANCE = 0.02
"""How far the longest sequence that fits and the shortest that does not may lie apart."""


def build(config: PretrainedConfig, method: str, device: str) -> Scenario:
    """A method on a model with random weights; NF4 weights are quantised for real, one matrix at a time."""
    text, checkpointing = checkpointed(method)
    with random_factors():
        return Scenario(config, parse_method(text), checkpointing, OPTIMIZER, device)


def about(model: str, method: str) -> dict[str, Any]:
    """What the result rows of a method say of it; where its singular vectors come from, too."""
    text, checkpointing = checkpointed(method)
    factors = "random" if parse_method(text).name in FACTORED else "none"
    return {
        "model": model,
        "method": method,
        "batch_size": BATCH_SIZE,
        "checkpointing": checkpointing,
        "factors": factors,
    }


class Stepper:
    """Training steps of a built model on random tokens.

    Args:
        fused: AdamW as transformers' Trainer has it by default; else the one that the ledger counts.
        autocast: under bf16 autocast, as with Trainer's ``bf16=True``.
    """

    def __init__(self, scenario: Scenario, fused: bool, autocast: bool) -> None:
        self.model, self.autocast = scenario.model, autocast
        self.vocabulary = scenario.base.config.vocab_size
        scenario.base.config.use_cache = False
        (enable_checkpointing if scenario.checkpointing else disable_checkpointing)(scenario.base)
        self.model.train()
        self.clear()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.trainable_parameters = sum(p.numel() for p in trainable)
        self.optimizer: torch.optim.Optimizer | None
        if fused and trainable:
            self.optimizer = torch.optim.AdamW(trainable, lr=0.0, fused=True)
        else:
            self.optimizer = make_optimizer(OPTIMIZER, trainable)
        self.device = next(self.model.parameters()).device

    def tokens(self, seq_len: int) -> Tensor:
        """A batch of random tokens."""
        return torch.randint(self.vocabulary, (BATCH_SIZE, seq_len), device=self.device)

    def step(self, tokens: Tensor) -> None:
        with torch.autocast(self.device.type, AUTOCAST, enabled=self.autocast):
            loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def clear(self) -> None:
        """Drop the gradients that a step which ran out of memory left."""
        self.model.zero_grad(set_to_none=True)


class Card:
    """The CUDA device."""

    kind = "cuda"

    def release(self) -> None:
        """Give all memory back that no tensor holds, cuBLAS's workspaces included."""
        gc.collect()
        torch.cuda.synchronize()
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        torch.cuda.empty_cache()

    def allocated(self) -> int:
        """Bytes of tensors now."""
        return int(torch.cuda.memory_allocated())

    def context(self) -> int:
        """Bytes of the card that are taken and not the allocator's: CUDA's context, kernels, whoever else is there."""
        free, total = torch.cuda.mem_get_info()
        return int(total - free - torch.cuda.memory_reserved())

    def peak(self, scenario: Scenario, seq_len: int, other_bytes: int) -> dict[str, int | None]:
        """The allocator's peaks over one step, after one that leaves the optimizer's state.

        The ledger does not run here: it takes bitsandbytes' products apart, which changes their bytes.
        """
        stepper = Stepper(scenario, fused=False, autocast=False)
        tokens = stepper.tokens(seq_len)
        stepper.step(tokens)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        stepper.step(tokens)
        torch.cuda.synchronize()
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated() - other_bytes,
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "other_bytes": other_bytes,
            "context_bytes": self.context(),
            "trainable_parameters": stepper.trainable_parameters,
        }

    def times(self, scenario: Scenario, seq_len: int, plan: Plan) -> list[float]:
        """Milliseconds of single steps, between CUDA events, without waiting in between."""
        stepper = Stepper(scenario, fused=True, autocast=True)
        tokens = stepper.tokens(seq_len)
        for _ in range(plan.warmup):
            stepper.step(tokens)
        torch.cuda.synchronize()
        start = time.perf_counter()
        stepper.step(tokens)
        torch.cuda.synchronize()
        count = step_count(plan, time.perf_counter() - start)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            stepper.step(tokens)
            event.record()
        torch.cuda.synchronize()
        return [first.elapsed_time(second) for first, second in pairwise(events)]

    def usable(self, card_bytes: int) -> int:
        """What the allocator gets of a card of this size: its bytes less what ``qsvft.memory`` sets aside for CUDA."""
        return max(card_bytes - CONTEXT_BYTES, 0)

    @contextmanager
    def limited(self, card_bytes: int) -> Iterator[None]:
        """Let the allocator take no more than a card of this size has for it."""
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, self.usable(card_bytes) / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def fits(self, stepper: Stepper, seq_len: int) -> bool:
        """Whether a step of this length gets the memory that it asks for."""
        fitted = self._fits(stepper, seq_len)
        stepper.clear()
        self.release()
        return fitted

    def _fits(self, stepper: Stepper, seq_len: int) -> bool:
        try:
            stepper.step(stepper.tokens(seq_len))
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        return True


class Rehearsal:
    """A CPU in the card's place."""

    kind = "cpu"

    def __init__(self) -> None:
        self._limit = 0

    def release(self) -> None:
        """Nothing: the ledger counts what is alive."""

    def allocated(self) -> int:
        return 0

    def context(self) -> int:
        return 0

    def peak(self, scenario: Scenario, seq_len: int, other_bytes: int) -> dict[str, int | None]:
        ledger, trainable = scenario.count(BATCH_SIZE, seq_len)
        return {
            "allocated_bytes": ledger.peaks()["total"].nbytes,
            "reserved_bytes": None,
            "other_bytes": other_bytes,
            "context_bytes": 0,
            "trainable_parameters": trainable,
        }

    def times(self, scenario: Scenario, seq_len: int, plan: Plan) -> list[float]:
        stepper = Stepper(scenario, fused=True, autocast=True)
        tokens = stepper.tokens(seq_len)
        for _ in range(plan.warmup):
            stepper.step(tokens)
        found = []
        for _ in range(plan.least):
            start = time.perf_counter()
            stepper.step(tokens)
            found.append(1000 * (time.perf_counter() - start))
        return found

    def usable(self, card_bytes: int) -> int:
        return card_bytes

    @contextmanager
    def limited(self, card_bytes: int) -> Iterator[None]:
        self._limit = card_bytes
        try:
            yield
        finally:
            self._limit = 0

    def fits(self, stepper: Stepper, seq_len: int) -> bool:
        """The bytes of the logits alone, so that the search has something to find."""
        stepper.step(stepper.tokens(seq_len))
        stepper.clear()
        return 4 * BATCH_SIZE * seq_len * stepper.vocabulary <= self._limit


def longest(
    fits: Callable[[int], bool], guess: int, most: int, tolerance: float = TOLERANCE
) -> tuple[int, int | None, list[int]]:
    """Enclose the longest sequence that fits, in multiples of 128 tokens.

    From the guess up or down, in strides that double, until one length fits and one does not, then halving.

    Returns:
        The longest length that fitted (0 if 128 did not), the shortest that did not (None if ``most`` fitted), and all
        that were tried. The two lie at most ``tolerance`` of the longer one, or 128 tokens, apart.
    """
    low, high, stride = 0, None, 1.5 * tolerance
    length, tried = _whole(guess, most), []
    while True:
        tried.append(length)
        if fits(length):
            low = length
        else:
            high = length
        if low == most or (high is not None and high - low <= max(LENGTH_STEP, int(tolerance * high))):
            return low, high, tried
        if high is None:
            length = _whole(max(int(low * (1 + stride)), low + LENGTH_STEP), most)
        elif low == 0:
            length = _whole(min(int(high * (1 - min(stride, 0.9))), high - LENGTH_STEP), most)
        else:
            length = _whole((low + high) // 2, most)
        stride *= 2  # a guess that is far off is left in few steps


def _whole(length: int, most: int) -> int:
    return min(max(length // LENGTH_STEP, 1) * LENGTH_STEP, most)


def step_count(plan: Plan, seconds: float) -> int:
    """How many steps of this length to time."""
    return max(plan.least, min(plan.most, int(plan.timed_s / max(seconds, 1e-6))))


def spread(times: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    tenths = quantiles(times, n=10, method="inclusive")
    return {"median_ms": tenths[4], "p20_ms": tenths[1], "p80_ms": tenths[7]}

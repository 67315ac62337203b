"""Real steps on the present device, to hold the prediction against."""

from __future__ import annotations

import copy
import gc

import psutil
import torch
from transformers import PretrainedConfig

from .cards import GIB
from .methods import Method
from .report import MemoryReport
from .rows import Measurement
from .scenario import Scenario, one_line
from .shapes import model_without_values


def present_device() -> str:
    """ "cuda" where there is a CUDA device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_bytes(device: str) -> int:
    """Bytes that a new model could take on a device now."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else int(psutil.virtual_memory().available)


def check_room(name: str, config: PretrainedConfig, device: str) -> None:
    """Refuse to build a model that is larger in bf16 than the free memory.

    Raises:
        ValueError: one line with both sizes.
    """
    parameters = sum(p.numel() for p in model_without_values(copy.deepcopy(config)).parameters())
    free = free_bytes(device)
    if 2 * parameters > free:
        raise ValueError(
            f"cannot measure {name!r}: the model takes {2 * parameters / GIB:.1f} GiB in bf16 and {free / GIB:.1f} GiB "
            f"are free on {device}; measure a smaller model, or leave measuring out"
        )


def add_measurements(report: MemoryReport, config: PretrainedConfig, methods: list[Method], device: str) -> None:
    """Run a real step of each method that was counted, and enter it in the method's row."""
    asked = {method.label: method for method in methods}
    for row in report.ran:
        row.measured = measure(config, asked[row.method], report, device)


def measure(config: PretrainedConfig, method: Method, report: MemoryReport, device: str) -> Measurement:
    """One real step: the ledger's peak, or on CUDA the allocator's own."""
    before = _start(device)
    try:
        scenario = Scenario(config, method, report.gradient_checkpointing, report.optimizer, device)
        return _measured_step(scenario, report, device, before)
    except Exception as error:  # out of memory, or whatever a method's own package raises
        return Measurement(device, error=one_line(error))


def _start(device: str) -> int:
    """Bytes of other people's tensors on the device, with the allocator's cache emptied."""
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _measured_step(scenario: Scenario, report: MemoryReport, device: str, before: int) -> Measurement:
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ledger, _ = scenario.count(report.batch_size, report.seq_len, record=device != "cuda")
    if device != "cuda":
        return Measurement(device, ledger.peaks()["total"].nbytes)
    torch.cuda.synchronize()
    allocated = torch.cuda.max_memory_allocated() - before
    return Measurement(device, 0, allocated, torch.cuda.max_memory_reserved())

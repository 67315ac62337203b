"""The memory gate: recompute the ledger of fixed training steps and compare with budgets.json.

    python benchmarks/memory/gate.py             compare, exit 1 on any growth      (make memory)
    python benchmarks/memory/gate.py --update    write the budgets anew             (make memory-update)

A budget holds, for one model, sequence length, checkpointing and method, the peak in total, by category
at the peak, and by phase, in bytes. Where no number of the docs is read off, four layers stand for all: whatever
grows, grows in each. The comparison has no tolerance: the ledger counts meta tensors, so
with the pinned versions the same code gives the same bytes. A total that the loss dominates can hide a
growth elsewhere, so categories and phases are compared as well. An improvement asks to be written down.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

BUDGETS = Path(__file__).with_name("budgets.json")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
# One factor, and the paper's band at full rank.
BANDED = "qsvft:sides=one,pattern=banded"
METHODS = ("floor", "qlora", "svft", "qsvft", BANDED, "qsvft:sides=both,pattern=banded,rank=256")
# Where the loss is small, the other rivals and forms as well.
MORE_METHODS = (
    "lora",
    "qlora-kbit",
    "svft-authors",
    f"{BANDED},rank=256",
    "qsvft:sides=one,pattern=random,rank=1024",
    "qsvft:sides=both,pattern=banded,rank=256,residual=true,factor_bits=8",
)
# What calibration gives where nothing else is said.
CALIBRATED = "qsvft:basis=data,residual=true"
# The lean forms at full length, which the README's numbers are made of.
LEAN_METHODS = (
    CALIBRATED,
    f"{CALIBRATED},quantize_embeddings=8",
    "floor:chunked_loss=true",
    "qlora:chunked_loss=true",
    "qlora-kbit",
    "qsvft:factor_bits=16",
    "qsvft:factor_bits=4",
    "qsvft:quantize_embeddings=8",
    "qsvft:factor_bits=4,quantize_embeddings=8,offload_checkpoints=true",
    f"{BANDED},factor_bits=4,rank=256",
    f"{BANDED},factor_bits=4,rank=1024",
    f"{BANDED},factor_bits=8",
    f"{BANDED},factor_bits=4",
    f"{BANDED},factor_bits=4,quantize_embeddings=8",
    f"{BANDED},factor_bits=4,quantize_embeddings=8,offload_checkpoints=true",
)
WITHOUT_CHECKPOINTING = ("qlora", f"{BANDED},factor_bits=4", f"{BANDED},factor_bits=4,rank=1024")
MODELS = ("llama-2-7b", "llama-3-8b")
FEW_LAYERS, SMALL_VOCABULARY = "4 layers", "small vocabulary"
MIB = 2**20

Case = tuple[str, int, bool, str]


def cases() -> Iterator[Case]:
    """(model, sequence length, checkpointing, method)."""
    for model in MODELS:
        for method in METHODS:
            yield f"{model}, {FEW_LAYERS}", 512, False, method
            yield model, 2048, True, method
        for method in LEAN_METHODS:
            yield model, 2048, True, method
        for method in WITHOUT_CHECKPOINTING:
            yield model, 2048, False, method
    # Nearly no vocabulary: here the loss cannot hide what the layers do.
    for method in (*METHODS, *MORE_METHODS):
        yield f"llama-2-7b, {FEW_LAYERS}, {SMALL_VOCABULARY}", 512, True, method


def key(case: Case) -> str:
    model, seq_len, checkpointing, method = case
    return f"{model} | {seq_len} tokens | checkpointing {'on' if checkpointing else 'off'} | {method}"


def measure(case: Case) -> dict[str, Any]:
    """The peaks of one case, in bytes."""
    import torch

    from qsvft.memory.methods import parse_method
    from qsvft.memory.presets import model_config
    from qsvft.memory.scenario import count_step

    torch.set_num_threads(1)
    name, seq_len, checkpointing, method = case
    preset, *changes = name.split(", ")
    config = model_config(preset)
    if FEW_LAYERS in changes:
        config.num_hidden_layers = 4
    if SMALL_VOCABULARY in changes:
        config.vocab_size = 512
    ledger, _ = count_step(config, parse_method(method), 1, seq_len, checkpointing)
    peaks = ledger.peaks()
    total = peaks.pop("total")
    return {
        "peak": total.nbytes,
        "categories": {name: n for name, n in total.categories.items() if n},
        "phases": {name: peak.nbytes for name, peak in peaks.items()},
        "at": f"{total.phase}, {total.module or 'outside the modules'}",
    }


def _import_for_good() -> None:
    """What is imported is not looked through for garbage again and again."""
    import qsvft.memory.scenario  # noqa: F401

    gc.collect()
    gc.freeze()


def measure_all(chosen: list[Case], jobs: int) -> dict[str, dict[str, Any]]:
    """Measure cases in ``jobs`` processes, with progress on stderr."""
    results = {}
    with ProcessPoolExecutor(jobs, get_context("spawn"), _import_for_good) as pool:
        for number, (case, found) in enumerate(zip(chosen, pool.map(measure, chosen), strict=True), 1):
            results[key(case)] = found
            print(f"\r{number}/{len(chosen)} {key(case):<95.95}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def differences(budget: dict[str, Any], found: dict[str, Any]) -> list[tuple[str, int]]:
    """(what, bytes more than the budget) for the total, each category and each phase that differs."""
    pairs = [("peak in total", budget["peak"], found["peak"])]
    for kind, where in (("categories", "at the peak"), ("phases", "peak of the phase")):
        names = {*budget[kind], *found[kind]}
        pairs += [(f"{name} ({where})", budget[kind].get(name, 0), found[kind].get(name, 0)) for name in sorted(names)]
    return [(what, after - before) for what, before, after in pairs if after != before]


def report(budgets: dict[str, Any], found: dict[str, Any]) -> tuple[list[str], bool]:
    """Readable lines for what differs, and whether anything grew."""
    lines, grew = [], False
    for name, result in found.items():
        if name not in budgets:
            lines.append(f"{name}: no budget yet")
            grew = True
            continue
        changes = differences(budgets[name], result)
        if changes:
            lines.append(f"{name}  (peak now in {result['at']}; was in {budgets[name]['at']})")
        for what, more in changes:
            lines.append(f"    {what}: {more / MIB:+.3f} MiB ({more:+d} bytes)")
            grew = grew or more > 0
    return lines, grew


def installed() -> dict[str, str]:
    return {name: version(name).split("+")[0] for name in PACKAGES}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write atomically."""
    from qsvft.storage.whole_files import write_whole

    write_whole(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the budgets instead of comparing")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--budgets", type=Path, default=BUDGETS)
    options = parser.parse_args()
    if options.update:
        found = measure_all(list(cases()), options.jobs)
        write(options.budgets, {"versions": installed(), "budgets": found})
        print(f"wrote {len(found)} budgets to {options.budgets}")
        return 0
    held = json.loads(options.budgets.read_text())
    if held["versions"] != installed():
        print(f"the budgets were made with {held['versions']}, installed are {installed()}.")
        print("Bytes are compared at zero tolerance: install the pinned versions (make clean test), or run")
        print("make memory-update with the new ones and review the difference.")
        return 1
    lines, grew = report(held["budgets"], measure_all(list(cases()), options.jobs))
    print("\n".join(lines) if lines else f"memory: {len(held['budgets'])} budgets hold to the byte")
    if grew:
        print("\nMemory grew. If that is meant, run make memory-update and say why in the commit.")
    elif lines:
        print("\nMemory shrank: write it down with make memory-update.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())

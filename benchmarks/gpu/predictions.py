"""The ledger's prediction of each case, on the meta device, in processes beside the one that has the card."""

from __future__ import annotations

import os
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from cases import BATCH_SIZE, name
from results import FAILED, Rows

from qsvft.memory.methods import parse_method
from qsvft.memory.presets import model_config
from qsvft.memory.scenario import count_step, one_line
from qsvft.memory.shapes import model_without_values

Case = tuple[str, str, int]


def predict(case: Case) -> dict[str, Any]:
    """The peak of one case in bytes, what it is made of, and the model's bytes in bf16."""
    model, method, seq_len = case
    parsed = parse_method(method)
    ledger, _ = count_step(model_config(model), parsed, BATCH_SIZE, seq_len)
    peak = ledger.peaks()["total"]
    return {
        "predicted_bytes": peak.nbytes,
        "categories": {kind: n for kind, n in peak.categories.items() if n},
        "at": f"{peak.phase}, {peak.module or 'outside the modules'}",
        "dense_bytes": 2 * sum(p.numel() for p in model_without_values(model_config(model)).parameters()),
    }


class Predictions:
    """Predictions by case: those on file, and the others counted in processes meanwhile.

    Args:
        rows: where they are kept.
        jobs: processes; 0 counts in this one.
    """

    def __init__(self, rows: Rows, jobs: int) -> None:
        self.rows, self.jobs = rows, jobs
        self._pool: ProcessPoolExecutor | None = None
        self._running: dict[str, Future[dict[str, Any]]] = {}

    def ask(self, cases: list[Case]) -> None:
        """Begin with cases that will be needed."""
        missing = [case for case in cases if not self.rows.done(name(*case))]
        if not missing or self.jobs == 0:
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.jobs, get_context("spawn"), initializer=_away_from_the_card)
        self._running |= {name(*case): self._pool.submit(predict, case) for case in missing}

    def get(self, case: Case) -> dict[str, Any]:
        """The row of a case; with status "failed" and the reason where it could not be counted."""
        key = name(*case)
        found = self.rows.find(key)
        if found is not None and self.rows.done(key):
            return found
        model, method, seq_len = case
        about = {"model": model, "method": method, "seq_len": seq_len}
        try:
            future = self._running.get(key)
            return self.rows.append(key, "ran", **about, **(predict(case) if future is None else future.result()))
        except Exception as error:  # whatever a method's own package raises belongs in its row
            return self.rows.append(key, FAILED, **about, reason=one_line(error))

    def close(self) -> None:
        """Drop what has not begun."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _away_from_the_card() -> None:
    """A process that only counts must take no memory on the card, nor all cores."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)

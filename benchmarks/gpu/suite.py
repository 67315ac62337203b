"""What the stages share: the clock, the rows, the device, and how a case is measured.

Every finished case is a row on the disk before the next one begins; a case that has its row is skipped. A case that
fails or runs out of memory has that in its row, and the next one goes on. Where the CUDA context is lost there is no
going on in this process: it ends, and card.py starts another behind the case.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import Plan
from predictions import Predictions
from results import FAILED, RAN, Row, Rows, Run
from steps import Card, Rehearsal

from qsvft.memory.scenario import one_line

OUT_OF_MEMORY = "out of memory"
AGAIN_S = 3.0
"""Seconds after which time is up once more, in case the first word of it fell where Python drops exceptions."""
STUCK_S = 12.0
"""Seconds over a stage's time after which its process is taken to hang, and ends itself with a traceback."""


class OutOfTime(BaseException):
    """The stage's time is up; no ordinary handler may take it for a case's failure."""


class ContextLost(BaseException):
    """After a CUDA error nothing runs in this process any more."""


@dataclass
class Suite:
    """One process of a run.

    Attributes:
        folder: where the results go.
        device: the card, or the CPU in a rehearsal.
        plan: what is measured.
        run: which run this is.
        rows: its rows so far.
        predictions: the ledger's, counted meanwhile.
        started, ends: when the command began and when the measuring must be over, seconds since 1970.
    """

    folder: Path
    device: Card | Rehearsal
    plan: Plan
    run: Run
    rows: Rows
    predictions: Predictions
    started: float
    ends: float

    def left(self) -> float:
        """Seconds until the measuring must be over."""
        return self.ends - time.time()

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Raise :class:`OutOfTime` inside of the block when its time is up; end the process if that does not help."""

        def stop(*_: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, stop)
        faulthandler.dump_traceback_later(seconds + STUCK_S, exit=True, file=sys.__stderr__)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), AGAIN_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, before)

    def attempt(self, stage: str, case: str, about: Row, measure: Callable[[], Row]) -> Row:
        """Measure one case and write its row, whatever happens but that time is up."""
        start = time.monotonic()
        with self.rows.at_hand(stage, case):
            try:
                status, found = RAN, measure()
                status = found.pop("status", status)
            except torch.OutOfMemoryError as error:
                status, found = OUT_OF_MEMORY, {"reason": one_line(error)}
            except Exception as error:  # whatever a method's own package raises belongs in its row
                status, found = FAILED, {"reason": one_line(error)}
            row = self.rows.append(stage, case, status, **about, **found, seconds=round(time.monotonic() - start, 3))
        say(f"{case}: {found.get('reason', status)}")
        if "CUDA error" in str(found.get("reason")):
            raise ContextLost
        self.device.release()
        self.predictions.collect()
        return row


def side_jobs(rehearsal: bool) -> int:
    """Processes that count predictions: some cores stay for the one that launches kernels."""
    return 0 if rehearsal else max(1, min(10, (os.cpu_count() or 2) - 3))


def say(text: str) -> None:
    print(text, flush=True)

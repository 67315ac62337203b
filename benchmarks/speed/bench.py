"""What the parts of a run share: the rows on disk, the device, how long to time; and how a case is done."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clock import Times, interleaved
from rich.console import Console
from rich.progress import track
from rivals import Rival, scenario
from transformers import PretrainedConfig, PreTrainedModel

from qsvft.memory.scenario import Scenario, one_line

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpu"))
from results import FAILED, RAN, Row, Rows

Built = dict[Rival, Scenario]


@dataclass
class Bench:
    """One run.

    Attributes:
        rows: what is finished, a line a case.
        rivals: who is timed, the unit first.
        device: "cpu" or "cuda".
        rounds: of the clock, at most.
        seconds: of each case's rounds, about.
        console: where it is said what runs.
    """

    rows: Rows
    rivals: tuple[Rival, ...]
    device: str
    rounds: int
    seconds: float
    console: Console

    def left(self, cases: Iterable[str]) -> list[str]:
        """Those that have no row yet."""
        return [case for case in cases if not self.rows.done(case)]

    def attempt(self, stage: str, case: str, measure: Callable[[], Row]) -> None:
        """Measure a case and write its row, unless it is there; what a method's package raises goes into the row."""
        if self.rows.done(case):
            return
        self.console.print(case, highlight=False)
        try:
            status, found = RAN, measure()
        except Exception as error:
            status, found = FAILED, {"reason": one_line(error)}
            self.console.print(f"  {found['reason']}", highlight=False)
        self.rows.append(stage, case, status, **found)
        gc.collect()

    def time(self, steps: Mapping[str, Callable[[], Any]]) -> Times:
        """Milliseconds of each, round by round."""

        def progress(numbers: Iterable[int]) -> Iterable[int]:
            return track(numbers, description="  rounds", console=self.console, transient=True)

        return interleaved(steps, self.rounds, self.device, self.seconds, progress=progress)

    def build(
        self, config: PretrainedConfig, make: Callable[[], PreTrainedModel] | None = None
    ) -> tuple[Built, dict[str, str]]:
        """Every rival on a model, and why one could not be built, by its name.

        Args:
            config: its shapes.
            make: gives the model anew for each rival; None for random weights.
        """
        built: Built = {}
        refused: dict[str, str] = {}
        for rival in track(self.rivals, description="  building", console=self.console, transient=True):
            torch.manual_seed(0)
            try:
                found = scenario(rival, config, self.device, make() if make else None)
            except (ValueError, RuntimeError) as error:
                if rival is self.rivals[0]:
                    raise
                refused[rival.name] = one_line(error)
                continue
            found.model.train()
            built[rival] = found
        return built, refused

"""The ledger's predictions, on the meta device, in processes beside the one that has the card.

Nothing waits for them: a step is measured whether or not its prediction is there, and the two meet in the tables.

    python predictions.py [--model llama-3-8b] [--jobs 2]

prints the peaks of all steps on any machine, as a table of the README's.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import transformers
from cases import BATCH_SIZE, FULL, GIB, checkpointed, search_case, step_case, steps_of
from results import FAILED, RAN, Rows

from qsvft.memory.methods import parse_method
from qsvft.memory.presets import model_config
from qsvft.memory.profiler import longest_fitting
from qsvft.memory.scenario import Scenario, count_step, one_line

Case = tuple[str, str, int]
STAGE = "predictions"


def peak(model: str, method: str, seq_len: int) -> dict[str, Any]:
    """The peak of a step in bytes, and what it is made of."""
    text, checkpointing = checkpointed(method)
    ledger, _ = count_step(model_config(model), parse_method(text), BATCH_SIZE, seq_len, checkpointing)
    found = ledger.peaks()["total"]
    return {
        "predicted_bytes": found.nbytes,
        "categories": {kind: n for kind, n in found.categories.items() if n},
        "at": f"{found.phase}, {found.module or 'outside the modules'}",
    }


def longest(model: str, method: str, card: int) -> dict[str, Any]:
    """The longest sequence that a card of so many bytes takes, with the ledger's allowance for CUDA."""
    scenario = Scenario(model_config(model), parse_method(method), True, "adamw", "meta")

    def peak_at(length: int) -> int:
        return scenario.count(BATCH_SIZE, length)[0].peaks()["total"].nbytes

    return {"predicted_tokens": longest_fitting(peak_at, card / GIB, 2048)}


class Predictions:
    """Predictions by case, counted meanwhile and entered as they are finished.

    Args:
        rows: where they are entered.
        jobs: processes; 0 counts in this one.
    """

    def __init__(self, rows: Rows, jobs: int) -> None:
        self.rows, self.jobs = rows, jobs
        self._pool: ProcessPoolExecutor | None = None
        self._open: dict[str, tuple[dict[str, Any], Future[dict[str, Any]]]] = {}

    def ask(self, steps: list[Case], searches: list[Case]) -> None:
        """Begin with what will be measured, in that order."""
        for case in steps:
            self._ask(step_case(*case), peak, case, ("model", "method", "seq_len"))
        for case in searches:
            self._ask(search_case(*case), longest, case, ("model", "method", "card_bytes"))

    def _ask(self, name: str, count: Any, case: Case, keys: tuple[str, ...]) -> None:
        name = f"{STAGE} | {name}"
        if self.rows.done(name) or name in self._open:
            return
        if self.jobs == 0:
            future: Future[dict[str, Any]] = Future()
            try:
                future.set_result(count(*case))
            except Exception as error:
                future.set_exception(error)
        else:
            future = self._processes().submit(count, *case)
        self._open[name] = dict(zip(keys, case, strict=True)), future

    def _processes(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # One server imports everything once; it and its children see no card.
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
            try:
                context = get_context("forkserver")
                context.set_forkserver_preload(["predictions"])
                self._pool = ProcessPoolExecutor(self.jobs, context, initializer=_out_of_the_way)
                self._pool.submit(os.getpid)  # starts the server, while the card is hidden
            finally:
                if hidden is None:
                    del os.environ["CUDA_VISIBLE_DEVICES"]
                else:
                    os.environ["CUDA_VISIBLE_DEVICES"] = hidden
        return self._pool

    def collect(self) -> None:
        """Enter what is finished."""
        for name, (about, future) in list(self._open.items()):
            if not future.done():
                continue
            del self._open[name]
            error = future.exception()
            if error is None:
                self.rows.append(STAGE, name, RAN, **about, **future.result())
            else:  # whatever a method's own package raises belongs in its row
                self.rows.append(STAGE, name, FAILED, **about, reason=one_line(error))

    def waiting(self) -> bool:
        """Whether any is not finished."""
        return bool(self._open)

    def close(self) -> None:
        """Enter what is finished, and drop the rest."""
        self.collect()
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)


def _out_of_the_way() -> None:
    """A process that only counts takes one core, and none from the one that launches kernels."""
    os.nice(10)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="one of those that are measured")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    cases = [case for case in steps_of(FULL) if options.model in (None, case[0])]
    with ProcessPoolExecutor(options.jobs, get_context("forkserver"), initializer=_out_of_the_way) as pool:
        found = dict(zip(cases, pool.map(peak, *zip(*cases, strict=True)), strict=True))
    lengths = sorted({case[2] for case in cases})
    for model in dict.fromkeys(case[0] for case in cases):
        print(f"| {model} | {' | '.join(f'{n} tokens' for n in lengths)} |")
        print(f"|---|{'---:|' * len(lengths)}")
        for method in dict.fromkeys(case[1] for case in cases if case[0] == model):
            peaks = [found.get((model, method, n)) for n in lengths]
            cells = ["" if one is None else f"{one['predicted_bytes'] / GIB:.2f}" for one in peaks]
            print(f"| `{method}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

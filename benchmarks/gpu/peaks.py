"""Stage "steps": bytes and time of a step of every method. A method is built once for all that is asked of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cases import BATCH_SIZE, QLORA, step_case
from results import RAN
from steps import about, build, spread
from suite import Suite

from qsvft.memory.presets import model_config
from qsvft.memory.scenario import Scenario

STAGE = "steps"
MEMORY, SPEED = "memory", "speed"
SETTINGS = {
    MEMORY: {"optimizer": "adamw", "autocast": "off"},
    SPEED: {"optimizer": "adamw, fused", "autocast": "bfloat16"},
}


def run(suite: Suite) -> None:
    """Every pass of the plan, method by method."""
    for one in suite.plan.passes:
        for method in one.methods:
            _measure(suite, one.model, method, one.lengths)


def _measure(suite: Suite, model: str, method: str, lengths: tuple[int, ...]) -> None:
    wanted = [(kind, n) for n in lengths for kind in (MEMORY, SPEED) if not _done(suite, kind, model, method, n)]
    if not wanted:
        return
    built: list[tuple[Scenario, int]] = []

    def scenario() -> tuple[Scenario, int]:
        """The model, and what else stood on the card before it."""
        if not built:
            suite.device.release()  # what is left of others must not go while this is measured
            before = suite.device.allocated()
            built.append((build(model_config(model), method, suite.device.kind), before))
        return built[0]

    measures: dict[str, Callable[[int], dict[str, Any]]] = {
        MEMORY: lambda n: suite.device.peak(scenario()[0], n, scenario()[1]),
        SPEED: lambda n: _speed(suite, scenario()[0], n),
    }
    for kind, n in wanted:
        row = {**about(model, method), **SETTINGS[kind], "seq_len": n}
        suite.attempt(kind, f"{kind} | {step_case(model, method, n)}", row, lambda kind=kind, n=n: measures[kind](n))
        if not built:
            break  # it cannot even be built, and the row says why
    built.clear()


def _done(suite: Suite, kind: str, model: str, method: str, seq_len: int) -> bool:
    """Whether a row is there. Ratios are taken in one run, so QLoRA is timed again in each that times others."""
    case = f"{kind} | {step_case(model, method, seq_len)}"
    if not suite.rows.done(case):
        return False
    row = suite.rows.find(case)
    assert row is not None
    if kind == MEMORY or method != QLORA or row["run"] == suite.run.run or row["status"] != RAN:
        return True
    return all(_done(suite, kind, model, other, seq_len) for other in _rivals(suite, model, seq_len))


def _rivals(suite: Suite, model: str, seq_len: int) -> list[str]:
    passes = [one for one in suite.plan.passes if one.model == model and seq_len in one.lengths]
    return [method for one in passes for method in one.methods if method != QLORA]


def _speed(suite: Suite, scenario: Scenario, seq_len: int) -> dict[str, Any]:
    times = suite.device.times(scenario, seq_len, suite.plan)
    found = spread(times)
    return {**found, "times_ms": times, "tokens_per_s": 1000 * BATCH_SIZE * seq_len / found["median_ms"]}

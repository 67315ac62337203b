"""Stage "longest": the longest sequence of a method on a card of 8 to 24 GiB, which the allocator is made to believe.

A straight line through the peaks at two lengths, measured without a limit, says where to look first.
"""

from __future__ import annotations

from typing import Any

from cases import Search, search_case
from steps import Stepper, about, build, longest
from suite import Suite

from qsvft.memory.presets import model_config
from qsvft.memory.scenario import Scenario

STAGE = "longest"


def run(suite: Suite) -> None:
    """Every search of the plan, the small cards first."""
    for search in suite.plan.searches:
        for method in search.methods:
            _search(suite, search, method)


def _search(suite: Suite, search: Search, method: str) -> None:
    cases = {card: f"{STAGE} | {search_case(search.model, method, card)}" for card in search.cards}
    wanted = [card for card in search.cards if not suite.rows.done(cases[card])]
    if not wanted:
        return
    known: list[tuple[Scenario, list[int]]] = []

    def measure(card: int) -> dict[str, Any]:
        if not known:
            suite.device.release()  # what is left of others must not go while this is measured
            before = suite.device.allocated()
            scenario = build(model_config(search.model), method, suite.device.kind)
            peaks = [suite.device.peak(scenario, n, before)["allocated_bytes"] for n in suite.plan.line]
            known.append((scenario, peaks))
            suite.device.release()
        scenario, peaks = known[0]
        stepper = Stepper(scenario, fused=False, autocast=False)
        stepper.step(stepper.tokens(suite.plan.line[0]))  # leaves the optimizer's state, as all later steps find it
        suite.device.release()
        guess = _guess(suite.plan.line, peaks, suite.device.usable(card))
        with suite.device.limited(card):
            fitted, failed, tried = longest(lambda n: suite.device.fits(stepper, n), guess, suite.plan.longest)
        return {"longest_that_fits": fitted, "shortest_that_does_not": failed, "tried": tried}

    for card in wanted:
        row = {**about(search.model, method), "card_bytes": card}
        suite.attempt(STAGE, cases[card], row, lambda card=card: measure(card))
        if not known:
            break  # it cannot be built, and the row says why
    known.clear()


def _guess(lengths: tuple[int, int], peaks: list[int], usable: int) -> int:
    """Where the line through the peaks meets what is usable."""
    (first, second), (low, high) = lengths, peaks
    return int(first + max(usable - low, 0) * (second - first) / max(high - low, 1))

"""pytest with a row for every finished test.

    python recorder.py ROWS.jsonl cpu|cuda PYTEST_ARGUMENTS...

Tests that need CUDA come first. One that has passed or been skipped in the present state of the code is
not run again, so that a run cut off by its time limit goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from results import FAILED, Rows, Run, machine


class Recorder:
    """Writes a row when a test has finished; deselects those that have theirs."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if self.rows.done(item.nodeid)]
        if done:
            config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if not self.rows.done(item.nodeid)]
        items.sort(key=lambda item: item.get_closest_marker("cuda") is None)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.rows.append(report.nodeid, FAILED, reason=_last_line(report.longreprtext), when="collection")
        elif self.rows.find(report.nodeid) is not None:
            self.rows.append(report.nodeid, "collected", when="collection")  # it could not be before

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One row a test: at its call, or where setting up skipped or failed it, or where tearing down failed."""
        if report.when != "call" and report.passed:
            return
        values: dict[str, object] = {"seconds": round(report.duration, 3), "when": report.when}
        if report.skipped:
            # (file, line, reason), but for an expected failure
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self.rows.append(report.nodeid, "skipped", reason=reason, **values)
        elif report.failed:
            self.rows.append(report.nodeid, FAILED, reason=_last_line(report.longreprtext), **values)
        else:
            self.rows.append(report.nodeid, "passed", **values)


def _last_line(text: str) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line for line in text.splitlines() if line.startswith("E ")]
    return (lines[0][1:].strip() if lines else text.strip().splitlines()[-1] if text.strip() else "")[:500]


def main() -> int:
    path, kind, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    run = Run.begin(machine(kind), rehearsal=kind == "cpu")
    # Verbose, so that the log's last line names the test that a time limit stopped.
    options = ["-v", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return int(pytest.main([*options, *arguments], plugins=[Recorder(Rows(path, run))]))


if __name__ == "__main__":
    sys.exit(main())

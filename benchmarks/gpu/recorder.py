"""pytest with a row for every finished test.

    python recorder.py FOLDER RUN_AS_JSON PYTEST_ARGUMENTS...

One that has its row in the present state of the code is not run again, so that a run cut off by its time limit goes
on where it was.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from results import FAILED, Rows, Run

STAGE = "tests"


class Recorder:
    """Writes a row when a test has finished; deselects those that have theirs."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if self.rows.done(_case(item.nodeid))]
        if done:
            config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if not self.rows.done(_case(item.nodeid))]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        case = _case(report.nodeid)
        if report.failed:
            self.rows.append(STAGE, case, FAILED, reason=_last_line(report.longreprtext), when="collection")
        elif self.rows.find(case) is not None:
            self.rows.append(STAGE, case, "collected", when="collection")  # it could not be before

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One row a test: at its call, or where setting up skipped or failed it, or where tearing down failed."""
        if report.when != "call" and report.passed:
            return
        case, values = _case(report.nodeid), {"seconds": round(report.duration, 3), "when": report.when}
        if report.skipped:
            # (file, line, reason), but for an expected failure
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
            self.rows.append(STAGE, case, "skipped", reason=reason, **values)
        elif report.failed:
            self.rows.append(STAGE, case, FAILED, reason=_last_line(report.longreprtext), **values)
        else:
            self.rows.append(STAGE, case, "passed", **values)


def _case(nodeid: str) -> str:
    return f"{STAGE} | {nodeid}"


def _last_line(text: str) -> str:
    """The line of a traceback that says what went wrong."""
    lines = [line for line in text.splitlines() if line.startswith("E ")]
    return (lines[0][1:].strip() if lines else text.strip().splitlines()[-1] if text.strip() else "")[:500]


def main() -> int:
    folder, run, arguments = Path(sys.argv[1]), Run(**json.loads(sys.argv[2])), sys.argv[3:]
    # Verbose, so that the log's last line names the test that a time limit stopped.
    options = ["-v", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return int(pytest.main([*options, *arguments], plugins=[Recorder(Rows(folder, run))]))


if __name__ == "__main__":
    sys.exit(main())

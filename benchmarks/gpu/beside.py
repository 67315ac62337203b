"""Another command of this checkout, for a stage's time: it writes to a log, and ends with the stage."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from results import ROOT


def run(command: Sequence[str], log: Path) -> int:
    """Its exit status."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # pytest's that happen to be there are not ours
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            return process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise

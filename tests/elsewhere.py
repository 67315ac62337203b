"""The tests marked ``anywhere`` as other machines would run them.

    python tests/elsewhere.py              thirteen settings in which any two values meet: ten minutes on two cores
    python tests/elsewhere.py --all        every combination: half an hour
    python tests/elsewhere.py --short      the one that is farthest from the usual: what CI runs

A setting says where the data of foreign files begin (bytes past a multiple of 64), how many threads compute, and which
instructions torch and oneDNN use. Exit code 1 if a test fails in one of them. Settings that this processor cannot
have are named and left out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
OFFSETS, THREADS = (0, 4, 38, 56), (1, 2)
CAPABILITIES = ("default", "avx2", "avx512")
ONEDNN = ("ALL", "AVX2")


@dataclass(frozen=True)
class Setting:
    """One machine: ``capability`` is ATEN_CPU_CAPABILITY, ``onednn`` ONEDNN_MAX_CPU_ISA."""

    offset: int
    threads: int
    capability: str
    onednn: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "QSVFT_TEST_OFFSET": str(self.offset),
            "QSVFT_TEST_THREADS": str(self.threads),
            "ATEN_CPU_CAPABILITY": self.capability,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
        }

    @property
    def missing(self) -> bool:
        """Whether this processor has not the instructions."""
        return CAPABILITIES.index(self.capability) > CAPABILITIES.index(_capability())


SHORT = (Setting(38, 2, "default", "SSE41"),)
ALL = (*SHORT, *(Setting(*values) for values in product(OFFSETS, THREADS, CAPABILITIES, ONEDNN)))
PAIRS = (
    *SHORT,
    *(
        Setting(offset, THREADS[(i + j) % 2], capability, ONEDNN[(i // 2 + j) % 2])
        for i, offset in enumerate(OFFSETS)
        for j, capability in enumerate(CAPABILITIES)
    ),
)
"""Any value of one thing meets any value of another in one of them."""


@cache
def _capability() -> str:
    """The widest that this processor has, whatever is asked for at the moment."""
    command = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"]
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip().lower()
    return found if found in CAPABILITIES else "default"


def marked() -> list[str]:
    """The files that have such tests: collecting all of them takes longer than these."""
    return [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.anywhere" in path.read_text()]


def run(setting: Setting, workers: int, arguments: list[str]) -> tuple[int, str]:
    """pytest's exit code and the end of what it says."""
    with tempfile.TemporaryDirectory() as folder:
        apart = [f"-n{workers}", "-p", "no:cacheprovider", f"--basetemp={folder}/tests"]
        command = [sys.executable, "-m", "pytest", "-q", *apart]
        done = subprocess.run(
            [*command, "-m", "anywhere and not slow", *marked(), *arguments],
            cwd=ROOT,
            env={**os.environ, **setting.environment},
            capture_output=True,
            text=True,
            check=False,
        )
    return done.returncode, done.stdout[-6000:] + done.stderr[-2000:]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--short", action="store_true", help="the setting that is farthest from the usual")
    some.add_argument("--all", action="store_true", help="every combination of the values")
    options, arguments = parser.parse_known_args(given)
    console = Console()
    console.print(f"this processor: {_capability()}, torch {torch.__version__}")
    asked = SHORT if options.short else ALL if options.all else PAIRS
    settings = [setting for setting in asked if not setting.missing]
    for setting in asked:
        if setting.missing:
            console.print(f"left out, not on this processor: {setting}")
    table, failed = Table("offset", "threads", "torch", "oneDNN", "result"), 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        workers = max(1, (os.cpu_count() or 1) // max(1, len(settings)))
        futures = {pool.submit(run, setting, workers, arguments): setting for setting in settings}
        for future in as_completed(futures):
            setting, (code, said) = futures[future], future.result()
            result = said.strip().splitlines()[-1] if said.strip() else f"exit code {code}"
            table.add_row(*map(str, vars(setting).values()), result)
            if code:
                failed += 1
                console.print(f"{setting}\n{said}", markup=False)
    console.print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

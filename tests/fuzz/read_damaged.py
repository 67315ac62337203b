"""Damage files at random and read them: ``make fuzz``, or ``PYTHONPATH=tests python tests/fuzz/read_damaged.py 20000``.

Each case is a number; ``--first N`` begins there. What comes out must be what always came, or an error that says which
file or field is meant. Anything else is printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from damage import damaged
from doors import doors
from rich.progress import track
from transformers.utils.logging import disable_progress_bar


def cases(first: int, count: int, place: Path, only: str = "") -> Iterator[tuple[int, str, str, str | None]]:
    """(number, door, damage, what is wrong) of so many cases from a number on."""
    found = {name: door for name, door in doors(place).items() if only in ("", name)}
    for number in range(first, first + count):
        name = sorted(found)[number % len(found)]
        done = damaged(found[name].folder, place / "damaged", number)
        yield number, name, done, found[name].outcome(place / "damaged")


def main() -> int:
    """Run and print; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="", help="one of the doors")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        found = cases(options.first, options.count, Path(place), options.only)
        for number, door, done, what in track(found, total=options.count, description="reading damaged files"):
            if what is not None:
                wrong += 1
                print(f"{number} {door} {done}\n    {what}", flush=True)
    print(f"{options.count} cases, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""Answers on disk, a line each, so that no question is asked twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Answers:
    """The answers to the questions of a data set.

    Args:
        path: of the file, which is made where there is none.
        name: of what is asked.
        count: of the questions.
    """

    def __init__(self, path: Path, name: str, count: int) -> None:
        self.path, self.name, self.count = path, name, count

    def all(self) -> dict[int, dict[str, Any]]:
        """By number of the question; a line that was cut off does not count."""
        found: dict[int, dict[str, Any]] = {}
        if self.path.is_file():
            for line in self.path.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line)
                    found[row.pop("question")] = row
                except (ValueError, KeyError, AttributeError, TypeError):
                    continue
        return {number: row for number, row in found.items() if number < self.count}

    def left(self) -> list[int]:
        """The questions without an answer."""
        known = self.all()
        return [number for number in range(self.count) if number not in known]

    def add(self, found: Mapping[int, Mapping[str, Any]]) -> None:
        """Write answers by number; they are on the disk before this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            if file.tell() and self.path.read_bytes()[-1:] != b"\n":
                file.write(b"\n")
            file.write(b"".join(json.dumps({"question": n, **row}).encode() + b"\n" for n, row in found.items()))
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def shown(self, left: int) -> Iterator[Callable[[int], None]]:
        """A progress bar, where there is a terminal and anything left."""
        console = Console(stderr=True)
        columns = (TextColumn("asking {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not (console.is_terminal and left)) as bar:
            task = bar.add_task(self.name, total=left)
            yield lambda count: bar.advance(task, count)

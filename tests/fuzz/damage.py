"""Damaged copies of a folder, each from a number: truncated and changed bytes, changed JSON, changed headers.

What a damage does is drawn from its number alone, so that a case that fails is one to be run again.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 10**6, 10**30, 0.5, float("nan"), "", "x", "\0", "../x", "/etc/passwd", "float64", "int8",
    [], [1], ["x"], {}, {"x": 1}, [[]], "(" * 50, "(a+)+$", "é" * 300, {"": {}},
)  # fmt: skip
"""What may stand where something else is expected."""


def damaged(folder: Path, target: Path, number: int) -> str:
    """Copy a folder and damage one of its files.

    Args:
        folder: with files alone.
        target: the copy; it is made anew.
        number: which damage.

    Returns:
        What was done, in words that begin with the file's name.
    """
    draw = random.Random(number)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    file = draw.choice(sorted(path for path in target.iterdir() if path.suffix in (".json", ".safetensors")))
    kinds = _JSON if file.suffix == ".json" else _TENSORS
    name, damage = draw.choice([*_BYTES.items(), *kinds.items(), *kinds.items()])
    return f"{file.name}: {name} {damage(file, draw) or ''}".rstrip()


def _truncated(file: Path, draw: random.Random) -> str:
    content = file.read_bytes()
    size = draw.randrange(len(content))
    file.write_bytes(content[:size])
    return f"to {size} of {len(content)} bytes"


def _flipped(file: Path, draw: random.Random) -> str:
    content = bytearray(file.read_bytes())
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    content[at] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {at}"


def _overwritten(file: Path, draw: random.Random) -> str:
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content))
    new = draw.randbytes(draw.randint(1, 64))
    content[at : at + len(new)] = new
    file.write_bytes(content)
    return f"{len(new)} bytes at {at}"


def _longer(file: Path, draw: random.Random) -> str:
    with file.open("ab") as handle:
        handle.write(draw.randbytes(draw.randint(1, 100)))
    return ""


def _gone(file: Path, draw: random.Random) -> str:
    file.unlink()
    return ""


def _folder(file: Path, draw: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return ""


def _other_file(file: Path, draw: random.Random) -> str:
    other = draw.choice(sorted(path for path in file.parent.iterdir() if path != file))
    shutil.copy(other, file)
    return f"is {other.name}"


_BYTES: dict[str, Callable[[Path, random.Random], str]] = {
    "truncated": _truncated,
    "flipped": _flipped,
    "overwritten": _overwritten,
    "longer": _longer,
    "gone": _gone,
    "a folder": _folder,
    "another file": _other_file,
}


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything within a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [path] if path else []
    for key, item in list(inside)[:400]:
        found += _places(item, (*path, key))
    return found


def _edit(value: Any, draw: random.Random) -> str:
    """Change something in a JSON value, in place."""
    places = _places(value)
    if not places:
        return "nothing"
    path = draw.choice(places)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    what = draw.choice(["junk", "junk", "junk", "gone", "renamed", "of another"])
    if what == "gone":
        del holder[path[-1]]
    elif what == "renamed" and isinstance(holder, dict):
        holder[f"{path[-1]}x"] = holder.pop(path[-1])
    elif what == "of another":
        other: Any = value
        for key in draw.choice(places):
            other = other[key]
        holder[path[-1]] = json.loads(json.dumps(other))
    else:
        holder[path[-1]] = draw.choice(JUNK)
    return f"{what} at {'.'.join(map(str, path))[:80]}"


def _edited(file: Path, draw: random.Random) -> str:
    value = json.loads(file.read_text())
    done = _edit(value, draw)
    file.write_text(json.dumps(value))
    return done


def _whole(file: Path, draw: random.Random) -> str:
    text = draw.choice(["", "null", "[]", "3", '"x"', "{", "{}", "[" * 100_000, '{"a": 1, "a": 2}', "\ufeff{}", "NaN"])
    file.write_text(text)
    return repr(text[:20])


def _deep(file: Path, draw: random.Random) -> str:
    value = json.loads(file.read_text())
    key = draw.choice(sorted(value))
    text = json.dumps({**value, key: "@"}).replace('"@"', "[" * 50_000 + "]" * 50_000)
    file.write_text(text)
    return f"at {key}"


_JSON = {"edited": _edited, "edited once": _edited, "edited anew": _edited, "whole": _whole, "deep": _deep}


def _header(file: Path, draw: random.Random) -> str:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    done = _edit(header, draw)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return done


def _length(file: Path, draw: random.Random) -> str:
    content = file.read_bytes()
    length = draw.choice([0, 1, 2**63, 2**64 - 1, 10**8, len(content)])
    file.write_bytes(length.to_bytes(8, "little") + content[8:])
    return str(length)


_TENSORS = {"header": _header, "another header": _header, "length": _length}

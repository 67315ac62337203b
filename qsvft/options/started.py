"""Whether this process is the command ``qsvft``, which imports torch when it has understood what it is asked for."""

from __future__ import annotations

import sys
from pathlib import PurePath

_NAMES = ("qsvft", "qsvft.exe", "qsvft-script.py")


def is_the_command() -> bool:
    """Whether ``qsvft ...`` or ``python -m qsvft ...`` was started, in place of a program that imports the package."""
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    if started == "-m":  # while the package is being imported, in order to be run
        words = sys.orig_argv
        return words[words.index("-m") + 1 :][:1] == ["qsvft"]
    return PurePath(started).name in _NAMES

"""Regular expressions in a config that would not end: tried in a process of their own, which can be ended.

``(\\w+)+x`` compares itself with a name in every way there is to cut the name up, and nothing in this process could
stop that. Most configs hold names, or a pattern with one repeat, and are not tried.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

from .config import QSVFTConfig

SECONDS = 10
"""How long a pattern may take to be compared with the names of all modules, the start of a process included."""

_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}")
_TRY = "import json, re, sys; text, names = json.load(sys.stdin); [re.match(text, name) for name in names]"


def check_patterns(config: QSVFTConfig, names: Sequence[str]) -> None:
    """Refuse a pattern that is none, or that takes longer than :data:`SECONDS`.

    Args:
        config: the adapter's config.
        names: of the model's modules.

    Raises:
        ValueError: naming the field and the pattern.
    """
    for field, text, whole in _patterns(config):
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{field}: {text!r:.80} is no regular expression ({error}); expected one") from error
        if len(_REPEAT.findall(text)) > 1 and not _ends(whole, names):
            raise ValueError(
                f"{field}: {text!r:.80} takes more than {SECONDS} s to be compared with the names of the model's "
                f"{len(names)} modules; expected names, or a regular expression whose repeats do not lie in one another"
            )


def _patterns(config: QSVFTConfig) -> Iterator[tuple[str, str, str]]:
    """Each with its field, and as PEFT compares it."""
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field)
        if isinstance(value, str):
            yield field, value, rf"(?:{value})\Z"
    for key in config.rank_pattern:
        yield "rank_pattern", key, rf"(.*\.)?({key})$"
    for text in [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or ():
        yield "layers_pattern", text, rf".*\.{text}\.(\d+)\."
    for text in config.modules_to_save or ():
        yield "modules_to_save", text, rf"(.*\.)?({text})$"


def _ends(text: str, names: Sequence[str]) -> bool:
    """Whether a pattern is done with all names in time."""
    command = [sys.executable, "-I", "-S", "-c", _TRY]
    try:
        subprocess.run(command, input=json.dumps([text, names]).encode(), timeout=SECONDS, stderr=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False
    except OSError:  # no interpreter of its own, as in a program that embeds Python
        pass
    return True

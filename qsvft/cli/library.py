"""The library, imported when a command has understood what it is asked for; and third parties' notes kept out of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def library() -> Iterator[None]:
    """Import torch and the rest, seconds of work; no warnings, and of transformers' log only errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils import logging as messages

        from .. import public as public  # which registers the method

        # A hub that cannot be reached is said once, in one line, not at each retry.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        before = messages.get_verbosity()
        messages.set_verbosity_error()
        try:
            yield
        finally:
            messages.set_verbosity(before)

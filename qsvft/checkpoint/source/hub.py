"""A checkpoint's files from the hub, or from its cache: what preparing needs, and no weights beside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError

SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Config, index, tokenizer and templates."""


@dataclass(frozen=True)
class Repository:
    """A model on the hub.

    Attributes:
        name: its id.
        revision: branch, tag or commit; None is the main branch.
        cache_dir: where its files are kept; None is the hub's own place.
        token: for the hub.
        local_files_only: take what the cache has, without asking the hub.
    """

    name: str
    revision: str | None
    cache_dir: str | os.PathLike[str] | None
    token: str | bool | None = field(repr=False)
    local_files_only: bool

    def fetch(self, patterns: Sequence[str]) -> Path:
        """Download files whose names match, where the cache does not have them.

        Returns:
            The folder of the revision's files.

        Raises:
            OSError: no such path and no such model, or the hub cannot be reached; the message names the id.
        """
        try:
            folder = snapshot_download(
                self.name,
                revision=self.revision,
                cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
                token=self.token,
                # Some versions ask the hub for a commit even where that cannot be.
                local_files_only=self.local_files_only or constants.HF_HUB_OFFLINE,
                allow_patterns=list(patterns),
            )
        except HFValidationError as error:
            raise FileNotFoundError(
                f"{self.name}: found no such file or directory, and it is no model's id on the hub either. Expected a "
                "directory with config.json and model.safetensors, a .safetensors file, or an id like 'name/model'."
            ) from error
        except Exception as error:  # the hub's client raises its own errors, its HTTP library's and the system's
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            at = "" if self.revision is None else f" at revision {self.revision!r}"
            raise OSError(
                f"{self.name}: found no such file or directory, and the hub does not give a model of this id{at} "
                f"({reason}). Check the id; to work offline, download it before (hf download) or name a local "
                "directory; a gated model needs its licence accepted and a token."
            ) from error
        return Path(folder)

    def pinned(self, folder: Path) -> Repository:
        """The repository at the commit that a folder is of, so that more of it comes from the same one."""
        return replace(self, revision=folder.name)

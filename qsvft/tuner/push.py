"""``push_to_hub`` of our adapters: with the card that the adapter has, where transformers would write an empty one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel

from .card import CARD, tag_card
from .config import QSVFTConfig


def with_its_card(push: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftModel.push_to_hub``; a card that is on the hub already stays, and gets the tag of the method."""

    @functools.wraps(push)
    def push_to_hub(self: PeftModel, repo_id: str, **options: Any) -> Any:
        if not all(isinstance(config, QSVFTConfig) for config in self.peft_config.values()):
            return push(self, repo_id, **options)
        api, private = HfApi(token=options.pop("token", None)), options.pop("private", None)
        sent = {name: options.pop(name) for name in ("commit_description", "revision", "create_pr") if name in options}
        tags = options.pop("tags", None)
        message = options.pop("commit_message", None) or "An SVFT adapter, by qsvft"
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            try:
                there = api.hf_hub_download(repo_id, CARD)
                Path(folder, CARD).write_bytes(Path(there).read_bytes())
            except EntryNotFoundError:
                pass
            self.save_pretrained(folder, **options)
            if tags:
                tag_card(Path(folder), tags)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, **sent)

    return push_to_hub

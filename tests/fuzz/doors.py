"""The doors through which files come in, and what comes out: the same from the same files, however often."""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from small_models import load, logits, randomize, save_llama

import qsvft
from qsvft.storage.digests import tensor_bytes

SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "vocab_size": 96}


@dataclass(frozen=True)
class Door:
    """A kind of folder that is read.

    Attributes:
        folder: a whole one.
        read: what comes of a folder, as a digest.
        bound: whether its own digests bind every value, so that nothing else may ever come of it.
    """

    folder: Path
    read: Callable[[Path], str]
    bound: bool

    def outcome(self, folder: Path) -> str | None:
        """What comes of a damaged folder.

        Returns:
            None: what always came, or an error that says which file or field is meant. Otherwise what is wrong.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self.read(folder)
        except (ValueError, OSError) as error:
            return None if _says_where(error, folder) else f"says not where: {type(error).__name__}: {error}"[:600]
        except Exception as error:  # what nobody foresaw
            return f"raw {type(error).__name__}: {error}"[:600]
        return "comes out otherwise without a word" if self.bound and found != self.read(self.folder) else None


_WHERE = re.compile(
    r"\.json|\.safetensors|quantization_config|QSVFTConfig\.|layers\.\d|lm_head|embed_tokens|norm\b"
    r"|modules?\b|adapter|task type",
    re.I,
)


def _says_where(error: BaseException, folder: Path) -> bool:
    return str(folder) in str(error) or bool(_WHERE.search(str(error)))


def doors(place: Path) -> dict[str, Door]:
    """All of them, with whole folders made in a place."""
    source = save_llama(place / "source", **SMALL)
    prepared = qsvft.prepare_checkpoint(source, place / "prepared", progress=False, dtype="bfloat16", rank=8)
    trained = randomize(qsvft.prepare(load(source), bits=16, progress=False, rank=8, include_factors=True))
    trained.save_pretrained(place / "adapter")
    return {
        "prepared": Door(prepared, _prepared, True),
        "adapter": Door(place / "adapter", lambda folder: _adapter(load(source), folder), True),
        "checkpoint": Door(source, lambda folder: _checkpoint(folder, place / "made"), False),
    }


def _prepared(folder: Path) -> str:
    model = qsvft.from_pretrained(folder, verify=True, progress=False)
    return _digest({**model.state_dict(), "logits": logits(model)})


def _adapter(base: Any, folder: Path) -> str:
    model = PeftModel.from_pretrained(base, str(folder))
    held = {name: value for name, value in model.named_parameters() if "qsvft_M" in name}
    return _digest({**held, "logits": logits(model)})


def _checkpoint(folder: Path, target: Path) -> str:
    shutil.rmtree(target, ignore_errors=True)
    qsvft.prepare_checkpoint(folder, target, progress=False, dtype="bfloat16", rank=4)
    return ""


def _digest(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if isinstance(value, torch.Tensor):
            digest.update(name.encode() + bytes(tensor_bytes(value)))
    return digest.hexdigest()

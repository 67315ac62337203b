"""The doors through which files come in, and what comes out: the same from the same files, however often."""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from small_models import load, logits, randomize, save_llama
from transformers import MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

import qsvft
from qsvft.cli.main import app
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
        return "comes out otherwise without a word" if self.bound and found != self.expected else None

    @cached_property
    def expected(self) -> str:
        """What comes of the whole folder."""
        return self.read(self.folder)


@dataclass(frozen=True)
class Command:
    """A command that is given a folder: it ends with 0, or with 2 and one line.

    Attributes:
        folder: a whole one.
        arguments: of a folder.
    """

    folder: Path
    arguments: Callable[[Path], list[str]]

    def outcome(self, folder: Path) -> str | None:
        """As a door's."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = CliRunner().invoke(app, self.arguments(folder))
        said = done.stderr.strip().splitlines()
        if done.exit_code == 0 or (done.exit_code == 2 and len(said) == 1):
            return None
        return f"exit {done.exit_code}, {done.exception!r}, {len(said)} lines: {' / '.join(said[:3])}"[:600]


_WHERE = re.compile(
    r"\.json|\.safetensors|quantization_config|QSVFTConfig\.|layers\.\d|lm_head|embed_tokens|norm\b"
    r"|modules?\b|target_parameters|adapter|task type",
    re.I,
)


def _says_where(error: BaseException, folder: Path) -> bool:
    return str(folder) in str(error) or bool(_WHERE.search(str(error)))


def doors(place: Path) -> dict[str, Door | Command]:
    """All of them, with whole folders made in a place."""
    source = save_llama(place / "source", **SMALL)
    prepared = qsvft.prepare_checkpoint(source, place / "prepared", progress=False, dtype="bfloat16", rank=8)
    trained = randomize(qsvft.prepare(load(source), bits=16, progress=False, rank=8, include_factors=True))
    trained.save_pretrained(place / "adapter")
    experts = {"target_parameters": ["experts.gate_up_proj"], "target_modules": ["q_proj"], "rank": 8}
    mixture = qsvft.prepare_checkpoint(_mixture(place / "mixed"), place / "mixture", progress=False, **experts)
    return {
        "prepared": Door(prepared, _prepared, True),
        "mixture": Door(mixture, _prepared, True),
        "adapter": Door(place / "adapter", lambda folder: _adapter(load(source), folder), True),
        "checkpoint": Door(source, lambda folder: _checkpoint(folder, place / "made"), False),
        "info prepared": Command(prepared, lambda folder: ["info", str(folder), "--verify"]),
        "info adapter": Command(place / "adapter", lambda folder: ["info", str(folder), "--verify"]),
        "prepare": Command(source, lambda folder: ["prepare", str(folder), _new(place / "made"), "--rank", "4"]),
    }


def _mixture(folder: Path) -> Path:
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)).bfloat16().save_pretrained(folder)
    return folder


def _new(folder: Path) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    return str(folder)


def _prepared(folder: Path) -> str:
    model = qsvft.from_pretrained(folder, verify=True, progress=False)
    return _digest({**model.state_dict(), "logits": logits(model)})


def _adapter(base: Any, folder: Path) -> str:
    model = PeftModel.from_pretrained(base, str(folder))
    held = {name: value for name, value in model.named_parameters() if "qsvft_M" in name}
    return _digest({**held, "logits": logits(model)})


def _checkpoint(folder: Path, target: Path) -> str:
    qsvft.prepare_checkpoint(folder, _new(target), progress=False, dtype="bfloat16", rank=4)
    return ""


def _digest(tensors: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if isinstance(value, torch.Tensor):
            digest.update(name.encode() + bytes(tensor_bytes(value)))
    return digest.hexdigest()

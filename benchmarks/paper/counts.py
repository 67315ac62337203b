"""How many numbers each method trains, counted on models without values, beside what the paper says of them.

The head that sentences and images train besides is left out, as in the paper. How the base is held, and where U and V
come from, changes no count, so that all are counted on a dense base with singular vectors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest.mock import patch

import peft
import torch
from peft.tuners.boft import layer as boft
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from qsvft.storage.shapes_only import shapes_only

from .experiment import OURS, WHOLE, Experiment, Method, read_experiment
from .shapes import config_of_shapes
from .ways import config_of, is_head, known_notices, trains_whole

_KINDS: dict[str, tuple[Any, str | None]] = {
    "language": (AutoModelForCausalLM, "CAUSAL_LM"),
    "sentences": (AutoModelForSequenceClassification, "SEQ_CLS"),
    "images": (AutoModelForImageClassification, None),
}
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}
_WRITTEN = re.compile(r"(\d+(?:\.(\d+))?)([KMB])")
_FROM_ELSEWHERE = ("basis", "residual", "decomposition")


def counted(experiment: Experiment, method: Method, layers: int | None = None) -> int:
    """The numbers that a method trains of an experiment's model, its fresh head left out.

    The layers of a model are alike, so that two models are built, of one layer and of two, and each further layer adds
    their difference. BOFT is counted with the butterfly factor that it asks for; where its CUDA extension cannot be
    compiled, PEFT trains with a factor of 1, and so fewer.

    Args:
        layers: build so many, and count those alone.

    Raises:
        ValueError: the experiment has no shapes, or the method's options are none of PEFT's.
    """
    config = shape(experiment)
    asked = experiment.kind, json.dumps(experiment.shapes), json.dumps([method.way, dict(method.options)])
    if layers is not None:
        return _of_layers(*asked, layers)
    one, two = (_of_layers(*asked, number) for number in (1, 2))
    return one + (config.num_hidden_layers - 1) * (two - one)


def shape(experiment: Experiment) -> PretrainedConfig:
    """The config of an experiment's model, without the hub.

    Raises:
        ValueError: the experiment has no shapes.
    """
    if experiment.shapes is None:
        raise ValueError(
            f"{experiment.name}: shapes: found none; expected a preset of qsvft profile, or a table with model_type"
        )
    return config_of_shapes(experiment.shapes)


@cache
def _of_layers(kind: str, shapes: str, method: str, layers: int) -> int:
    """Of a model of so many layers; many experiments ask the same, so that it is said in texts, and kept."""
    auto, task_type = _KINDS[kind]
    config = config_of_shapes(json.loads(shapes))
    config.num_hidden_layers = layers
    way, options = json.loads(method)
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    if way in WHOLE:
        return _trained(trains_whole(model, Method(way, way)))
    if way == OURS:
        options = {name: value for name, value in options.items() if name not in _FROM_ELSEWHERE}
    if kind == "images":
        options.setdefault("modules_to_save", ["classifier"])
    chosen = config_of(Method(way, way, options=options), task_type)
    with known_notices(), shapes_only(), _boft_without_values() if way == "BOFT" else nullcontext():
        return _trained(peft.get_peft_model(model, chosen))


def _trained(model: nn.Module) -> int:
    return sum(one.numel() for name, one in model.named_parameters() if one.requires_grad and not is_head(name))


@contextmanager
def _boft_without_values() -> Iterator[None]:
    """PEFT makes BOFT's permutations on the CPU, and wants a CUDA extension: neither matters to a count."""
    exchanged = {"perm2mat": _matrix, "block_butterfly_perm": _order}
    with ExitStack() as stack:
        stack.enter_context(torch.device("meta"))
        stack.enter_context(patch.multiple(boft.BOFTLayer, **exchanged))
        stack.enter_context(patch.object(boft, "get_fbd_cuda", lambda: True))
        yield


def _order(_: object, size: int, *__: int) -> Tensor:
    return torch.empty(size)


def _matrix(_: object, order: Tensor) -> Tensor:
    return torch.empty(2 * order.shape)


def as_written(count: int) -> str:
    """A count as the paper writes them: 2.5B, 26.2M, 0.63M, 24.6K."""
    if count >= 1e9:
        return f"{count / 1e9:.1f}B"
    if count >= 1e7:
        return f"{count / 1e6:.1f}M"
    return f"{count / 1e6:.2f}M" if count >= 1e5 else f"{count / 1e3:.1f}K"


def agrees(count: int, written: str) -> bool:
    """Whether a count, rounded to as many digits, is what the paper writes.

    Raises:
        ValueError: that is no number with K, M or B behind it.
    """
    found = _WRITTEN.fullmatch(written)
    if found is None:
        raise ValueError(f"trained: found {written!r}; expected a number such as 0.19M")
    digits = len(found[2] or "")
    return f"{count / _UNITS[found[3]]:.{digits}f}" == found[1]


def table(names: Iterable[str]) -> Table:
    """What is counted here and in the paper, a row for each method of these experiments."""
    found = Table("experiment", "method", "ours", "paper's", "why they differ")
    for name in names:
        experiment = read_experiment(name)
        for method in experiment.methods.values():
            ours = f"{counted(experiment, method):,}"
            found.add_row(name, method.name, ours, str(method.paper.get("trained", "")), method.counts or "")
    return found

"""Every method that is compared, each through its own package, on the same base.

A method makes a trainable model of the base. Its options stand in its lines, so that a run with others is another run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import peft
import torch
from base import BF16, NF4
from peft import LoraConfig, get_peft_model
from sweep import rate_at
from torch import Tensor, nn
from tried import tried

import qsvft


class Task(Protocol):
    """What is trained on, and how well: see language.py and sentences.py."""

    name: str
    kind: str

    def load(self, held: str, seed: int) -> nn.Module: ...
    def batches(self, seed: int, steps: int, size: int) -> list[dict[str, Tensor]]: ...
    def rates(self, trained: Sequence[tuple[str, nn.Parameter]], rate: float) -> list[float]: ...
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor: ...
    def own_batches(self) -> list[dict[str, Tensor]]: ...
    def evaluate(self, model: nn.Module) -> dict[str, float]: ...


@dataclass(frozen=True)
class Setting:
    """What a method may look at.

    Attributes:
        task: what is trained on.
        seed: of the run.
        held: how the base is held.
        calibration: the first batches that it will train on.
    """

    task: Task
    seed: int
    held: str
    calibration: Sequence[Any]


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        name: as tables call it.
        package: whose code does it.
        start: the learning rate at which its sweep begins.
        options: what tells it apart.
        build: makes the model.
        counted: what ``qsvft.profile`` calls the same setting on an NF4 base, where it knows it.
    """

    name: str
    package: str
    start: float
    options: dict[str, Any]
    build: Callable[[nn.Module, dict[str, Any], Setting], nn.Module] = field(compare=False)
    counted: str | None = None

    def make(self, base: nn.Module, setting: Setting) -> nn.Module:
        """The model to train, of a frozen base."""
        return self.build(base, self.options, setting)


SEEN = "calibrated_on"
"""Directions from data may come from texts that the model wrote itself, in place of the first batches."""


def _ours(base: nn.Module, options: dict[str, Any], setting: Setting) -> nn.Module:
    # A base in 4 bits stays what it is; bits=16 leaves a dense one as it is.
    bits = 4 if setting.held == NF4 else 16
    if options["basis"] == "data":
        fields = {name: value for name, value in options.items() if name != SEEN}
        # The task says which head is fresh, and trains whole.
        config, loss = qsvft.QSVFTConfig(task_type=setting.task.kind, **fields), setting.task.loss
        batches = setting.task.own_batches() if SEEN in options else setting.calibration
        weights = setting.task.load(BF16, setting.seed).named_parameters() if config.residual else ()
        named = ((name.removesuffix(".weight"), weight) for name, weight in weights)
        qsvft.calibrate(base, config, batches, loss, named if config.residual else None)
        return get_peft_model(base, qsvft.QSVFTConfig(task_type=setting.task.kind, **fields))
    return qsvft.prepare(base, bits=bits, gradient_checkpointing=False, progress=False, **options)


def _full(base: nn.Module, options: dict[str, Any], setting: Setting) -> nn.Module:
    return base.float().requires_grad_(True)


def _peft(base: nn.Module, options: dict[str, Any], setting: Setting) -> nn.Module:
    fields = dict(options)
    config = getattr(peft, fields.pop("config"))
    with warnings.catch_warnings():
        # BOFT says that its CUDA extension could not be compiled.
        warnings.filterwarnings("ignore", category=UserWarning, module="peft.tuners.boft")
        return get_peft_model(base, config(target_modules="all-linear", task_type=setting.task.kind, **fields))


def _loftq(base: nn.Module, options: dict[str, Any], setting: Setting) -> nn.Module:
    """LoRA that starts at the leading singular directions of what NF4 lost, as one round of LoftQ does."""
    unrounded = setting.task.load(BF16, setting.seed)
    fields = {"r": options["r"], "lora_alpha": options["r"], "lora_dropout": 0.0}
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type=setting.task.kind, **fields))
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            lost = unrounded.get_submodule(name).weight.float() - layer.weight.float()
            U, s, Vt = torch.linalg.svd(lost, full_matrices=False)
            root = s[: options["r"]].sqrt()
            layer.lora_A["default"].weight.data.copy_(root.unsqueeze(1) * Vt[: options["r"]])
            layer.lora_B["default"].weight.data.copy_(U[:, : options["r"]] * root)
    return model


def _eva(base: nn.Module, options: dict[str, Any], setting: Setting) -> nn.Module:
    """LoRA whose A begins at the leading directions of each layer's inputs on the first batches: PEFT's EVA."""
    fields = {"r": options["r"], "lora_alpha": options["r"], "lora_dropout": 0.0, "init_lora_weights": "eva"}
    chosen = {"eva_config": peft.EvaConfig(rho=options["rho"]), "task_type": setting.task.kind}
    config = LoraConfig(target_modules="all-linear", **fields, **chosen)
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(model, dataloader=list(setting.calibration), show_progress_bar=False)
    return model


def _authors(base: nn.Module, options: dict[str, Any], setting: Setting) -> nn.Module:
    """The authors' code: U (S + M) Vᵀ rebuilt in every forward; with their gate M is sigmoid(gate) * F, F not zero."""
    for name, layer in list(base.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not base.get_output_embeddings():
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, _Rebuilt(layer, options["off_diagonals"], options["gate"]))
    return base


class _Rebuilt(nn.Module):
    def __init__(self, layer: nn.Linear, off_diagonals: int, gated: bool) -> None:
        super().__init__()
        dtype = layer.weight.dtype
        U, s, Vt = torch.linalg.svd(layer.weight.float(), full_matrices=False)
        index = torch.arange(s.numel(), device=s.device)
        inside = (index.unsqueeze(1) - index).abs() <= off_diagonals
        self.U, self.s, self.Vt = U.to(dtype), s, Vt.to(dtype)
        self.rows, self.columns = inside.nonzero(as_tuple=True)
        self.bias = layer.bias
        self.F = nn.Parameter(s.new_zeros(self.rows.numel()))
        self.gate = nn.Parameter(s.new_zeros(1)) if gated else None
        if gated:
            nn.init.kaiming_normal_(self.F.data.unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        M = self.F if self.gate is None else self.F * torch.sigmoid(self.gate)
        inner = torch.diag(self.s).index_put((self.rows, self.columns), M, accumulate=True)
        return nn.functional.linear(x, self.U @ inner.to(self.U.dtype) @ self.Vt, self.bias)


def ours(name: str, start: float = 2e-3, **options: Any) -> Method:
    """qsvft; what tells forms apart is said here, never left to the library's default.

    A sweep begins at ``start`` times the root of the entries in a row of M. Earlier ones, when alpha did not count
    those, began at ``start``: the same step, and the rates of their runs stand in the results as they are now.
    """
    said = {"sides": "one", "factor_bits": 16, "basis": "singular"}
    fields = {**said, "off_diagonals": 8, "pattern": "banded", **options}
    written = ",".join(f"{name}={str(value).lower()}" for name, value in fields.items() if name != SEEN)
    counted = None if "rank_pattern" in fields else f"qsvft:{written}"  # no text says several ranks
    per_row = {"plain": 1, "dense": fields.get("rank")}.get(fields["pattern"], 2 * fields["off_diagonals"] + 1)
    return Method(name, "qsvft", rate_at(start * per_row**0.5, 0), fields, _ours, counted)


def dense(name: str, rank: int, basis: str, start: float, **options: Any) -> Method:
    """qsvft with a dense small M between two factors."""
    fields = {"sides": "both", "pattern": "dense", "rank": rank, "basis": basis, **options}
    return ours(f"{name}, dense k={rank}", start, **fields)


def rival(name: str, start: float, config: str, counted: str | None = None, **options: Any) -> Method:
    """PEFT's."""
    return Method(name, "peft", start, {"config": config, **options}, _peft, counted)


def lora(rank: int, start: float, name: str = "LoRA", **options: Any) -> Method:
    """LoRA with alpha = r, so that its scale is 1."""
    fields = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, **options}
    counted = None if fields.get("use_dora") else f"qlora:rank={rank},chunked_loss=true"
    return rival(f"{name} r={rank}", start, LoraConfig.__name__, counted, **fields)


def form(name: str, U: str, V: str, k: int, start: float = 1e-3, **options: Any) -> Method:
    """A form of tried.py."""
    dense = not {U, V} & {"whole"} and "off_diagonals" not in options and options.get("entries") is None and k
    counted = f"qsvft:sides=both,pattern=dense,rank={k}" if dense else None
    return Method(name, "tried", start, {"U": U, "V": V, "k": k, **options}, tried, counted)


AS_LORA_8 = {"[qo]_proj": 96, "[kv]_proj": 78}
"""With 130 in the others: as many entries of M as LoRA of rank 8 has numbers, in SmolLM2's layers."""

METHODS = {
    method.name: method
    for method in (
        Method("full fine-tuning", "torch", 1e-4, {}, _full),
        lora(8, 4e-3),
        lora(16, 4e-3),
        lora(2, 8e-3),
        Method("LoRA r=16, LoftQ's", "peft", 4e-3, {"r": 16, "start": "svd of W - NF4(W)"}, _loftq),
        *(Method(f"LoRA r={r}, EVA's", "peft", 4e-3, {"r": r, "rho": 1.0}, _eva) for r in (8, 16)),
        lora(8, 4e-3, "rsLoRA", use_rslora=True, lora_alpha=math.isqrt(8)),
        lora(8, 4e-3, "DoRA", use_dora=True),
        rival("BOFT b=4", 4e-3, "BOFTConfig", boft_block_size=4),
        rival("VeRA r=256", 8e-3, "VeraConfig", r=256),
        rival("FRoD", 4e-3, "FrodConfig", progressbar=False),
        rival("PSOFT r=96, free", 4e-3, "PsoftConfig", r=96, psoft_alpha=96, psoft_orth=False),
        rival("LoRA-XS (TinyLoRA) r=96", 4e-3, "TinyLoraConfig", r=96),
        Method("authors' SVFT d=8", "torch", 8e-3, {"off_diagonals": 8, "gate": False}, _authors, "svft"),
        ours("two-sided d=8 (the paper's)", sides="both"),
        ours("two-sided int8 d=8", sides="both", factor_bits=8),
        ours("two-sided NF4 d=8", sides="both", factor_bits=4),
        ours("one-sided int8 d=8", factor_bits=8),
        ours("one-sided NF4 d=8", factor_bits=4),
        ours("one-sided NF4, rank 96, d=8", factor_bits=4, rank=96),
        ours("one-sided NF4, rank 96, d=32", factor_bits=4, rank=96, off_diagonals=32),
        ours("one-sided d=8"),
        *(dense("data", rank, "data", 2e-3) for rank in (32, 56, 64, 96, 128, 192)),
        dense("data", 130, "data", 2e-3, rank_pattern=AS_LORA_8),
        *(
            dense(f"data {held}, given back", rank, "data", 2e-3, factor_bits=bits, residual=True)
            for held, bits, rank in (
                *(("int8", 8, rank) for rank in (32, 56, 64, 96, 128, 192)),
                ("bf16", 16, 128),
                ("NF4", 4, 128),
            )
        ),
        dense(
            "data int8, from own texts, given back",
            128,
            "data",
            2e-3,
            factor_bits=8,
            residual=True,
            calibrated_on="own",
        ),
        *(dense("singular", rank, "singular", 4e-3) for rank in (64, 96, 128)),
        dense("singular int8", 128, "singular", 4e-3, factor_bits=8),
        ours("one-sided, plain", 8e-3, pattern="plain"),
        ours("two-sided, plain", 8e-3, sides="both", pattern="plain"),
        *(ours(f"two-sided d={d}", 4e-3, sides="both", off_diagonals=d) for d in (2, 32)),
        *(ours(f"two-sided {name}, as many as d=8", 4e-3, sides="both", pattern=name) for name in ("random", "top_k")),
        *(dense(f"data {held}", 128, "data", 2e-3, factor_bits=bits) for held, bits in (("int8", 8), ("NF4", 4))),
        form("tried: gradient, dense k=96", "gradient", "gradient", 96),
        form("tried: gradient, dense, as LoRA r=8", "gradient", "gradient", 0, as_lora=8),
        form("tried: gradient turned, dense k=96", "gradient", "gradient", 96, turned=True),
        form("tried: input/output, dense k=96", "output", "input", 96),
        *(
            form(f"tried: input/output, whitened by {p}, dense k=96", "output", "input", 96, 2e-3, whitened=p)
            for p in (0.5, 0.0)
        ),
        form("tried: one-sided input, dense k=96", "through", "input", 96, 4e-3, whitened=0.0),
        form("tried: from the error, dense k=96", "output", "input", 96, 4e-3, whitened=0.0, m_from="error"),
        form("tried: corrected, dense k=96", "output", "input", 96, 2e-3, whitened=0.0, corrected=True),
        form("tried: input/output, dense k=192", "output", "input", 192),
        form("tried: input/output, dense, as LoRA r=8", "output", "input", 0, as_lora=8),
        form("tried: input/output, entries by gradient", "output", "input", 10**9, entries="gradient", per_row=16),
        form("tried: singular, dense k=192", "svd", "svd", 192, 2e-3),
        form("tried: singular, dense k=96", "svd", "svd", 96, 2e-3),
        form("tried: random, dense k=96", "random", "random", 96, 2e-3),
        form("tried: whole/input k=16", "whole", "input", 16, 2e-3),
        form("tried: whole/gradient k=16", "whole", "gradient", 16, 2e-3),
        form("tried: whole/random k=16", "whole", "random", 16),
        form("tried: gradient/whole k=16", "gradient", "whole", 16),
        form("tried: singular/whole k=16", "svd", "whole", 16),
        form("tried: singular, plain", "svd", "svd", 10**9, 2e-3, off_diagonals=0),
        form("tried: singular, d=2", "svd", "svd", 10**9, 2e-3, off_diagonals=2),
        form("tried: singular, d=8", "svd", "svd", 10**9, 2e-3, off_diagonals=8),
        form("tried: singular, d=32", "svd", "svd", 10**9, 2e-3, off_diagonals=32),
        form("tried: singular, dense k=32", "svd", "svd", 32, 2e-3),
        form("tried: gradient, dense k=32", "gradient", "gradient", 32, 1e-3),
        form("tried: random, d=8", "random", "random", 10**9, 2e-3, off_diagonals=8),
        form("tried: singular, entries by gradient", "svd", "svd", 10**9, entries="gradient", per_row=17),
        Method("authors' SVFT d=8, gate", "torch", 8e-3, {"off_diagonals": 8, "gate": True}, _authors),
    )
}

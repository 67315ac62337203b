"""Every kind of base that an adapter is tried on, and what the table in docs/bases.md says of it.

    python tests/quantised_bases.py    writes the table anew

``tests/tuner/test_bases.py`` tests each cell: the columns are its tests, by their names. A row whose library changes
more than itself is skipped by ``make test``, and run by ``make bases``, which has an environment for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import load
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

PAGE = Path(__file__).resolve().parents[1] / "docs" / "bases.md"
BEGIN, END = "<!-- written by tests/quantised_bases.py -->\n", "<!-- up to here -->\n"
COLUMNS = {
    "train": "test_it_trains_as_a_dense_model_of_the_same_weights",
    "save and reload": "test_a_saved_adapter_on_the_same_base_gives_the_same_bits",
    "merge": "test_merged_it_is_a_plain_checkpoint_that_computes_the_same",
    "how its weight is read": "test_its_weight_is_what_it_multiplies_with",
}

OWN, GIVEN = "its own gradient", "gradient given here"
CODES, ROWS = "bitsandbytes' `dequantize_4bit`", "int8 rows times their scales"
DEQUANTIZED, ANSWERS = "its own `dequantize()`", "its answer to the identity"
Make = Callable[[Path], Any]


@dataclass(frozen=True)
class Base:
    """A row of the table.

    Attributes:
        name: what holds the weights.
        made: models with such a base, of a folder with a checkpoint, by the name of the variant.
        gradient: whether the library's kernel gives it.
        read: how the dense weight is found.
        error: of its products, relative to those of its dense weight, at most.
        refused: what the refusal says, of a base that cannot be used.
        apart: whether its library is in the environment of ``make bases`` alone.
    """

    name: str
    made: Mapping[str, Make]
    gradient: str = OWN
    read: str = DEQUANTIZED
    error: float = 0.01
    refused: str = ""
    apart: bool = False

    def cells(self) -> tuple[str, ...]:
        """What the table says, column by column."""
        runs = "`make bases`" if self.apart else "`make test`"
        if self.refused:
            return *("refused by name" for _ in COLUMNS), runs
        return self.gradient, "same bits", "dense", self.read, runs


def _bitsandbytes(**options: Any) -> Make:
    return lambda folder: load(folder, quantization_config=BitsAndBytesConfig(**options))


def _nf4(storage: torch.dtype, kind: str = "nf4") -> Make:
    options = {"bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": torch.bfloat16}
    return _bitsandbytes(load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=storage, **options)


def _torchao(config: Callable[[Any], Any]) -> Make:
    def make(folder: Path) -> Any:
        quantization = _wanted("torchao.quantization")
        from transformers import TorchAoConfig

        return load(folder, quantization_config=TorchAoConfig(config(quantization)), device_map="cpu")

    return make


def _nvfp4(_: Any) -> Any:
    return _wanted("torchao.prototype.mx_formats").NVFP4WeightOnlyConfig()


def _mxfp8(_: Any) -> Any:
    return _wanted("torchao.prototype.mx_formats").MXDynamicActivationMXWeightConfig()


def _int4_for_cpus(_: Any) -> Any:
    return _wanted("torchao.prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group_size=32)


def _unpack(codes: Tensor, bits: int) -> Tensor:
    """What quanto packed: the lowest bits of each byte come first."""
    return torch.cat([(codes >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)])


def _quanto(weights: str, activations: str | None = None) -> Make:
    def make(folder: Path) -> Any:
        quanto = import_module("optimum.quanto")
        # For codes of less than a byte it would compile a function of C++, for 40 s.
        import_module("optimum.quanto.library.extensions.cpp").ext._lib = SimpleNamespace(unpack=_unpack)
        model = load(folder)
        kinds = {"weights": getattr(quanto, weights), "activations": activations and getattr(quanto, activations)}
        quanto.quantize(model, **kinds, exclude="lm_head")
        quanto.freeze(model)
        return model

    return make


def _hqq(bits: int) -> Make:
    def layer(linear: nn.Linear) -> nn.Module:
        hqq = _wanted("hqq.core.quantize")
        config = hqq.BaseQuantizeConfig(nbits=bits, group_size=32)
        return hqq.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")

    return _with_layers(layer)


def _gptq(linear: nn.Linear) -> nn.Module:
    kind = _wanted("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    return _filled(kind, linear, sym=True)


def _awq(linear: nn.Linear) -> nn.Module:
    kind = _wanted("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear
    return _filled(kind, linear, sym=False, register_buffers=True)


def _filled(kind: Any, linear: nn.Linear, **options: Any) -> nn.Module:
    """A layer of 4 bits in groups of 32 with drawn codes: a weight about as large as the model's own."""
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
    layer = kind(bits=4, group_size=32, desc_act=False, bias=False, **sizes, **options)
    layer.qweight.copy_(torch.randint(-(2**31), 2**31 - 1, layer.qweight.shape).int())
    layer.qzeros.fill_(0x77777777)
    layer.scales.uniform_(0.03, 0.05)
    layer.post_init()
    return layer


class PackedTensor(Tensor):
    """A weight as torchao holds it: codes and scales in a class that knows ``F.linear`` and ``dequantize``, no more."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> PackedTensor:
        """Without memory of its own."""
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    def dequantize(self) -> Tensor:
        """The dense weight."""
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.dequantize(), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"PackedTensor dispatch: attempting to run unimplemented {func}")


def in_a_tensor(linear: nn.Linear) -> nn.Linear:
    """The layer itself with its weight in a :class:`PackedTensor`."""
    packed = PackedLinear(linear)
    linear.weight = nn.Parameter(PackedTensor(packed.codes, packed.scale), requires_grad=False)
    return linear


class PackedLinear(nn.Module):
    """A layer of a library that nobody knows: codes and a scale for each row, and a forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias

    def hidden(self) -> Tensor:
        """The weight, which no attribute tells."""
        return self.codes.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.hidden(), self.bias)


class InferenceLinear(PackedLinear):
    """The same with a kernel for inference: no gradient, and nothing said of it."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class RoundsToIntegers(PackedLinear):
    """The same, of which the activations are rounded on a scale that nobody measured."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.round())


def _with_layers(layer: Callable[[nn.Linear], nn.Module]) -> Make:
    """A model whose linear layers, but for the head, are replaced."""

    def make(folder: Path) -> Any:
        torch.manual_seed(0)
        model = load(folder).requires_grad_(False)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                model.set_submodule(name, layer(module))
        return model

    return make


def _wanted(module: str) -> Any:
    """A module that ``make bases`` installs."""
    return pytest.importorskip(module, reason=f"{module} is installed by make bases", exc_type=ImportError)


BASES = (
    Base(
        "bitsandbytes NF4, its bytes in any storage type",
        {str(dtype): _nf4(dtype) for dtype in (torch.uint8, torch.bfloat16, torch.float16, torch.float32)},
        read=CODES,
    ),
    Base("bitsandbytes FP4", {"uint8": _nf4(torch.uint8, "fp4"), "bfloat16": _nf4(torch.bfloat16, "fp4")}, read=CODES),
    Base("bitsandbytes int8", {"": _bitsandbytes(load_in_8bit=True)}, read=ROWS, error=0.02),
    Base(
        "torchao, weights in int8, fp8, NVFP4 or int4",
        {
            "int8": _torchao(lambda q: q.Int8WeightOnlyConfig()),
            "fp8": _torchao(lambda q: q.Float8WeightOnlyConfig()),
            "nvfp4": _torchao(_nvfp4),
            "int4": _torchao(lambda q: q.IntxWeightOnlyConfig(torch.int4, q.PerGroup(32))),
        },
        apart=True,
    ),
    Base(
        "torchao, activations in int8 as well",
        {
            "int8": _torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig()),
            "int4": _torchao(lambda q: q.Int8DynamicActivationIntxWeightConfig(torch.int4, q.PerGroup(32))),
        },
        gradient=GIVEN,
        error=0.02,
        apart=True,
    ),
    Base("torchao int4, packed for CPUs", {"": _torchao(_int4_for_cpus)}, gradient=GIVEN, read=ANSWERS, apart=True),
    Base("HQQ in 8, 4 or 2 bits", {str(bits): _hqq(bits) for bits in (8, 4, 2)}, apart=True),
    Base("quanto, weights in int8, int4 or fp8", {kind: _quanto(kind) for kind in ("qint8", "qint4", "qfloat8")}),
    Base("GPTQ (GPTQModel's torch layers)", {"": _with_layers(_gptq)}, read=ANSWERS, apart=True),
    Base("AWQ (GPTQModel's torch layers)", {"": _with_layers(_awq)}, read=ANSWERS, apart=True),
    Base("any other tensor class with `F.linear` and `dequantize()`", {"": _with_layers(in_a_tensor)}),
    Base(
        "any other layer with `in_features`, `out_features` and packed integers",
        {"": _with_layers(PackedLinear)},
        read=ANSWERS,
    ),
    Base(
        "the same with a kernel that gives no gradient",
        {"": _with_layers(InferenceLinear)},
        gradient=GIVEN,
        read=ANSWERS,
    ),
    Base(
        "activations rounded on a scale that was not calibrated",
        {"quanto": _quanto("qint8", "qint8"), "any": _with_layers(RoundsToIntegers)},
        refused=r"cannot adapt a \w+: f\(x \+ y\) - f\(x\) - f\(y\) \+ f\(0\) is .* exclude_modules",
    ),
    Base(
        "torchao MXFP8 on a CPU: its kernel is for cards",
        {"": _torchao(_mxfp8)},
        refused=r"cannot adapt a MXTensor: its forward raised ValueError: .* exclude_modules",
        apart=True,
    ),
)


def table() -> str:
    """The whole table in Markdown."""
    head = ("base", *COLUMNS, "tested by")
    rows = [head, ("---",) * len(head), *((base.name, *base.cells()) for base in BASES)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page_with(text: str) -> str:
    """The page with these rows in place of those that it has."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + table() + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

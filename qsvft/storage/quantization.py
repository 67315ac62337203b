"""The base weights: quantise them in place through bitsandbytes, and make them dense again.

``bits=4`` is NF4 with double quantisation (blocks of 64), ``bits=8`` bitsandbytes' LLM.int8, ``bits=16``
leaves the base as it is. Layers and flags are those of transformers' own bitsandbytes integration,
so that a model quantised here and one loaded in 4-bit by transformers are the same thing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from functools import partial
from typing import Any, NoReturn, cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm
from transformers.utils.quantization_config import QuantizationMethod

from ..options.choices import BASE_BITS
from .experts import expert_layers, is_split, join_experts, parameters_of_experts, split_experts
from .left_dense import report_dense, under
from .linear_layers import is_linear, read_directly
from .nf4 import empty_nf4_linear, nf4_parameter
from .packed import is_packed, note_dtype, packing
from .routers import routers
from .weights import HeldLinear, check_quant_state, check_weight, dense_dtype, dense_layer, dense_weight, weight_as_held

logger = logging.getLogger(__name__)


def quantize(
    model: nn.Module,
    bits: int = 4,
    skip_modules: list[str] | None = None,
    progress: bool = True,
    skip_layers: Collection[str] = (),
) -> nn.Module:
    """Quantise every linear layer of a model in place, one matrix at a time.

    Experts in parameters of three dimensions (Mixtral, Qwen-MoE, gpt-oss, DeepSeek) become linear layers first, see
    :func:`~qsvft.storage.experts.split_experts`. Left as they are: embeddings, the output head
    (``get_output_embeddings()``), linears that share their weight with an embedding, layers whose weight their parent
    reads itself, routers and gates with one output, modules that transformers keeps in fp32, and ``skip_modules``.
    Where what stays dense is much, a warning names it with its bytes.
    A model that is quantised already is returned unchanged if its bits agree.

    Args:
        model: any transformers model or ``nn.Module``, in fp32, bf16 or fp16.
        bits: 4 (NF4, double quantisation), 8 (int8) or 16 (nothing to do).
        skip_modules: names (or last parts of names) to leave as they are.
        progress: show a progress bar.
        skip_layers: whole names of linear layers to leave as they are.

    Returns:
        The same model.

    Raises:
        ValueError: bits not in (4, 8, 16); the model holds other bits already; no layer that can be quantised; a
            weight on the meta device, with NaN or Inf, or of an unsupported dtype.
    """
    if bits not in BASE_BITS:
        raise ValueError(f"bits must be 4 (NF4), 8 (int8) or 16 (base left as it is), got {bits!r}")
    if type(model) in (nn.Linear, Conv1D):
        raise ValueError(
            f"the model is a single {type(model).__name__}, which cannot be replaced in place; expected a module that "
            "contains linear layers, such as nn.Sequential(layer)"
        )
    held = held_bits(model)
    if held != 16:
        if bits not in (held, 16):
            raise ValueError(
                f"the model is already quantised to {held} bits; bits={bits} would quantise it twice. "
                f"Pass bits={held}, or load the model without quantization_config."
            )
        disable_cpu_repacking(model)
        _report_experts(model)
        return model
    if bits == 16:
        return model
    packed = next(((name, layer) for name, layer in model.named_modules() if is_packed(layer)), None)
    if packed is not None:
        raise ValueError(
            f"{packed[0]}: the model is quantised already, found {packing(packed[1])}; bits={bits} would quantise it "
            "twice. Pass bits=16, which leaves the base as it is, or load the model without quantization_config."
        )

    split_experts(model, skip_modules or ())
    targets, skipped = partition_linears(model, skip_modules or [], skip_layers)
    report_dense(model, targets, [*(skip_modules or ()), *skip_layers], bits)
    dtypes: set[torch.dtype] = set()
    for name in targets:
        layer = model.get_submodule(name)
        check_weight(name, layer)
        dtypes.add(dense_dtype(layer))
    if not targets:  # all are left to whoever quantises residuals
        dtypes.update(dense_dtype(model.get_submodule(name)) for name in skipped)
    done: dict[int, nn.Parameter] = {}
    names = _all_names(model)
    for name in tqdm(targets, desc=f"quantising to {bits} bits", unit="matrix", disable=not progress):
        # Only the name is held: the dense weight is freed before the next one is quantised.
        _replace(model, names[name], _quantized_layer(model.get_submodule(name), bits, done))
    disable_cpu_repacking(model)
    if isinstance(model, PreTrainedModel):
        set_flags(model, bits, dtypes.pop() if len(dtypes) == 1 else torch.bfloat16, skipped)
    return model


def _report_experts(model: nn.Module) -> None:
    """Say that whoever quantised a model left its experts as they were."""
    apart = set(expert_layers(model).values())
    names = [name for name in parameters_of_experts(model) if name not in apart]
    if names:
        numbers = [model.get_parameter(name) for name in names]
        logger.warning(
            "%s: its experts stay dense, %.2f GiB in %d parameters such as %s, which bitsandbytes' 4 and 8 bits leave "
            "as they are. Load it in bf16 and give it to qsvft.prepare(), which quantises them.",
            *(type(model).__name__, sum(p.numel() * p.element_size() for p in numbers) / 2**30, len(names), names[0]),
        )


def held_bits(model: nn.Module) -> int:
    """4 or 8 if the model has bitsandbytes linears, else 16."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            return 4
        if isinstance(module, bnb.nn.Linear8bitLt):
            return 8
    return 16


def disable_cpu_repacking(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place in eval forwards on AVX512-BF16 CPUs.

    Repacked weights dequantise to garbage, cut the gradient to x silently and save lossily, so every
    4-bit layer of the model is switched, adapted or not. One that is packed already is refused.
    """
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                check_quant_state(name, module)
            module.support_avx512bf16_for_cpu = False


def dequantize(model: nn.Module) -> nn.Module:
    """Replace every linear layer that is quantised by a plain dense one, put experts together and clear the flags."""
    note_dtype(model)
    names = _all_names(model)
    done: dict[int, nn.Parameter] = {}
    held: tuple[str, ...] = ()  # what such a layer is made of goes with it
    for name, module in list(model.named_modules()):
        if isinstance(module, HeldLinear):
            held = (*held, f"{name}.")
            _replace(model, names[name], dense_layer(module, module.dense_weight()))
        elif is_packed(module):
            _replace(model, names[name], dense_layer(module, weight_as_held(module)))
        elif isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) and not name.startswith(held):
            weight = dense_weight(module)
            assert weight is not None
            new: Any = dense_layer(module, weight)
            new.weight = done.setdefault(module.weight.data_ptr(), new.weight)
            _replace(model, names[name], new)
    join_experts(model)
    _clear_flags(model)
    return model


def partition_linears(
    model: nn.Module, skip: list[str], skip_layers: Collection[str] = ()
) -> tuple[list[str], list[str]]:
    """Names of the linears to quantise, and of those to leave as they are."""
    keep_fp32 = getattr(model, "_keep_in_fp32_modules", None) or []
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    targets: list[str] = []
    skipped: list[str] = []
    left = {*skip_layers, *read_directly(model), *routers(model)}
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        left_alone = module is head or id(module.weight) in embeddings or under(name, [*keep_fp32, *skip])
        left_alone = left_alone or name in left
        (skipped if left_alone else targets).append(name)
    return targets, skipped


def _all_names(model: nn.Module) -> dict[str, list[str]]:
    """Every name of a module, by its first one: a module may stand in several places."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(name)
    return {names[0]: names for names in found.values()}


def _replace(model: nn.Module, names: list[str], new: nn.Module) -> None:
    for name in names:
        model.set_submodule(name, new)


def _quantized_layer(layer: Any, bits: int, done: dict[int, nn.Parameter]) -> nn.Module:
    weight: nn.Parameter = layer.weight
    conv = isinstance(layer, Conv1D)
    n, m = weight.shape if conv else weight.shape[::-1]
    if bits == 4:
        new: Any = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    else:
        new = bnb.nn.Linear8bitLt(n, m, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
    if id(weight) not in done:  # a weight that two layers share is quantised once and stays shared
        data = (weight.data.t() if conv else weight.data).contiguous()
        if bits == 4:
            quantized: Any = nf4_parameter(data)
        else:
            quantized = bnb.nn.Int8Params(data.cpu(), requires_grad=False).to(data.device)
        done[id(weight)] = quantized
    shared: Any = done[id(weight)]
    if bits == 4:
        new.weight, new.quant_state = shared, shared.quant_state
    else:
        # The bytes are shared, the parameter is not: its first forward moves CB and SCB into the layer.
        new.weight = bnb.nn.Int8Params(shared.data, requires_grad=False, CB=shared.CB, SCB=shared.SCB)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    new.source_cls = type(layer)
    new.qsvft_dtype = weight.dtype
    new.train(layer.training)
    return cast(nn.Module, new)


def nf4_linear(layer: nn.Module, weight: Tensor) -> nn.Module:
    """An NF4 layer with this (m, n) weight and the bias of a dense layer; without values on meta."""
    plain = dense_layer(layer, weight)
    return empty_nf4_linear(plain) if weight.is_meta else quantized_linear(plain, 4)


def quantized_linear(layer: nn.Module, bits: int) -> nn.Module:
    """A layer of 4 or 8 bits in place of a dense one, as :func:`quantize` makes it."""
    new: Any = _quantized_layer(layer, bits, {})
    if bits == 4:
        new.support_avx512bf16_for_cpu = False  # see disable_cpu_repacking
    return cast(nn.Module, new)


def linear_names(model: nn.Module) -> list[str]:
    """The dense linear layers of a model."""
    return [name for name, module in model.named_modules() if is_linear(module)]


def set_flags(model: PreTrainedModel, bits: int, dtype: torch.dtype, skipped: list[str]) -> None:
    from transformers.quantizers import AutoHfQuantizer

    if bits == 4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped or None,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped or None)
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    if any(is_split(module) for module in model.modules()):
        model.hf_quantizer.is_serializable = partial(_refuse_saving, type(model).__name__)
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.is_quantized = True
    setattr(model, f"is_loaded_in_{bits}bit", True)


def _refuse_saving(name: str, *_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        f"{name}: its experts are linear layers of their own, which transformers would not find again and would make "
        "up; expected a model that was prepared for an adapter. Use qsvft.prepare(model) in place of "
        "qsvft.quantize(model), or qsvft.prepare_checkpoint(source, target)."
    )


def _clear_flags(model: nn.Module) -> None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Without its list of conversions transformers saves a model by the names that its checkpoints have.
    flags = ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer")
    for flag in (*flags, "_weight_conversions"):
        if flag in model.__dict__:
            delattr(model, flag)

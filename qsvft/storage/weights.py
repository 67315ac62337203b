"""Reading the weight of a layer, however it holds it, and making a dense layer of it again."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .digests import tensor_bytes
from .nf4 import packed_weight, quant_state
from .packed import check_product, is_packed, is_packed_tensor, packed_dtype, packing, read_packed
from .shapes_only import shapes_only_active
from .split_weights import refuse_split

_UNIT_ROWS = 512
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class HeldLinear(nn.Module, ABC):
    """A linear layer of our own that holds its weight in another way than as a matrix."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight (m, n), fp32."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """W x without the bias, differentiable in x."""

    @property
    @abstractmethod
    def dense_dtype(self) -> torch.dtype:
        """The dtype that its weight had and that a dense layer in its place gets."""

    @abstractmethod
    def stored_tensors(self) -> Iterator[Tensor]:
        """What holds the weight."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """How the weight is held, in words that an adapter's config can record."""


def check_weight(name: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight cannot be quantised or decomposed, naming the module."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, HeldLinear):
        return
    if not isinstance(weight, Tensor) or is_packed(layer):
        if isinstance(getattr(layer, "in_features", None), int):
            check_product(name, layer)
        return
    refuse_split(name, weight)
    if weight.device.type == "meta":
        if shapes_only_active():
            return
        raise ValueError(
            f"{name}: its weight is on the meta device (no values). Load the weights first, for "
            "example with from_pretrained() and without an offloading device_map."
        )
    if isinstance(layer, bnb.nn.Linear4bit):
        check_quant_state(name, layer)
        return
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return
    if weight.dtype not in _FLOATS:
        raise ValueError(
            f"{name}: weight dtype {weight.dtype} is not supported; expected float32, bfloat16 or "
            "float16. Convert the model first, for example with model.to(torch.bfloat16)."
        )
    _refuse_infinite(name, "its weight", weight)


def check_tensors(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters that are no layer's weight, such as embeddings and norms, with NaN or Inf in them, by name."""
    for name, tensor in tensors:
        refuse_split(name, tensor)
        # bitsandbytes' bytes may be held in a dtype of floats (quant_storage).
        packed = isinstance(tensor, bnb.nn.Params4bit) or is_packed_tensor(tensor)
        if tensor.dtype in _FLOATS and not tensor.is_meta and not packed:
            module, _, leaf = name.rpartition(".")
            _refuse_infinite(module or name, f"its {leaf}", tensor)


def _refuse_infinite(name: str, what: str, tensor: Tensor) -> None:
    if all_finite(tensor):
        return
    # Some rows at a time: a mask of the whole is as large as the weight in 8 bits.
    bad = sum(int((~torch.isfinite(rows)).sum()) for rows in tensor.detach().split(_UNIT_ROWS))
    raise ValueError(
        f"{name}: {what} holds {bad} NaN or Inf values of {tensor.numel()}; expected finite "
        "numbers. The checkpoint is damaged, or overflowed in float16; load it again, in bfloat16 or "
        "float32."
    )


def check_quant_state(name: str, layer: bnb.nn.Linear4bit) -> None:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        raise ValueError(
            f"{name}: a 4-bit layer without quantisation state; its weight was never quantised. Move "
            'the model to its device first, for example model.to("cpu").'
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{name}: bitsandbytes has repacked this 4-bit weight for AVX512 inference (an eval forward "
            "on this CPU does that in place), which loses its quantisation state. Expected the plain NF4 "
            "layout. Load the model again and call qsvft before any forward."
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or Inf. Reads the smallest and the largest entry: isfinite would make a mask first."""
    if tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.detach()))


def dense_weight(layer: nn.Module) -> Tensor | None:
    """The weight (m outputs, n inputs) as held, dense; None for a layer type not known here."""
    if isinstance(layer, HeldLinear):
        return layer.dense_weight()
    if isinstance(layer, bnb.nn.Linear4bit):
        packed: Any = packed_weight(layer)
        return bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scale = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        data = layer.weight.data if layer.weight.CB is None else layer.weight.CB
        return data.float() * (scale.float().view(-1, 1) / 127.0)
    if isinstance(layer, Conv1D):
        return layer.weight.detach().t()
    if isinstance(layer, nn.Linear) and layer.weight.is_floating_point() and not is_packed(layer):
        return layer.weight.detach()
    return None


def weight_as_held(layer: nn.Module) -> Tensor:
    """The weight (m, n) of any layer, dense: as it is stored, or where that is not known here as it computes."""
    weight = dense_weight(layer)
    return read_packed(layer) if weight is None else weight


def product_without_bias(layer: nn.Module, x: Tensor) -> Tensor | None:
    """W x without the layer's bias, differentiable; None for a layer type not known here."""
    if isinstance(layer, HeldLinear):
        return layer.product(x)
    if isinstance(layer, bnb.nn.Linear4bit):
        inner = x if layer.compute_dtype is None else x.to(layer.compute_dtype)
        weight: Any = packed_weight(layer)
        return bnb.matmul_4bit(inner, weight, quant_state=weight.quant_state).to(x.dtype)
    if isinstance(layer, Conv1D):
        return x @ layer.weight
    if type(layer) is nn.Linear:
        return nn.functional.linear(x, layer.weight)
    return None


def weight_digest(layer: nn.Module) -> bytes:
    """SHA-256 of the weight's own bytes, as stored (packed values and their scales); of another library's as read."""
    sha = hashlib.sha256()
    for tensor in stored_tensors(layer):
        if tensor.is_meta:
            return b""
        sha.update(tensor_bytes(tensor))
    return sha.digest()


def stored_tensors(layer: nn.Module) -> Iterator[Tensor]:
    """The tensors that hold a layer's weight: packed values and their scales; of another library the weight as read."""
    if isinstance(layer, HeldLinear):
        yield from layer.stored_tensors()
        return
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or is_packed(layer):
        yield read_packed(layer)
        return
    yield weight.data
    state = getattr(weight, "quant_state", None)
    if state is not None:
        yield state.absmax
        if state.nested:
            yield state.state2.absmax
            yield state.offset.reshape(1)
    scale = getattr(getattr(layer, "state", None), "SCB", None)
    if scale is None:
        scale = getattr(weight, "SCB", None)
    if scale is not None:
        yield scale


def describe_base(layer: nn.Module) -> dict[str, Any]:
    """How a base layer holds its weight, in words that an adapter's config can record."""
    if isinstance(layer, HeldLinear):
        return layer.describe()
    weight = getattr(layer, "weight", None)
    if isinstance(layer, bnb.nn.Linear4bit):
        state = quant_state(layer)
        return {
            "bits": 4,
            "quant_type": state.quant_type,
            "double_quant": bool(state.nested),
            "block_size": int(state.blocksize),
            "dtype": dtype_name(state.dtype),
        }
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return {"bits": 8, "quant_type": "int8", "dtype": dtype_name(dense_dtype(layer))}
    if is_packed(layer) or not isinstance(layer, (nn.Linear, Conv1D)):
        return {"bits": 16, "quant_type": packing(layer), "dtype": dtype_name(packed_dtype(layer))}
    return {"bits": 16, "quant_type": "none", "dtype": dtype_name(getattr(weight, "dtype", None))}


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """ "bfloat16" of torch.bfloat16."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def dense_dtype(layer: nn.Module) -> torch.dtype:
    """The floating dtype a dense replacement of this layer should have."""
    if isinstance(layer, HeldLinear):
        return layer.dense_dtype
    if isinstance(layer, bnb.nn.Linear4bit):
        return quant_state(layer).dtype
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or is_packed(layer):
        return packed_dtype(layer)
    if weight.is_floating_point():
        return weight.dtype
    if isinstance(bias, Tensor) and bias.is_floating_point():
        return bias.dtype
    return getattr(layer, "qsvft_dtype", torch.bfloat16)


def dense_layer(layer: nn.Module, weight: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
    """A plain ``nn.Linear`` (or ``Conv1D``, where the layer was one) with this (m, n) weight.

    Args:
        layer: in whose place it is made; its bias comes along.
        weight: in any dtype.
        dtype: of the new layer; None for the one that the layer's weight had before it was quantised.
    """
    dtype = dense_dtype(layer) if dtype is None else dtype
    bias = getattr(layer, "bias", None)
    weight = weight.to(dtype)
    if isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D:
        new: nn.Module = Conv1D(1, 1)
        new.nf, new.nx = weight.shape  # type: ignore[assignment]
        new.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
        values = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach().to(dtype)
        new.bias = nn.Parameter(values.clone(), requires_grad=False)
        return new
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    new.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().to(dtype).clone(), requires_grad=False)
    return new.train(layer.training)

"""The weight of an adapted layer as others read it: who multiplies with it computes without the adapter, and is told.

Asking for its dtype, device or shape, looking at its numbers and comparing them is no mistake. A product is: a parent
that reads ``self.proj.weight`` in place of calling the layer, a loss that reads the head's, a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PRODUCTS: set[Callable[..., Any]] = {
    *(torch.matmul, torch.mm, torch.bmm, torch.mv, torch.einsum, torch.tensordot, torch.inner, torch.baddbmm),
    *(torch.addmm, torch.addbmm, torch.addmv, torch.chain_matmul, torch.linalg.multi_dot, torch.conv1d, torch.conv2d),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.addmm, Tensor.inner, Tensor.__matmul__),
    *(Tensor.__rmatmul__, F.linear, F.bilinear, F.conv1d, F.conv2d, F.multi_head_attention_forward, F.embedding),
}


class ReadWeight(Tensor):
    """A view of an adapted layer's base weight that refuses to be multiplied with.

    Attributes:
        layer: the layer's name in the model.
    """

    layer = "a layer"

    @classmethod
    def of(cls, weight: Tensor, layer: str) -> ReadWeight:
        """The same numbers at the same place."""
        found = weight.detach().as_subclass(cls)
        found.layer = layer
        return found

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        layer = next((one.layer for one in (*args, *kwargs.values()) if isinstance(one, ReadWeight)), cls.layer)
        if func in _PRODUCTS:
            raise ValueError(
                f"{layer}: its weight is read and multiplied with by other code, which passes over the adapter on this "
                "layer. Add the layer to exclude_modules, or merge the adapter first; for the base weight itself read "
                "get_base_layer().weight."
            )
        result = super().__torch_function__(func, types, args, kwargs)
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, ReadWeight):
                one.layer = layer  # a transpose, a cast or a part is still the weight
        return result

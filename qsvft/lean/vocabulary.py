"""The frozen token embeddings and the output head in 8 or 4 bits.

    embedding    y = W[ids]                       rows are gathered as they are held, then made dense
    head         y = x Wᵀ + b,  dL/dx = g W       W is made dense 8192 rows at a time and dropped again

W (vocabulary x width) is a :class:`~qsvft.storage.stored_matrix.StoredMatrix`, one for all modules that share a weight.
On Llama-3-8B the two take 1.96 GiB in bf16, 1.01 GiB in 8 bits and 0.50 GiB in 4 bits.

The modules change in place: ``model.get_output_embeddings()`` is the same object afterwards, with its
hooks, its bias and its names, and so is the embedding, with its padding_idx and its scale.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from ..maths.autocast import linear_dtype
from ..options.choices import BASE_BITS
from ..storage.stored_matrix import Layout, Parts, StoredMatrix, dense_rows
from ..storage.weights import check_weight
from .rows_on_demand import RowsOnDemand

SLICE_ROWS = 8192
_SAMPLED_ROWS = 64

logger = logging.getLogger(__name__)


class QuantizedModule(nn.Module):
    """What the embedding and the head share: a frozen weight that is held rounded and never as a whole.

    Attributes:
        stored: the weight, a row for each token.
        module_name: its name in the model, for messages.
        dense_class: what the module was and becomes again.
        dtype: the dtype that the weight had; it follows ``model.to(dtype)`` as the weight would have.
    """

    stored: StoredMatrix
    module_name: str
    dense_class: type[nn.Module]
    dtype: torch.dtype

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self._refuse_weight()
        return super().__getattr__(name)

    def _refuse_weight(self) -> NoReturn:
        raise AttributeError(
            f"{self.module_name}: expected a dense weight, found one in {self.stored.bits} bits. What reads the "
            "weight itself (resize_token_embeddings, a few models) needs it dense: resize before quantising, leave "
            "quantize_embeddings at 16, or call qsvft.vocabulary.dequantize_vocabulary(model)."
        )

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedModule:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class QuantizedEmbedding(QuantizedModule):
    """Token embeddings in 8 or 4 bits: ids of any shape (...) give (..., embedding_dim) in ``dtype``.

    Multiplied by ``embed_scale`` where the embedding did so (Gemma, BART).
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        # index_select refuses ids that are negative or too large, as an embedding does.
        parts = tuple(part.index_select(0, flat) for part in self.stored.parts())
        rows = dense_rows(self.stored.layout, parts, self.dtype).contiguous().view(*ids.shape, self.embedding_dim)
        scale = getattr(self, "embed_scale", None)
        return rows if scale is None else _scaled(rows, scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class QuantizedHead(QuantizedModule):
    """An output head in 8 or 4 bits: x (..., in_features) gives (..., out_features), as ``nn.Linear`` does.

    Attributes:
        bias: (out_features,) or None, as it was.
    """

    in_features: int
    out_features: int
    bias: Tensor | None

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return RowsOnDemand(self.stored, self.dtype, self._product, self._refuse_weight)
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x.to(linear_dtype(x))
        bias = None if bias is None else bias.to(x.dtype)
        y: Tensor = _Head.apply(x, bias, self.stored.layout, *self.stored.parts())
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _scaled(rows: Tensor, scale: Tensor | float) -> Tensor:
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


class _Head(torch.autograd.Function):
    """x Wᵀ + b. Keeps the parts of W as they are held: no activation and nothing dense."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layout: Layout, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.layout = layout
        y = x.new_empty(*x.shape[:-1], layout.rows)
        tokens, logits = x.reshape(-1, layout.columns), y.view(-1, layout.rows)
        for rows, W in _slices(layout, parts, x.dtype):
            if bias is None:
                torch.mm(tokens, W.t(), out=logits[:, rows])
            else:
                torch.addmm(bias[rows], tokens, W.t(), out=logits[:, rows])
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        layout, parts = ctx.layout, ctx.saved_tensors
        logits = g.reshape(-1, layout.rows)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            # In fp32: a sum in bf16 would be rounded at every slice.
            total = g.new_zeros(logits.shape[0], layout.columns, dtype=torch.promote_types(g.dtype, torch.float32))
            for rows, W in _slices(layout, parts, g.dtype):
                total += logits[:, rows] @ W
            grad_x = total.to(g.dtype).view(*g.shape[:-1], layout.columns)
        if ctx.needs_input_grad[1]:
            grad_bias = logits.sum(0)
        return grad_x, grad_bias, None, *(None for _ in parts)


def _slices(layout: Layout, parts: Parts, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """W's rows, dense, some thousands at a time."""
    for start in range(0, layout.rows, SLICE_ROWS):
        rows = slice(start, min(start + SLICE_ROWS, layout.rows))
        yield rows, dense_rows(layout, tuple(part[rows] for part in parts), dtype)


Members = list[tuple[str, nn.Module]]


def quantize_embeddings(model: nn.Module, bits: int, skip_modules: Sequence[str] = ()) -> nn.Module:
    """Hold a model's token embeddings and output head in 8 or 4 bits, in place, one weight at a time.

    What shares its weight is held once and stays shared. Left as they are: positional and other
    embeddings, modules under ``skip_modules`` with everything that shares their weight (those that will
    be trained belong there), and, with a warning, modules whose forward is not known here. The weight is
    frozen from then on; call this before ``get_peft_model``.

    Args:
        model: a transformers model in fp32, bf16 or fp16, its linears quantised or not.
        bits: 8 (int8), 4 (NF4) or 16 (nothing to do).
        skip_modules: names, or last parts of names, of modules to leave as they are.

    Returns:
        The same model.

    Raises:
        ValueError: other bits; no embeddings or head that can be held so; other bits than they are held
            in already; a weight on the meta device, with NaN or Inf, or of another dtype. The model is
            then as it was.
    """
    for members in check_embeddings(model, bits, skip_modules):
        weight = cast(Tensor, members[0][1].weight)
        stored, dtype = StoredMatrix.hold(weight, bits), weight.dtype
        del weight  # and with the last member the dense one is freed, before the next is held
        for name, module in members:
            _hold(name, module, stored, dtype)
    return model


def check_embeddings(model: nn.Module, bits: int, skip_modules: Sequence[str] = ()) -> list[Members]:
    """Raise what :func:`quantize_embeddings` would raise; change nothing.

    Returns:
        The weights that it would hold, each as the modules that share it, with their names.
    """
    if bits not in BASE_BITS:
        raise ValueError(
            f"bits of the embeddings and the head must be 4 (NF4), 8 (int8) or 16 (left as they are), got {bits!r}"
        )
    groups = [] if bits == 16 else _groups(model, bits, skip_modules)
    for members in groups:
        check_weight(*members[0])
    return groups


def dequantize_vocabulary(model: nn.Module) -> nn.Module:
    """Make embeddings and head plain dense modules again, in place; tied ones are tied again.

    Returns:
        The same model; one without quantised embeddings unchanged.
    """
    dense: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            key = id(module.stored)
            if key not in dense:
                dense[key] = nn.Parameter(module.stored.dense(module.dtype).contiguous(), requires_grad=False)
            _release(module, dense[key])
    return model


def _hold(name: str, module: nn.Module, stored: StoredMatrix, dtype: torch.dtype) -> None:
    held = cast(QuantizedModule, module)
    held.dense_class, held.dtype, held.module_name = type(module), dtype, name
    del module.weight
    for part_name, part in list(stored.named_buffers()):
        # Part of the state, as the weight was: a checkpoint of the whole model must not lose it.
        stored.register_buffer(part_name, part, persistent=True)
    module.stored = stored
    module.__class__ = QuantizedHead if isinstance(module, nn.Linear) else QuantizedEmbedding


def _release(module: QuantizedModule, weight: nn.Parameter) -> None:
    dense_class = module.dense_class
    for name in ("stored", "dense_class", "dtype", "module_name"):
        delattr(module, name)
    module.__class__ = dense_class  # type: ignore[assignment]
    module.weight = weight


def _groups(model: nn.Module, bits: int, skip: Sequence[str]) -> list[Members]:
    """The modules to change, those that share a weight together; all is decided before anything is changed."""
    groups: list[Members] = []
    obstacles: list[str] = []
    found = vocabulary_of(model)
    for module in found:
        if any(module is member for group in groups for _, member in group):
            continue  # shares its weight with the one before
        members = _sharing(model, module)
        if isinstance(module, QuantizedModule):
            _check_same_bits(members[0][0], module, bits)
        elif not any(f".{part}." in f".{name}." for name, _ in members for part in skip):
            reason = next((f"{name} {why}" for name, member in members if (why := _obstacle(member))), None)
            if reason is None:
                groups.append(members)
            else:
                obstacles.append(reason)
    if len(obstacles) == len(found):
        raise ValueError(
            f"{type(model).__name__}: expected token embeddings or an output head to hold in {bits} bits, found "
            f"{'; '.join(sorted(set(obstacles))) or 'neither'}. Leave it as it is, with 16 bits."
        )
    for reason in sorted(set(obstacles)):
        logger.warning("left as it is: %s", reason)
    return groups


def _sharing(model: nn.Module, module: nn.Module) -> Members:
    """The modules that hold the same weight as this one, which is among them, with their names."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return [
        (name, one)
        for name, one in model.named_modules()
        if one is module or (weight is not None and any(p is weight for p in one.parameters(recurse=False)))
    ]


def _check_same_bits(name: str, module: QuantizedModule, bits: int) -> None:
    held = module.stored.bits
    if held != bits:
        raise ValueError(
            f"{name}: held in {held} bits already, bits={bits} would round it twice. Expected bits={held}, or call "
            "qsvft.vocabulary.dequantize_vocabulary(model) first."
        )


def vocabulary_of(model: nn.Module) -> list[nn.Module]:
    """The token embedding and the output head, as far as the model has them."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            continue  # a plain module, or one without a vocabulary, such as a vision model
    return [module for module in found if isinstance(module, nn.Module)]


def _obstacle(module: nn.Module) -> str | None:
    """Why a module cannot be held here, None if it can."""
    kind = type(module).__name__
    if type(module) is nn.Linear:
        return None
    if not isinstance(module, nn.Embedding):
        return f"is a {kind}, expected nn.Embedding or nn.Linear"
    if module.max_norm is not None:
        return "renormalises its rows in its forward (max_norm)"
    if type(module) is not nn.Embedding and not _only_scales(module):
        return f"is a {kind}, whose forward does more than to look up rows and scale them"
    return None


def _only_scales(embedding: nn.Embedding) -> bool:
    """Whether a subclass gives W[ids] * embed_scale, bit for bit, on some rows of its own."""
    scale = getattr(embedding, "embed_scale", None)
    if not isinstance(scale, (Tensor, int, float)):
        return False
    if embedding.weight.is_meta:
        return True
    step = max(1, embedding.num_embeddings // _SAMPLED_ROWS)
    ids = torch.arange(0, embedding.num_embeddings, step, device=embedding.weight.device)
    with torch.no_grad():
        given, expected = type(embedding).forward(embedding, ids), _scaled(embedding.weight[ids], scale)
    return torch.equal(given.nan_to_num(), expected.nan_to_num())  # NaN has a message of its own

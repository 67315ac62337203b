"""The cross-entropy of a language model's head, without ever holding the logits of all tokens.

    logits = hidden Wᵀ + b                       (tokens, V), in the compute dtype
    loss   = Σ_t  logsumexp(logits_t) - logits_t[label_t]
    d loss / d hidden = (softmax(logits) - onehot(labels)) W

The logits are needed one chunk of 256 tokens at a time: a chunk's loss and its part of the gradient are
computed together in the forward, and the backward only multiplies with what comes from above. What is
kept is the gradient of hidden, (tokens, H); of a frozen W nothing is kept. At its peak a chunk holds 6
bytes for each of its 256 x V logits (bf16, then fp32, then their gradient in bf16), where the plain loss
holds 12 for every token of the batch.

A head that is more than a matrix (an adapter on it, an 8-bit layer) is called on the same chunks under
checkpointing, so that autograd reaches all it consists of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..maths.autocast import linear_dtype

TOKENS = 256
ROWS = 8192


@runtime_checkable
class Rows(Protocol):
    """A frozen (rows, columns) matrix that is stored in another form and made dense some rows at a time."""

    rows: int
    columns: int

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) as a (stop - start, columns) tensor."""


Head = Tensor | Rows | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LogitStep:
    """What a model does to every logit between its head and the loss: x * c, x / c, tanh(x) or a cast.

    Gemma's soft-capping is three of them: x / c, tanh(x), x * c.
    """

    kind: Literal["multiply", "divide", "tanh", "cast"]
    value: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "multiply":
            return x * self.value
        if self.kind == "divide":
            return x / self.value
        return torch.tanh(x) if self.kind == "tanh" else x.to(self.value)

    def gradient(self, g: Tensor, y: Tensor | None) -> Tensor:
        """The gradient of x from that of y; y itself is needed for tanh alone. A cast leaves g as it is."""
        if self.kind == "multiply":
            return g * self.value
        if self.kind == "divide":
            return g / self.value
        return torch.ops.aten.tanh_backward(g, y) if self.kind == "tanh" else g


def chunked_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    steps: Sequence[LogitStep] = (),
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """``F.cross_entropy(logits.float(), labels)`` of ``logits = hidden @ W.T + b``, 256 tokens at a time.

    Under autocast the product is taken in autocast's dtype, as ``F.linear`` would take it. Gradients of a
    linear head are of first order only; the backward refuses ``create_graph``.

    Args:
        hidden: (tokens, H), the head's input.
        head: the weight W (V, H), frozen or trained; :class:`Rows`, a frozen W in another form, of which
            8192 rows are dense at a time; or any callable from (n, H) to (n, V), which is checkpointed.
        labels: (tokens,), the index each token shall predict, already shifted.
        bias: (V,), where the head is a weight.
        steps: applied to the logits in order, in the logits' dtype.
        ignore_index: the label of tokens that do not count.
        label_smoothing: the share of the target that is spread evenly over all V.
        reduction: "sum" over the tokens that count, or their "mean".

    Returns:
        A scalar, fp32. The mean over no tokens is NaN, as in torch, with a gradient of zero.

    Raises:
        ValueError: shapes that do not fit, an unknown reduction, or (on a CPU, where looking costs no
            synchronisation) a label outside [0, V).
    """
    if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"chunked_cross_entropy(): found hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)}; expected "
            "(tokens, H) and (tokens,). Flatten both, and shift the labels first."
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"chunked_cross_entropy(): found reduction={reduction!r}; expected 'mean' or 'sum'")
    if isinstance(head, Tensor | Rows):
        size = tuple(head.shape) if isinstance(head, Tensor) else (head.rows, head.columns)
        _check(hidden, size, labels, ignore_index)
        weight, rows = (head, None) if isinstance(head, Tensor) else (None, head)
        settings = _Settings(tuple(steps), ignore_index, label_smoothing, linear_dtype(hidden), size[0])
        total: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, rows, labels, settings, torch.is_grad_enabled())
    else:
        if bias is not None:
            raise ValueError("chunked_cross_entropy(): found a bias beside a callable head, which adds its own")
        total = _checkpointed(hidden, head, labels, steps, ignore_index, label_smoothing)
    if reduction == "sum":
        return total
    return total / (labels != ignore_index).sum().to(total.device)


@dataclass(frozen=True)
class _Settings:
    steps: tuple[LogitStep, ...]
    ignore_index: int
    smoothing: float
    dtype: torch.dtype
    vocabulary: int


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed loss of a linear head, its gradients made in the forward and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Rows | None,
        labels: Tensor,
        settings: _Settings,
        grad_enabled: bool,
    ) -> Tensor:
        matrix = rows if weight is None else weight
        assert matrix is not None
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        exact = torch.promote_types(settings.dtype, torch.float32)
        size = (settings.vocabulary, hidden.shape[1])
        gradients = (
            hidden.new_empty(hidden.shape, dtype=settings.dtype) if wanted[0] else None,
            hidden.new_zeros(size, dtype=exact) if wanted[1] else None,
            hidden.new_zeros(size[:1], dtype=exact) if wanted[2] else None,
        )
        losses = hidden.new_empty(hidden.shape[:1], dtype=torch.float32)
        for start in range(0, hidden.shape[0], TOKENS):
            part = slice(start, start + TOKENS)
            losses[part] = _chunk(hidden[part], matrix, bias, labels[part], settings, part, gradients)
        if any(wanted):
            ctx.save_for_backward(*gradients, (labels != settings.ignore_index).any())
            ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # The gradient was made in the forward: behind it there is no graph, and a second order would lack its part.
            raise RuntimeError(
                "chunked_cross_entropy(): found a backward with create_graph=True, expected gradients of first order. "
                "For second-order ones use the plain loss: qsvft.disable_chunked_loss(model)."
            )
        *gradients, any_counts = ctx.saved_tensors
        # Where no token counts the normaliser is 0 and g infinite, but the gradient is still 0.
        scale = torch.where(any_counts, g, torch.zeros_like(g))
        scaled = [
            None if gradient is None else _scaled(gradient, scale, dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None, None


def _chunk(
    hidden: Tensor,
    matrix: Tensor | Rows,
    bias: Tensor | None,
    labels: Tensor,
    settings: _Settings,
    part: slice,
    gradients: tuple[Tensor | None, ...],
) -> Tensor:
    """The losses (n,) of n tokens; their gradients are written or added into ``gradients``."""
    of_hidden, of_weight, of_bias = gradients
    hidden = hidden.to(settings.dtype)
    logits = _logits(hidden, matrix, bias, settings)
    tape: list[tuple[LogitStep, Tensor | None, torch.dtype]] = []
    for step in settings.steps:
        before = logits.dtype
        logits = step(logits)
        tape.append((step, logits if step.kind == "tanh" else None, before))
    dtype = logits.dtype
    # The scores are overwritten below; tanh's output is still needed for its gradient.
    scores = logits.clone() if dtype == torch.float32 and tape and tape[-1][1] is not None else logits.float()
    del logits
    wanted = any(gradient is not None for gradient in gradients)
    losses = _cross_entropy_(scores, labels, settings, wanted)
    if not wanted:
        return losses
    gradient = scores.to(dtype)
    del scores
    for step, output, before in reversed(tape):
        gradient = step.gradient(gradient, output).to(before)
    if of_hidden is not None:
        of_hidden[part] = _times(gradient, matrix, settings)
    if of_weight is not None:
        for rows in _slices(settings.vocabulary, ROWS):
            of_weight[rows] += gradient[:, rows].t() @ hidden
    if of_bias is not None:
        of_bias += gradient.sum(0, dtype=of_bias.dtype)
    return losses


def _cross_entropy_(scores: Tensor, labels: Tensor, settings: _Settings, gradient: bool) -> Tensor:
    """The losses (n,) of fp32 scores (n, V); with ``gradient`` the scores become their own gradient."""
    eps, size = settings.smoothing, settings.vocabulary
    counts = labels != settings.ignore_index
    index = labels.masked_fill(~counts, 0).unsqueeze(1)
    scores.sub_(scores.amax(1, keepdim=True))
    at_label = scores.gather(1, index).squeeze(1)
    mean = scores.mean(1) if eps else None
    sums = scores.exp_().sum(1)
    logs = sums.log()
    losses = logs - at_label
    if mean is not None:
        losses = (1 - eps) * losses + eps * (logs - mean)
    if gradient:
        weights = counts.to(scores.dtype).unsqueeze(1)
        scores.mul_(weights / sums.unsqueeze(1))
        if eps:
            scores.sub_(weights * (eps / size))
        scores.scatter_add_(1, index, weights * (eps - 1))
    return losses.masked_fill(~counts, 0.0)


def _logits(hidden: Tensor, matrix: Tensor | Rows, bias: Tensor | None, settings: _Settings) -> Tensor:
    """hidden Wᵀ + b in the compute dtype, (n, V)."""
    bias = None if bias is None else bias.to(settings.dtype)
    if isinstance(matrix, Tensor) and matrix.dtype == settings.dtype:
        return F.linear(hidden, matrix, bias)
    logits = hidden.new_empty(hidden.shape[0], settings.vocabulary)
    for rows in _slices(settings.vocabulary, ROWS):
        logits[:, rows] = F.linear(hidden, _dense(matrix, rows, settings.dtype), None if bias is None else bias[rows])
    return logits


def _times(gradient: Tensor, matrix: Tensor | Rows, settings: _Settings) -> Tensor:
    """gradient W, (n, H). Over slices of W the sum is taken in fp32."""
    gradient = gradient.to(settings.dtype)
    if isinstance(matrix, Tensor) and matrix.dtype == settings.dtype:
        return gradient @ matrix
    columns = matrix.shape[1] if isinstance(matrix, Tensor) else matrix.columns
    total = gradient.new_zeros(gradient.shape[0], columns, dtype=torch.promote_types(settings.dtype, torch.float32))
    for rows in _slices(settings.vocabulary, ROWS):
        total += gradient[:, rows] @ _dense(matrix, rows, settings.dtype)
    return total


def _dense(matrix: Tensor | Rows, rows: slice, dtype: torch.dtype) -> Tensor:
    return matrix[rows].to(dtype) if isinstance(matrix, Tensor) else matrix.dense(dtype, rows.start, rows.stop)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale, multiplied in fp32: a loss scaler's factor must not meet fp16's limits on the way.

    The stored gradient stays as it is, for another backward.
    """
    exact = torch.promote_types(gradient.dtype, torch.float32)
    result = torch.empty_like(gradient, dtype=dtype)
    for part in _slices(gradient.shape[0], ROWS if gradient.dim() == 1 else TOKENS):
        result[part] = gradient[part].to(exact) * scale
    return result


def _checkpointed(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    steps: Sequence[LogitStep],
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The summed loss of any head; each chunk's logits are made again in the backward."""

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden)
        for step in steps:
            logits = step(logits)
        return F.cross_entropy(
            logits.float(),
            labels.to(logits.device),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="sum",
        )

    chunks = zip(hidden.split(TOKENS), labels.split(TOKENS), strict=True)
    if not torch.is_grad_enabled():
        return torch.stack([loss(*chunk) for chunk in chunks]).sum()
    return torch.stack([checkpoint(loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _check(hidden: Tensor, size: tuple[int, ...], labels: Tensor, ignore_index: int) -> None:
    if len(size) != 2 or size[1] != hidden.shape[1]:
        raise ValueError(
            f"chunked_cross_entropy(): found a weight {size} for hidden {tuple(hidden.shape)}; expected "
            f"(V, {hidden.shape[1]})"
        )
    if labels.device.type == "cpu":
        wrong = ((labels < 0) | (labels >= size[0])) & (labels != ignore_index)
        if bool(wrong.any()):
            raise ValueError(
                f"chunked_cross_entropy(): found the label {int(labels[wrong][0])}; expected 0 to {size[0] - 1}, or "
                f"{ignore_index} for a token that does not count"
            )

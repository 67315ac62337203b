"""Forms that were tried beside those of the library, in the plainest code: y = W x + U (alpha M)(Vᵀ x).

U and V are each one of

    svd       singular vectors of W                       gradient  those of the loss's gradient on a few batches
    input     leading directions of the layer's inputs    output    those of the gradient of its outputs
    random    an orthonormal matrix                       whole     the identity: M has a row (or column) for each
    through   (U alone) W V, not orthonormal: W (x + V (alpha M)(Vᵀ x)), one-sided

and M is dense (U's k by V's k), or a band, or the entries of the largest gradient. alpha makes a step of AdamW at
the learning rate 1 as large as W itself: |W| / sqrt(entries). With ``whitened`` = p it is measured on the inputs, so
that the step changes W x as much, and the directions of the inputs are weighed by their energies lambda_j ** -p. With
``m_from`` = "error", alpha M starts at what the two sides see of the base's rounding, Uᵀ (W before it - W) V; with
``corrected`` the base gets back what V sees of it, (W before it - W) V Vᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from base import BF16
from torch import Tensor, nn

Statistics = dict[str, dict[str, Tensor]]
WHITENED = "whitened"
NEEDED = {"gradient": "gradient", "input": "inputs", "output": "outputs"}


class Updated(nn.Module):
    """A layer with its update; U (k, m) or None, V (k, n) or None; ``inside`` the entries of M that train."""

    def __init__(
        self, layer: nn.Linear, U: Tensor | None, V: Tensor | None, alpha: float, inside: Tensor | None
    ) -> None:
        super().__init__()
        m, n = layer.weight.shape
        to = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.layer, self.alpha = layer, alpha
        self.shape = (m if U is None else U.shape[0], n if V is None else V.shape[0])
        self.U, self.V = (None if side is None else side.to(**to) for side in (U, V))
        self.places = None if inside is None else inside.flatten().nonzero().squeeze(1).to(layer.weight.device)
        shape = self.shape if self.places is None else self.places.shape
        self.M = nn.Parameter(torch.zeros(shape, device=layer.weight.device))

    def start_at(self, change: Tensor) -> None:
        """Let alpha M, dense, be what U and V see of a change of W."""
        assert self.U is not None and self.V is not None
        self.M.data.copy_(self.U.float() @ change.float() @ self.V.float().t() / self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        M = self.M
        if self.places is not None:
            M = M.new_zeros(self.shape[0] * self.shape[1]).index_put((self.places,), M).view(self.shape)
        h = x if self.V is None else x @ self.V.t()
        z = h @ (self.alpha * M).to(x.dtype).t()
        update: Tensor = z if self.U is None else z @ self.U
        return self.layer(x) + update


def tried(base: nn.Module, options: dict[str, Any], setting: Any) -> nn.Module:
    """The base with an update on every linear layer but the head."""
    head = base.get_output_embeddings()
    layers = {name: one for name, one in base.named_modules() if isinstance(one, nn.Linear) and one is not head}
    kinds = {NEEDED[side] for side in (options["U"], options["V"]) if side in NEEDED}
    kinds |= ({"gradient"} if options.get("entries") == "gradient" else set()) | (
        {"inputs"} if WHITENED in options else set()
    )
    seen = statistics(base, layers, setting, kinds) if kinds else {name: {} for name in layers}
    generator = torch.Generator().manual_seed(setting.seed)
    wanted = options.get("m_from") == "error" or options.get("corrected")
    unrounded = setting.task.load(BF16, setting.seed) if wanted else None
    for name, layer in layers.items():
        parent, _, leaf = name.rpartition(".")
        made = _updated(layer, seen[name], options, generator)
        if unrounded is not None:
            lost = unrounded.get_submodule(name).weight.float() - layer.weight.float()
            if options.get("corrected"):
                V = made.V.float()
                layer.weight.data += (lost @ V.t() @ V).to(layer.weight.dtype)
            else:
                made.start_at(lost)
        setattr(base.get_submodule(parent), leaf, made)
    return base


def statistics(base: nn.Module, layers: dict[str, nn.Linear], setting: Any, kinds: set[str]) -> Statistics:
    """Sums over the calibration batches: of dL/dW, of x xᵀ, of (dL/dy)(dL/dy)ᵀ."""
    found: Statistics = {name: {} for name in layers}

    def watch(name: str, layer: nn.Linear) -> list[Any]:
        def backward(_: nn.Module, __: Any, outputs: Sequence[Tensor]) -> None:
            x, g = (t.flatten(0, -2).float() for t in (read[name], outputs[0]))
            parts = {"gradient": (g, x), "inputs": (x, x), "outputs": (g, g)}
            for kind in kinds:
                left, right = parts[kind]
                found[name][kind] = found[name].get(kind, 0) + left.t() @ right

        def forward(_: nn.Module, inputs: Sequence[Tensor], __: Tensor) -> None:
            read[name] = inputs[0].detach()

        return [layer.register_forward_hook(forward), layer.register_full_backward_hook(backward)]

    read: dict[str, Tensor] = {}
    hooks = [hook for name, layer in layers.items() for hook in watch(name, layer)]
    embeddings = base.get_input_embeddings()
    hooks.append(embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_()))
    for batch in setting.calibration:
        setting.task.loss(base, batch).backward()
    for hook in hooks:
        hook.remove()
    return found


def _updated(layer: nn.Linear, seen: dict[str, Tensor], options: dict[str, Any], generator: torch.Generator) -> Updated:
    W, (m, n) = layer.weight.detach().float(), layer.weight.shape
    k = options["k"] if "as_lora" not in options else round((options["as_lora"] * (m + n)) ** 0.5)
    k = min(k, m, n)
    both = {"svd": W, "gradient": seen.get("gradient")}
    pairs = {name: _leading(both[name], k) for name in {options["U"], options["V"]} & both.keys()}

    def side(name: str, place: int) -> Tensor | None:
        size = (m, n)[place]
        if name == "whole":
            return None
        if name == "random":
            rows = _orthonormal(k, size, generator)
        elif name in pairs:
            rows = pairs[name][place]
        else:
            rows = _eigenvectors(seen[NEEDED[name]], k)
        return _orthonormal(k, k, generator).to(rows.device) @ rows if options.get("turned") else rows

    V = side(options["V"], 1)
    U = V @ W.t() if options["U"] == "through" and V is not None else side(options["U"], 0)
    inside = None
    if "off_diagonals" in options:
        index = torch.arange(k)
        inside = (index.unsqueeze(1) - index).abs() <= options["off_diagonals"]
    if options.get("entries") == "gradient":
        G = seen["gradient"] if U is None else U @ seen["gradient"]
        G = (G if V is None else G @ V.t()).abs()
        most = G.flatten().topk(k * options["per_row"]).indices
        inside = G.new_zeros(G.numel(), dtype=torch.bool).index_fill(0, most, True).view_as(G)
    shape = (m if U is None else k, n if V is None else k)
    entries = shape[0] * shape[1] if inside is None else int(inside.sum())
    size = W.norm()
    if WHITENED in options:
        C = seen["inputs"]
        energy = ((V @ C) * V).sum(1)
        energy = energy.clamp_min(1e-6 * float(energy.max()))
        weights = (energy / energy.mean()).pow(-options[WHITENED])
        V = weights.unsqueeze(1) * V
        size = (k * ((W @ C) * W).sum() / (weights.square() * energy).sum()).sqrt()
        if U is not None:
            size = size * k**0.5 / U.norm()
    return Updated(layer, U, V, float(size) / entries**0.5, inside)


def _leading(A: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k left and right singular vectors as rows, through the smaller Gram matrix."""
    if A.shape[0] >= A.shape[1]:
        V = _eigenvectors(A.t() @ A, k)
        return nn.functional.normalize(V @ A.t(), dim=1), V
    U = _eigenvectors(A @ A.t(), k)
    return U, nn.functional.normalize(U @ A, dim=1)


def _eigenvectors(C: Tensor, k: int) -> Tensor:
    """The first k as rows, by a few rounds of subspace iteration where k is small."""
    n = C.shape[0]
    if 4 * k > n:
        return torch.linalg.eigh(C)[1].flip(1)[:, :k].t().contiguous()
    found = torch.linalg.qr(C @ torch.randn(n, k + 32, generator=torch.Generator().manual_seed(0)).to(C))[0]
    for _ in range(4):
        found = torch.linalg.qr(C @ found)[0]
    turn = torch.linalg.eigh(found.t() @ C @ found)[1].flip(1)[:, :k]
    return (found @ turn).t().contiguous()


def _orthonormal(k: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, k, generator=generator))[0].t().contiguous()

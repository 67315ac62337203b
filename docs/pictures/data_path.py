"""The data path of an adapted layer, as data-path.svg: what is held, what is trained, in which shape and dtype.

    python docs/pictures/data_path.py

Shapes and dtypes are read off a small layer that ``qsvft.prepare`` adapted, once for each way to hold the factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from svg import PALE, Picture, write
from torch import nn

import qsvft
from qsvft.tuner.layer import QSVFTLinear

OUT = "data-path.svg"
# Sizes that are all different, so that a shape says which they are.
TOKENS, OUTPUTS, INPUTS, RANK = 16, 192, 128, 96
LETTERS = {TOKENS: "t", OUTPUTS: "m", INPUTS: "n", RANK: "k"}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8", torch.uint8: "NF4"}
GREY, BLUE, ORANGE, WHITE = "#e3e6ea", "#cfe3f5", "#fbd9b0", "#ffffff"


@dataclass(frozen=True)
class Facts:
    """What the picture says of each tensor, in words."""

    weight: tuple[str, ...]
    weight_shape: str
    factors: str
    factor_shape: str
    scale: str
    trained: str
    entries: str
    kept: str
    activation: str
    answer: str


def adapted(factor_bits: int) -> QSVFTLinear:
    """A layer with fewer inputs than outputs, in NF4, with the default pattern."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False)).to(torch.bfloat16)
    model = qsvft.prepare(net, bits=4, factor_bits=factor_bits, rank=RANK, target_modules=["0"], progress=False)
    (layer,) = [module for module in model.modules() if isinstance(module, QSVFTLinear)]
    return layer


def facts() -> Facts:
    layers = {bits: adapted(bits) for bits in (16, 8, 4)}
    layer = layers[16]
    (M,) = layer.qsvft_M.values()
    assert [p.requires_grad for p in layer.parameters()] == [p is M for p in layer.parameters()]
    (basis,), (scale,), (pattern,) = (
        layer.held_bases().values(),
        layer.qsvft_scale.values(),
        layer.qsvft_pattern.values(),
    )
    state = layer.original_base().weight.quant_state
    x = torch.randn(TOKENS, INPUTS, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = layer(x)
    (h,) = [t for t in kept if t.shape[0] == TOKENS]
    d = pattern.off_diagonals
    assert M.numel() == RANK * (2 * d + 1) - d * (d + 1)
    return Facts(
        weight=(
            f"{state.quant_type.upper()}, blocks of {state.blocksize}",
            *(["double quantised"] if state.nested else []),
        ),
        weight_shape=shape(state.shape),
        factors=" or ".join(NAMES[next(held(layers[bits]).buffers()).dtype] for bits in layers),
        factor_shape=shape((basis.rank, basis.size)),
        scale=f"{shape(scale.shape)}, {NAMES[scale.dtype]}",
        trained=f"{shape((pattern.rank, pattern.rank))}, {NAMES[M.dtype]}",
        entries="k(2d+1) - d(d+1) entries",
        kept=f"{shape(h.shape)}, {NAMES[h.dtype]}",
        activation=f"{shape(x.shape)}, {NAMES[x.dtype]}",
        answer=f"{shape(y.shape)}, {NAMES[y.dtype]}",
    )


def held(layer: QSVFTLinear) -> nn.Module:
    (basis,) = layer.held_bases().values()
    return basis


def shape(sizes: tuple[int, ...] | torch.Size) -> str:
    """(16, 128) -> "t × n"."""
    return " × ".join(LETTERS[size] for size in sizes)


def draw() -> Picture:
    """The picture."""
    says = facts()
    picture = Picture(1120, 492, "The data path of an adapted layer")
    picture.text((24, 36), "One adapted layer:  y = W (x + V S⁻¹ M Vᵀ x)", 20, anchor="start", bold=True)
    picture.text(
        (24, 59),
        "a weight with m outputs and n ≤ m inputs, as held by default; t tokens, k directions, d off-diagonals",
        13,
        anchor="start",
        fill=PALE,
    )
    top, low = 134.0, 284.0
    # x -> (+) -> W -> y
    picture.line([(87, top), (776, top)])
    picture.line([(812, top), (842, top)])
    picture.line([(1010, top), (1030, top)])
    _tensor(picture, (56, top), "x", says.activation)
    picture.circle((794, top), 17, WHITE)
    picture.text((794, top + 7), "+", 21)
    _block(picture, (927, top), (166, 102), GREY, "W", [says.weight_shape, *says.weight, "frozen"])
    _tensor(picture, (1061, top), "y", says.answer)
    # x -> Vᵀ -> h -> S⁻¹ M -> z -> V -> (+)
    picture.line([(56, top + 42), (56, low), (112, low)])
    picture.line([(266, low), (292, low)])
    picture.line([(354, low), (388, low)])
    picture.line([(576, low), (610, low)])
    picture.line([(672, low), (716, low)])
    picture.line([(794, low - 51), (794, top + 18)])
    _block(picture, (189, low), (154, 102), BLUE, "Vᵀ", [says.factor_shape, says.factors, "frozen"])
    _tensor(picture, (323, low), "h", says.kept, dashed=True)
    _block(
        picture,
        (482, low),
        (188, 102),
        ORANGE,
        "S⁻¹ M",
        [f"M: {says.trained}, trained", says.entries, f"S⁻¹: {says.scale}, frozen"],
    )
    _tensor(picture, (641, low), "z", says.kept)
    _block(picture, (794, low), (154, 102), BLUE, "V", ["the same tensor,", "read the other way"])
    picture.line(
        [(189, low + 53), (189, low + 74), (794, low + 74), (794, low + 53)], color=PALE, arrow=False, dashed=True
    )
    picture.text(
        (491, low + 92), "held once; layers that read the same x (q, k, v; gate, up) hold one V together", 12, fill=PALE
    )
    _legend(picture, 408)
    return picture


def _legend(picture: Picture, y: float) -> None:
    """What the colours mean, and the other two forms."""
    entries = ((GREY, "frozen, quantised", False), (BLUE, "frozen factor", False), (ORANGE, "trained", False))
    x = 26.0
    for fill, words, dashed in (*entries, (WHITE, "kept for the backward, and no more", True)):
        picture.box((x, y), (22, 15), fill, dashed=dashed, corner=4)
        picture.text((x + 30, y + 12), words, 12.5, anchor="start")
        x += 62 + 7.2 * len(words)
    picture.text(
        (26, y + 42),
        "Fewer outputs than inputs: the same behind W, with U in place of V:  y = y₀ + U M S⁻¹ Uᵀ y₀,  y₀ = W x",
        13,
        anchor="start",
    )
    picture.text(
        (26, y + 64),
        'Both factors held (sides="both", the paper\'s form):  y = W x + U M Vᵀ x,  without S⁻¹',
        13,
        anchor="start",
    )


def _tensor(picture: Picture, middle: tuple[float, float], name: str, says: str, dashed: bool = False) -> None:
    x, y = middle
    picture.box((x - 30, y - 17), (60, 34), WHITE, corner=17, dashed=dashed)
    picture.text((x, y + 5), name, 16, italic=True)
    picture.text((x, y + 34), says, 11.5, fill=PALE)


def _block(
    picture: Picture, middle: tuple[float, float], size: tuple[float, float], fill: str, name: str, says: list[str]
) -> None:
    x, y = middle
    picture.box((x - size[0] / 2, y - size[1] / 2), size, fill)
    first = y + 3 - 8 * len(says)
    picture.text((x, first), name, 18, bold=True)
    for number, words in enumerate(says):
        picture.text((x, first + 20 + 16 * number), words, 11.5)


if __name__ == "__main__":
    write(draw(), OUT)

"""The data path of an adapted layer, as data-path.svg: what is held, what is trained, in which shape and dtype.

    python docs/pictures/data_path.py

Shapes and dtypes are read off a small layer that ``qsvft.prepare`` adapted, once for each way to hold the factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from svg import PALE, Picture, write
from torch import nn

import qsvft
from qsvft.storage.factors import StoredBasis
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
    V_shape: str
    U_shape: str
    trained: str
    kept: str
    activation: str
    answer: str


def adapted(factor_bits: int) -> QSVFTLinear:
    """A layer in NF4, as it is by default but for its rank."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, bias=False)).to(torch.bfloat16)
    model = qsvft.prepare(net, bits=4, factor_bits=factor_bits, rank=RANK, target_modules=["0"], progress=False)
    (layer,) = [module for module in model.modules() if isinstance(module, QSVFTLinear)]
    return layer


def facts() -> Facts:
    layers = {bits: adapted(bits) for bits in (16, 8, 4)}
    layer = layers[16]
    M = layer.M("default")
    assert [p.requires_grad for p in layer.parameters()] == [p is M for p in layer.parameters()]
    (pattern,) = layer.qsvft_pattern.values()
    assert M.numel() == RANK * RANK
    V, U = (held(layer, side) for side in "VU")
    state = layer.original_base().weight.quant_state
    x = torch.randn(TOKENS, INPUTS, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = layer(x)
    (h,) = [t for t in kept if t.shape[0] == TOKENS]
    return Facts(
        weight=(
            f"{state.quant_type.upper()}, blocks of {state.blocksize}",
            *(["double quantised"] if state.nested else []),
        ),
        weight_shape=shape(state.shape),
        factors=" or ".join(NAMES[next(held(layers[bits], "V").buffers()).dtype] for bits in layers),
        V_shape=shape((V.rank, V.size)),
        U_shape=shape((U.size, U.rank)),
        trained=f"{shape((pattern.rank, pattern.rank))}, {NAMES[M.dtype]}",
        kept=f"{shape(h.shape)}, {NAMES[h.dtype]}",
        activation=f"{shape(x.shape)}, {NAMES[x.dtype]}",
        answer=f"{shape(y.shape)}, {NAMES[y.dtype]}",
    )


def held(layer: QSVFTLinear, side: str) -> StoredBasis:
    (basis,) = [one for key, one in layer.held_bases().items() if key.side == side]
    assert isinstance(basis, StoredBasis)
    return basis


def shape(sizes: tuple[int, ...] | torch.Size) -> str:
    """(16, 128) -> "t × n"."""
    return " × ".join(LETTERS[size] for size in sizes)


def draw() -> Picture:
    """The picture."""
    says = facts()
    picture = Picture(1120, 450, "The data path of an adapted layer")
    picture.text((24, 36), "One adapted layer:  y = W x + U α M Vᵀ x", 20, anchor="start", bold=True)
    picture.text(
        (24, 59),
        "a weight with m outputs and n inputs, as held by default; t tokens, k = 128 directions",
        13,
        anchor="start",
        fill=PALE,
    )
    top, low = 134.0, 284.0
    # x -> W -> (+) -> y
    picture.line([(87, top), (399, top)])
    picture.line([(565, top), (923, top)])
    picture.line([(959, top), (1030, top)])
    _tensor(picture, (56, top), "x", says.activation)
    _block(picture, (482, top), (166, 102), GREY, "W", [says.weight_shape, *says.weight, "frozen"])
    picture.circle((941, top), 17, WHITE)
    picture.text((941, top + 7), "+", 21)
    _tensor(picture, (1061, top), "y", says.answer)
    # x -> Vᵀ -> h -> α M -> z -> U -> (+)
    picture.line([(56, top + 42), (56, low), (112, low)])
    picture.line([(266, low), (292, low)])
    picture.line([(354, low), (388, low)])
    picture.line([(576, low), (610, low)])
    picture.line([(672, low), (716, low)])
    picture.line([(872, low), (941, low), (941, top + 18)])
    _block(picture, (189, low), (154, 102), BLUE, "Vᵀ", [says.V_shape, says.factors, "frozen"])
    _tensor(picture, (323, low), "h", says.kept, dashed=True)
    _block(picture, (482, low), (188, 102), ORANGE, "α M", [f"M: {says.trained}, trained", "α: one number, frozen"])
    _tensor(picture, (641, low), "z", says.kept)
    _block(picture, (794, low), (154, 102), BLUE, "U", [says.U_shape, says.factors, "frozen"])
    _legend(picture, 372)
    return picture


def _legend(picture: Picture, y: float) -> None:
    """What the colours mean, and the other forms."""
    entries = ((GREY, "frozen, quantised", False), (BLUE, "frozen factor", False), (ORANGE, "trained", False))
    x = 26.0
    for fill, words, dashed in (*entries, (WHITE, "kept for the backward, and no more", True)):
        picture.box((x, y), (22, 15), fill, dashed=dashed, corner=4)
        picture.text((x + 30, y + 12), words, 12.5, anchor="start")
        x += 62 + 7.2 * len(words)
    picture.text(
        (26, y + 42),
        'One factor held (sides="one"):  y = W (x + V S⁻¹ M Vᵀ x), or with fewer outputs than inputs  '
        "y = y₀ + U M S⁻¹ Uᵀ y₀,  y₀ = W x",
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

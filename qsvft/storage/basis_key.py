"""BasisKey: which basis it is, in a word. Layers hold bases under these keys, and files store them under the same.

    V_bf16, U_nf4            singular vectors of a layer's weight, in 16 or 4 bits
    V_bf16_randomized_256    256 randomized directions; those of another rank are others, and never extend them
    V_bf16_float32           singular vectors computed in fp32; V_bf16_float32_256 where they are randomized
    V_int8_original          those of the dense weight that a residual base was made from
    V_bf16_data_96           96 directions of what passed through the layer on some data
    E_bf16_data_96           what the base's rounding took from those 96, (W - the weight as held) V
    V_bf16@1                 others than those that the layer holds under V_bf16

The parts go together: V_nf4_randomized_256_original.
"""

from __future__ import annotations

from typing import Literal, cast

from ..maths.decomposition import EXACT, Decomposer

HELD = {16: "bf16", 8: "int8", 4: "nf4"}

_BESIDE, _DATA = "@", "_data_"


class BasisKey(str):
    """A key. It is the text itself, so that it can name a module and a tensor; what it says is read here alone."""

    __slots__ = ()

    @classmethod
    def singular(cls, side: str, bits: int, method: Decomposer, rank: int, *, original: bool = False) -> BasisKey:
        """The key of singular vectors (or of directions that hold nearly as much).

        Args:
            side: "U" or "V".
            bits: 16, 8 or 4, how they are held.
            method: how they are computed.
            rank: k.
            original: whether they are of the weight before it was quantised.
        """
        how = ""
        if method.dtype != EXACT.dtype:
            how = f"_float32_{rank}" if method.randomized else "_float32"
        elif method.randomized:
            how = f"_randomized_{rank}"
        return cls(f"{side}_{HELD[bits]}{how}{'_original' if original else ''}")

    @classmethod
    def data(cls, side: str, bits: int, rank: int) -> BasisKey:
        """The key of directions that come from data: those of another rank are others."""
        return cls(f"{side}_{HELD[bits]}{_DATA}{rank}")

    @property
    def side(self) -> Literal["U", "V", "E"]:
        """ "U", directions of the output, "V", of the input, or "E", what is added to the output for each of V's."""
        return cast(Literal["U", "V", "E"], self[0])

    @property
    def from_data(self) -> bool:
        """Whether its directions come from data, so that only an adapter has them."""
        return _DATA in self

    @property
    def plain(self) -> BasisKey:
        """Without the number of a basis that is held beside another one."""
        return BasisKey(self.partition(_BESIDE)[0])

    def beside(self, number: int) -> BasisKey:
        """The key of a basis that is held beside the one under this key."""
        return BasisKey(f"{self}{_BESIDE}{number}")

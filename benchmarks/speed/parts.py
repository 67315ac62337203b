"""What the mathematics asks of one adapted linear, part by part: flops, bytes, products.

    two-sided      y = W x + U N (V x) [+ E (V x)]
    input side     y = W (x + V' N (V x))
    output side    y = W x + U' N (U W x)
    LoRA           y = W x + B (A x)
    factored       y = U ((s + M) (V x))                   plain SVFT, no W
    rebuilt        y = (U (s + M) V) x                     the authors'

W is (m, n), there are t tokens and k directions. Flops are those of matrix products, two a multiplication with its
addition; what works entry by entry has bytes alone. Every operand is read once and every result written once,
activations in bf16. ``flops`` is what the mathematics asks for, ``done`` what the products that are run come to: a
band is multiplied in dense blocks, the gradient of M in stretches of 256 tokens that are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

from qsvft.maths.banded_coefficients import _block_size
from qsvft.maths.coefficients import ROUNDED, TOKENS
from qsvft.maths.dense_coefficients import _ENTRIES
from qsvft.maths.patterns import banded_count

Kind = Literal["both", "input", "output", "lora", "factored", "rebuilt", "none"]
HELD = {16: 2.0, 8: 1 + 2 / 64, 4: 0.5 + 1 / 128}
"""Bytes of an entry of a factor as it is held."""
BASE = {16: 2.0, 4: 0.5 + 1 / 64}
"""Bytes of an entry of W as it is held."""
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Part:
    """One thing that a forward and a backward of an adapted linear have to do.

    Attributes:
        name: what it is.
        when: forward or backward.
        flops: of matrix products that the mathematics asks for.
        done: of those that are run.
        nbytes: read and written.
        products: how many matrix products are run.
        copies: how many operators that only copy or cast.
    """

    name: str
    when: str
    flops: int
    nbytes: float
    done: int
    products: int
    copies: int = 0


@dataclass(frozen=True)
class Linear:
    """An adapted linear.

    Attributes:
        m, n: the shape of W, outputs and inputs.
        kind: the map.
        rank: k, or LoRA's r.
        pattern: which entries of M train.
        off_diagonals: d of a band.
        base_bits: how W is held, 16 or 4.
        factor_bits: how U and V are held.
        error: whether what the base's rounding took is given back.
        card: whether the device has products with results in fp32, which need no stretches.
    """

    m: int
    n: int
    kind: Kind
    rank: int
    pattern: Literal["dense", "banded"] = "banded"
    off_diagonals: int = 0
    base_bits: int = 16
    factor_bits: int = 16
    error: bool = False
    card: bool = False

    @property
    def inner(self) -> int:
        """The length of the activation that is read."""
        return self.m if self.kind == "output" else self.n

    @property
    def outer(self) -> int:
        """The length of what is written."""
        return self.n if self.kind == "input" else self.m

    @property
    def entries(self) -> int:
        """How many numbers train."""
        k = self.rank
        if self.kind == "lora":
            return k * (self.m + self.n)
        if self.kind == "none":
            return 0
        return k * k if self.pattern == "dense" else banded_count(k, self.off_diagonals)

    def parts(self, tokens: int) -> tuple[Part, ...]:
        """Everything that a forward and a backward of so many tokens has to do, in order."""
        return tuple(_PARTS[self.kind](self, tokens))

    def work(self, tokens: int, when: str | None = None) -> int:
        """Flops that are asked for, of the forward or the backward alone if it is said."""
        return sum(part.flops for part in self.parts(tokens) if when in (None, part.when))

    def done(self, tokens: int) -> int:
        """Flops of the products that are run."""
        return sum(part.done for part in self.parts(tokens))

    def products(self, tokens: int) -> int:
        """How many matrix products are run."""
        return sum(part.products for part in self.parts(tokens))

    def copies(self, tokens: int) -> int:
        """How many operators only copy or cast: of qsvft's maps; what PEFT's do is not written down."""
        return sum(part.copies for part in self.parts(tokens))


def product(name: str, when: str, rows: int, inner: int, columns: int) -> Part:
    """(rows, inner) times (inner, columns), bf16."""
    flops = 2 * rows * inner * columns
    return Part(name, when, flops, 2 * (rows * inner + inner * columns + rows * columns), flops, 1)


def moved(name: str, when: str, nbytes: float, copies: int = 0) -> Part:
    """What only moves bytes."""
    return Part(name, when, 0, nbytes, 0, 0, copies)


def _weight(linear: Linear, tokens: int, when: str) -> Iterator[Part]:
    """W's product, and W made dense for it."""
    m, n = linear.m, linear.n
    if linear.base_bits == 4:
        yield moved("W made dense", when, m * n * (BASE[4] + 2))
    yield product("W", when, tokens, n, m) if when == FORWARD else product("W", when, tokens, m, n)


def _dense(linear: Linear, name: str, when: str, size: int) -> Iterator[Part]:
    """A factor made dense, unless it is held so."""
    if linear.factor_bits != 16:
        yield moved(f"{name} made dense", when, linear.rank * size * (HELD[linear.factor_bits] + 2), copies=1)


def _adapted(linear: Linear, tokens: int) -> Iterator[Part]:
    t, k, inner, outer = tokens, linear.rank, linear.inner, linear.outer
    inward, outward = ("U", "U") if linear.kind == "output" else ("V", "V" if linear.kind == "input" else "U")
    first = linear.kind != "input"  # W is multiplied with x itself
    if first:
        yield from _weight(linear, t, FORWARD)
    yield from _dense(linear, inward, FORWARD, inner)
    yield product("to coefficients", FORWARD, t, inner, k)
    yield _coefficients(linear, t, "M", FORWARD)
    if linear.error:
        yield from _dense(linear, "E", FORWARD, outer)
        yield product("E", FORWARD, t, k, outer)
    yield from _dense(linear, outward, FORWARD, outer)
    yield product("from coefficients", FORWARD, t, k, outer)
    if not first:
        yield from _weight(linear, t, FORWARD)
        yield from _weight(linear, t, BACKWARD)
    yield from _dense(linear, outward, BACKWARD, outer)
    yield product("from coefficients", BACKWARD, t, outer, k)
    yield _coefficients(linear, t, "M", BACKWARD)
    yield _gradient(linear, t)
    if linear.error:
        yield from _dense(linear, "E", BACKWARD, outer)
        yield product("E", BACKWARD, t, outer, k)
    yield from _dense(linear, inward, BACKWARD, inner)
    yield product("to coefficients", BACKWARD, t, k, inner)
    if first:
        yield from _weight(linear, t, BACKWARD)


def _blocks(linear: Linear) -> tuple[int, int, int]:
    """The dense blocks of a band: how many, their rows and their columns."""
    block = _block_size(linear.off_diagonals)
    return ceil(linear.rank / block), block, block + 2 * linear.off_diagonals


def _coefficients(linear: Linear, tokens: int, name: str, when: str) -> Part:
    """N h, or g N: N is cast; of a band the windows that its blocks read are laid out, and what they give is."""
    k, nbytes = linear.rank, 4 * tokens * linear.rank + 4 * linear.entries
    if linear.pattern == "dense":
        flops = 2 * tokens * k * k
        return Part(name, when, flops, nbytes, flops, 1, 1)
    if linear.off_diagonals == 0:
        return moved(name, when, nbytes, copies=1)
    (count, rows, columns), chunks = _blocks(linear), ceil(tokens / TOKENS)
    done = 2 * tokens * count * rows * columns
    return Part(name, when, 2 * tokens * linear.entries, nbytes, done, chunks, 1 + 2 * chunks)


def _gradient(linear: Linear, tokens: int) -> Part:
    """gᵀ h, of the entries that train. A band's g and h are laid out, and a two-sided one is taken apart as it lies."""
    name, k = "gradient of M", linear.rank
    nbytes = 4 * tokens * k + 4 * linear.entries
    if linear.pattern == "banded" and linear.off_diagonals == 0:
        return moved(name, BACKWARD, nbytes, copies=0 if linear.kind == "factored" else 2 * ceil(tokens / TOKENS))
    flops = 2 * tokens * linear.entries
    if linear.pattern == "banded":
        (count, rows, columns), chunks = _blocks(linear), ceil(tokens / TOKENS)
        done = 2 * _filled(tokens, TOKENS) * count * rows * columns
        return Part(name, BACKWARD, flops, nbytes, done, chunks, 2 * chunks + (linear.kind == "both"))
    most = tokens if linear.card else ROUNDED * max(1, _ENTRIES // k**2)
    done = 2 * (tokens if linear.card else _filled(tokens, most)) * k * k
    return Part(name, BACKWARD, flops, nbytes, done, ceil(tokens / most))


def _filled(tokens: int, most: int) -> int:
    """Tokens in chunks of ``most``, where a chunk of more than a stretch is filled up to whole ones."""
    whole, rest = divmod(tokens, most)
    return whole * most + (ceil(rest / ROUNDED) * ROUNDED if rest > ROUNDED else rest)


def _lora(linear: Linear, tokens: int) -> Iterator[Part]:
    m, n, r = linear.m, linear.n, linear.rank
    yield from _weight(linear, tokens, FORWARD)
    yield product("A", FORWARD, tokens, n, r)
    yield product("B", FORWARD, tokens, r, m)
    yield product("B", BACKWARD, tokens, m, r)
    yield product("gradient of B", BACKWARD, m, tokens, r)
    yield product("A", BACKWARD, tokens, r, n)
    yield product("gradient of A", BACKWARD, r, tokens, n)
    yield from _weight(linear, tokens, BACKWARD)


def _factored(linear: Linear, tokens: int) -> Iterator[Part]:
    m, n, k = linear.m, linear.n, linear.rank
    yield product("to coefficients", FORWARD, tokens, n, k)
    yield _coefficients(linear, tokens, "M", FORWARD)
    yield product("from coefficients", FORWARD, tokens, k, m)
    yield product("from coefficients", BACKWARD, tokens, m, k)
    yield _coefficients(linear, tokens, "M", BACKWARD)
    yield _gradient(linear, tokens)
    yield product("to coefficients", BACKWARD, tokens, k, n)


def _rebuilt(linear: Linear, tokens: int) -> Iterator[Part]:
    """The products U diag(s + M) and Uᵀ (dL/dW' Vᵀ) are run whole, where a scaling and k dot products would do."""
    m, n, k = linear.m, linear.n, linear.rank
    dense = product("W' = U (s + M) V", FORWARD, m, k, n)
    yield Part(dense.name, FORWARD, dense.flops, dense.nbytes, dense.flops + 2 * m * k * k, 2)
    yield product("W", FORWARD, tokens, n, m)
    yield product("W", BACKWARD, tokens, m, n)
    yield product("gradient of W'", BACKWARD, m, tokens, n)
    through = product("gradient of M", BACKWARD, m, n, k)
    yield Part(through.name, BACKWARD, through.flops, through.nbytes, through.flops + 2 * k * m * k, 2)


def _none(linear: Linear, tokens: int) -> Iterator[Part]:
    yield from _weight(linear, tokens, FORWARD)
    yield from _weight(linear, tokens, BACKWARD)


_PARTS = {
    "both": _adapted,
    "input": _adapted,
    "output": _adapted,
    "lora": _lora,
    "factored": _factored,
    "rebuilt": _rebuilt,
    "none": _none,
}

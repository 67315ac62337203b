"""A layer's forward and backward take the matrix products and copies that the mathematics asks for, and no others."""

import pytest
import torch
from script_modules import SPEED, script_modules

TOKENS = 384  # no whole number of stretches of 256
FORMS = (
    "qsvft",
    "qsvft:factor_bits=16",
    "qsvft:factor_bits=4",
    "qsvft:basis=data,residual=true",
    "qsvft:sides=one,pattern=banded",
    "qsvft:sides=one,pattern=banded,factor_bits=4",
    "qsvft:sides=both,pattern=banded,rank=full",
    "qsvft:sides=one,pattern=plain",
    "qsvft:pattern=plain,sides=both,rank=full",
    "svft",
)
LINEARS = ("up_proj", "down_proj")
pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes' about kernels that it does not find


@pytest.fixture(scope="module")
def speed():
    with script_modules(SPEED) as module:
        yield module


@pytest.fixture(scope="module")
def built(speed):
    """The layers of a form, by their own names, each form built once."""
    found = {}

    def of(text):
        if text not in found:
            model = speed("rivals").scenario(speed("rivals").Rival(text, text), speed("sizes").tiny()).model.train()
            layers = dict(speed("described").linears(model))
            found[text] = {leaf: next(layers[name] for name in layers if name.endswith(leaf)) for leaf in LINEARS}
        return found[text]

    return of


def in_bf16(text):
    """The same form on a base in bf16."""
    return f"{text}{',' if ':' in text else ':'}bits=16"


def steps(speed, layer, tokens=TOKENS):
    """A step of a layer, what it is, and the activation and gradient that it runs on."""
    linear = speed("described").described(layer)
    x = torch.randn(1, tokens, linear.n, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(1, tokens, linear.m, dtype=torch.bfloat16)
    return speed("operators").forward_and_backward(layer, x, g), linear, x, g


def counted(speed, layer, tokens=TOKENS):
    """What a second step takes, and what the layer is."""
    step, linear, _, _ = steps(speed, layer, tokens)
    step()
    return speed("operators").counted(step), linear


ON_BOTH = (*FORMS, *(in_bf16(text) for text in FORMS if text.startswith("qsvft") and "residual" not in text))


@pytest.mark.parametrize("tokens", [200, TOKENS, 700])
@pytest.mark.parametrize("text", ON_BOTH)
def test_products_and_copies_are_those_that_the_mathematics_asks_for(speed, built, text, tokens):
    for layer in built(text).values():
        ran, linear = counted(speed, layer, tokens)
        assert (ran.products, ran.copies) == (linear.products(tokens), linear.copies(tokens))


@pytest.mark.parametrize("text", ON_BOTH)
def test_a_layer_takes_no_more_operators_than_the_table_says(speed, built, text):
    most = speed("operators").MOST[text.replace(",bits=16", "").replace(":bits=16", "")]
    assert max(counted(speed, layer)[0].total for layer in built(text).values()) <= most


@pytest.mark.parametrize("text", ON_BOTH)
def test_no_step_after_the_first_looks_at_values_from_the_host(speed, built, text):
    assert [counted(speed, layer)[0].looks for layer in built(text).values()] == [0, 0]


def test_a_look_at_a_value_is_counted(speed):
    x = torch.ones(3)
    assert speed("operators").counted(lambda: (float(x.sum()), x.nonzero(), bool(x[0]))).looks == 3


def test_the_default_takes_four_products_forward_and_five_backward(speed, built):
    """W x, V, M and U; and back g W, g U, N, V and the gradient of M."""
    step, _, x, g = steps(speed, built("qsvft")["up_proj"])
    step()
    found = {}
    operators = speed("operators").counted
    with torch.autocast("cpu", torch.bfloat16):
        forward = operators(lambda: found.update(y=built("qsvft")["up_proj"](x)))
    backward = operators(lambda: found["y"].backward(g))
    assert (forward.products, backward.products) == (4, 5)

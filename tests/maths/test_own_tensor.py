"""An activation that is a view of a custom function's may be changed in place, and its gradient is right."""

import torch

from qsvft.maths.own_tensor import of_its_own


class Product(torch.autograd.Function):
    """Gives a view, as a product in three dimensions does."""

    @staticmethod
    def forward(ctx, x, W):
        ctx.save_for_backward(W)
        return x @ W.T

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.saved_tensors[0], None


def test_it_may_be_written_into_and_has_the_gradient_of_a_copy():
    W, mask = torch.randn(5, 4), torch.tensor([[True, False, False], [False, True, True]])
    found = []
    for make in (of_its_own, torch.clone):
        x = torch.ones(2, 3, 4, requires_grad=True)
        y = make(Product.apply(x, W))
        y[mask] = 7.0
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_it_takes_no_memory_and_without_a_gradient_it_is_as_it_was():
    x = torch.ones(2, 3, 4, requires_grad=True)
    y = Product.apply(x, torch.ones(5, 4))
    own = of_its_own(y)
    assert own.data_ptr() == y.data_ptr() and own.stride() == y.stride() and torch.equal(own, y)
    plain = torch.ones(2, 3)
    assert of_its_own(plain) is plain

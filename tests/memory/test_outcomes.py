"""What is remembered of an operation is what it would do: the same layout, and the same storage where it gives one."""

import pytest
import torch

from qsvft.memory.outcomes import Outcomes

ATEN = torch.ops.aten


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def wide():
    return empty(3, 4), empty(3, 4)


OPERATIONS = {
    "sum": (ATEN.add.Tensor, wide),
    "sum with a row": (ATEN.add.Tensor, lambda: (empty(3, 4), empty(4))),
    "promoted": (ATEN.mul.Tensor, lambda: (empty(3, 4), empty(3, 4, dtype=torch.bfloat16))),
    "of strided": (ATEN.mul.Tensor, lambda: (empty(4, 3).t(), empty(4, 3).t())),
    "with a number": (ATEN.mul.Tensor, lambda: (empty(3, 4), 2.0)),
    "product": (ATEN.mm.default, lambda: (empty(3, 4), empty(4, 5))),
    "joined": (ATEN.cat.default, lambda: ([*wide()], 1)),
    "copied": (ATEN.clone.default, lambda: (empty(3, 4),)),
    "cast": (ATEN._to_copy.default, lambda: (empty(3, 4),)),
    "a whole view": (ATEN.view.default, lambda: (empty(3, 4), [12])),
    "transposed": (ATEN.t.default, lambda: (empty(3, 4),)),
    "a part": (ATEN.slice.Tensor, lambda: (empty(3, 4), 0, 1, 2)),
    "expanded": (ATEN.expand.default, lambda: (empty(1, 4), [3, 4])),
    "detached": (ATEN.detach.default, lambda: (empty(3, 4),)),
    "in place": (ATEN.add_.Tensor, wide),
    "into another": (ATEN.copy_.default, wide),
    "set to another": (ATEN.set_.source_Tensor, wide),
    "resized": (ATEN.resize_.default, lambda: (empty(3, 4), [2, 2])),
    "in pieces": (ATEN.split.Tensor, lambda: (empty(4, 4), 2)),
    "two results": (ATEN.var_mean.correction, lambda: (empty(3, 4), [1])),
    "drawn": (ATEN.bernoulli.p, lambda: (empty(3, 4), 0.5)),
}


def layouts(out, args):
    """Of each result: shape, strides, dtype, bytes of its storage, and which argument has the same one, if any."""
    given = [tensor for each in args for tensor in (each if isinstance(each, list) else [each])]
    storages = [tensor.untyped_storage() for tensor in given if isinstance(tensor, torch.Tensor)]
    return [
        (
            one.shape,
            one.stride(),
            one.storage_offset(),
            one.dtype,
            one.untyped_storage().nbytes(),
            [i for i, storage in enumerate(storages) if storage is one.untyped_storage()],
            one is args[0],
        )
        for one in (out if isinstance(out, tuple | list) else [out])
    ]


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_does_the_same_each_time(name):
    func, arguments = OPERATIONS[name]
    outcomes, args = Outcomes(), arguments()
    expected = layouts(func(*args), args)
    for _ in range(3):
        args = arguments()
        assert layouts(outcomes.of(func, args, {}), args) == expected


@pytest.mark.parametrize("out", [lambda a, b: a + b, lambda a, b: a.add_(b)], ids=["new", "in place"])
def test_of_shapes_seen_before_nothing_is_run(out):
    calls, outcomes = [], Outcomes()

    def func(*args):
        calls.append(args)
        return out(*args)

    for _ in range(3):
        outcomes.of(func, wide(), {})
    assert len(calls) == 1
    outcomes.of(func, (empty(3, 4), empty(3, 1)), {})
    outcomes.of(func, (empty(3, 4), empty(4, 3).t()), {})
    assert len(calls) == 3


@pytest.mark.parametrize(("number", "dtype"), [(1, torch.int64), (1.0, torch.float32), (True, torch.int64)])
def test_equal_numbers_of_other_types_are_other_arguments(number, dtype):
    outcomes = Outcomes()
    for each in (1, 1.0, True, number):
        found = outcomes.of(ATEN.mul.Tensor, (empty(3, dtype=torch.int64), each), {})
    assert found.dtype == dtype


def test_keywords_count():
    outcomes = Outcomes()
    for dtype in (torch.float16, torch.float64, torch.float16):
        assert outcomes.of(ATEN._to_copy.default, (empty(3),), {"dtype": dtype}).dtype == dtype


def test_real_tensors_are_computed():
    outcomes = Outcomes()
    for value in (1.0, 2.0):
        for func in (ATEN.add.Tensor, ATEN.add_.Tensor):
            found = outcomes.of(func, (torch.full((3,), value), torch.ones(3)), {})
            assert found.tolist() == [value + 1] * 3

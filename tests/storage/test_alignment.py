"""A model's tensors after align_tensors: the same values, at addresses to compute with."""

import pytest
import torch
from placed import OFFSETS, placed
from torch import nn

from qsvft.storage.alignment import align_tensors
from qsvft.storage.quantization import quantize
from qsvft.storage.weights import stored_tensors


def model(bits: int) -> nn.Module:
    torch.manual_seed(0)
    return quantize(nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96)), bits, progress=False)


def misplace(model: nn.Module, offset: int) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = placed(tensor.data, offset)
        if getattr(tensor, "SCB", None) is not None:
            tensor.SCB = placed(tensor.SCB, offset)
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            state.absmax, state.code = placed(state.absmax, offset), placed(state.code, offset)
            if state.offset is not None:
                state.offset = placed(state.offset, offset)
            state = state.state2


def held(model: nn.Module) -> list[torch.Tensor]:
    extra = [part for layer in model for part in stored_tensors(layer)]
    states = [s.quant_state for s in model.parameters() if getattr(s, "quant_state", None) is not None]
    codes = [code for state in states for code in (state.code, state.state2.code)]
    return [*model.parameters(), *model.buffers(), *extra, *codes]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("offset", OFFSETS)
def test_every_number_of_more_than_a_byte_lies_at_a_multiple_of_64(bits, offset):
    moved, expected = model(bits), model(bits)
    misplace(moved, offset)
    assert any(tensor.data_ptr() % 64 for tensor in held(moved))
    align_tensors(moved)
    pairs = list(zip(held(moved), held(expected), strict=True))
    assert all(tensor.data_ptr() % 64 == 0 for tensor, _ in pairs if tensor.element_size() > 1 and tensor.numel() > 1)
    assert all(torch.equal(tensor, other) for tensor, other in pairs)


def test_what_lies_well_stays_where_it_is():
    moved = model(16)
    before = [tensor.data_ptr() for tensor in held(moved)]
    align_tensors(moved)
    assert [tensor.data_ptr() for tensor in held(moved)] == before

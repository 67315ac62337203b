"""M stays fp32: a cast loses nothing, new values are taken."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from qsvft.tuner.config import QSVFTConfig
from qsvft.tuner.layer import QSVFTLinear
from qsvft.tuner.parameter import Float32Parameter

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)


def make(size: int = 200) -> Float32Parameter:
    return Float32Parameter(torch.randn(size, generator=torch.Generator().manual_seed(123)))


class Holder(nn.Module):
    """A module with an M of fp32 beside an ordinary parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.M = make()
        self.plain = nn.Parameter(torch.randn(3))


@LOW
def test_casting_data_in_place_loses_nothing(dtype):
    """What TRL does with every trainable parameter of a 4-bit model."""
    M = make()
    before = M.detach().clone()
    M.data = M.data.to(dtype)
    assert M.dtype == torch.float32
    assert torch.equal(M, before)


@LOW
def test_new_values_in_another_dtype_are_taken_as_fp32(dtype):
    M = make()
    new = torch.randn(200).to(dtype)
    M.data = new
    assert M.dtype == torch.float32
    assert torch.equal(M, new.float())


def test_new_values_in_fp32_are_taken_without_a_copy():
    M, new = make(), torch.randn(200)
    M.data = new
    assert M.data_ptr() == new.data_ptr()


@LOW
def test_a_cast_that_changes_a_single_value_is_taken_whole(dtype):
    M = make()
    rounded = M.data.to(dtype)
    rounded[7] += 1
    M.data = rounded
    assert torch.equal(M, rounded.float())


@LOW
def test_new_values_of_another_shape_are_taken(dtype):
    M = make()
    M.data = torch.ones(3, dtype=dtype)
    assert torch.equal(M, torch.ones(3)) and M.dtype == torch.float32


def test_values_with_nan_are_taken_as_they_are():
    M = make()
    M.data = torch.full((200,), float("nan"), dtype=torch.bfloat16)
    assert M.dtype == torch.float32 and bool(M.isnan().all())


def test_steps_too_small_for_bf16_add_up_through_casts():
    """0.3 + 1e-4 is 0.3 in bf16; a trainer that casts before every step must not stop the training."""
    M = Float32Parameter(torch.full((5,), 0.3))
    optimizer = torch.optim.SGD([M], lr=1e-4)
    for _ in range(100):
        M.data = M.data.to(torch.bfloat16)
        M.grad = torch.full_like(M, -1.0)
        optimizer.step()
    torch.testing.assert_close(M.detach(), torch.full((5,), 0.31))


def test_data_is_the_parameters_own_memory_without_a_graph():
    M = make()
    assert M.data.data_ptr() == M.data_ptr() and not M.data.requires_grad
    M.data.zero_()
    assert torch.equal(M, torch.zeros(200))


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_made_from_any_dtype_it_is_an_fp32_leaf_parameter(requires_grad, dtype):
    M = Float32Parameter(torch.ones(3, dtype=dtype, requires_grad=True) * 2, requires_grad)
    assert isinstance(M, nn.Parameter) and M.is_leaf
    assert M.dtype == torch.float32 and M.requires_grad is requires_grad
    assert torch.equal(M, torch.full((3,), 2.0))


def test_gradients_reach_it_and_optimizers_move_it():
    M = make()
    before = M.detach().clone()
    (M * 2).sum().backward()
    assert torch.equal(M.grad, torch.full_like(M, 2))
    torch.optim.AdamW([M], lr=0.1).step()
    assert bool((before != M).all())


@LOW
@pytest.mark.parametrize("cast", ["to", "type"])
def test_casting_a_module_leaves_M_and_casts_the_rest(dtype, cast):
    holder = Holder()
    before = holder.M.detach().clone()
    getattr(holder, cast)(dtype)
    assert holder.plain.dtype == dtype
    assert isinstance(holder.M, Float32Parameter) and holder.M.dtype == torch.float32
    assert torch.equal(holder.M, before)
    assert dict(holder.named_parameters())["M"] is holder.M


@LOW
@pytest.mark.parametrize("options", [{}, {"sides": "one", "pattern": "banded", "off_diagonals": 1}], ids=str)
def test_casting_an_adapted_layer_between_backward_and_step_leaves_a_gradient_that_the_optimizer_takes(dtype, options):
    layer = QSVFTLinear(nn.Linear(16, 12), "default", QSVFTConfig(**options), "layer")
    M = layer.M("default")
    layer(torch.randn(4, 16)).square().sum().backward()
    layer.to(dtype)
    assert layer.M("default") is M and M.grad.dtype == M.dtype == torch.float32
    torch.optim.AdamW([M], lr=0.1).step()
    assert bool((M != 0).all())


@pytest.mark.parametrize("requires_grad", [True, False])
def test_deepcopy_is_an_equal_one_with_memory_of_its_own(requires_grad):
    M = make().requires_grad_(requires_grad)
    twin = copy.deepcopy(M)
    assert type(twin) is Float32Parameter and twin.requires_grad is requires_grad
    assert torch.equal(twin, M) and twin.data_ptr() != M.data_ptr()


def test_deepcopy_of_a_module_keeps_shared_parameters_shared():
    holder = Holder()
    holder.again = holder.M
    twin = copy.deepcopy(holder)
    assert twin.again is twin.M and twin.M is not holder.M


@pytest.mark.parametrize("requires_grad", [True, False])
def test_pickle_round_trip(requires_grad):
    M = make().requires_grad_(requires_grad)
    twin = pickle.loads(pickle.dumps(M))
    assert type(twin) is Float32Parameter and twin.requires_grad is requires_grad
    assert torch.equal(twin, M)
    twin.data = twin.data.to(torch.bfloat16)
    assert torch.equal(twin, M)


def test_torch_save_round_trip_of_a_whole_module():
    holder, file = Holder(), io.BytesIO()
    torch.save(holder, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert type(twin.M) is Float32Parameter and torch.equal(twin.M, holder.M)


def test_state_dict_holds_plain_fp32_tensors_that_load_with_weights_only():
    holder, file = Holder().to(torch.bfloat16), io.BytesIO()
    torch.save(holder.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert type(state["M"]) is torch.Tensor and state["M"].dtype == torch.float32
    other = Holder()
    other.M.data.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.M, holder.M)


@LOW
def test_loading_a_state_in_another_dtype_takes_its_values(dtype):
    holder, new = Holder(), torch.randn(200).to(dtype)
    holder.load_state_dict({"M": new, "plain": torch.zeros(3)})
    assert holder.M.dtype == torch.float32 and torch.equal(holder.M, new.float())


def test_moving_to_meta_and_back_does_not_invent_a_dtype():
    holder = Holder()
    holder.to("meta")
    assert holder.M.is_meta and holder.M.dtype == torch.float32


def test_empty_parameter():
    assert Float32Parameter().shape == (0,) and Float32Parameter().dtype == torch.float32

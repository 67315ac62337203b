"""What FSDP and ZeRO-3 split is the same model, in frozen parameters of one dtype; adapters under FSDP's wrappers."""

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from small_models import coefficients, load, logits, randomize, same_tensors, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

import qsvft
from qsvft.tuner.layer import QSVFTLinear

FORMS = {
    "int8": {"rank": 16},
    "NF4": {"rank": 16, "factor_bits": 4},
    "bf16, one-sided": {"sides": "one", "pattern": "banded", "off_diagonals": 2},
}
EACH_FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(llama, form):
    return randomize(qsvft.prepare(load(llama), 4, progress=False, **form))


def gradients(model):
    model.zero_grad()
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@EACH_FORM
def test_a_shardable_model_is_the_same_bit_for_bit_and_saves_the_same(llama, tmp_path, form):
    expected, model = made(llama, form), qsvft.make_shardable(made(llama, form))
    assert torch.equal(logits(model), logits(expected))
    assert same_tensors(gradients(model), gradients(expected))
    for one, name in ((expected, "expected"), (model, "found")):
        one.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("expected", "found")]
    assert same_tensors(*files)
    again = qsvft.from_pretrained(llama, adapter=tmp_path / "found", cache_dir=tmp_path / "cache", dtype="bfloat16")
    assert same_tensors(coefficients(again), coefficients(model))


@EACH_FORM
def test_base_and_factors_are_frozen_parameters_of_one_dtype(llama, form):
    model = qsvft.make_shardable(made(llama, form))
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert sum(isinstance(p, bnb.nn.Params4bit) for p in model.parameters()) == 14
    held = [layer.held_bases().values() for layer in model.modules() if isinstance(layer, QSVFTLinear)]
    parts = [part for bases in held for basis in bases for part in basis.stored.parts()]
    in_buffers = [b for name, b in model.named_buffers() if ".stored." in name]
    assert sum(b.nbytes for b in in_buffers) * 20 < sum(part.nbytes for part in parts)


@EACH_FORM
def test_M_is_read_within_the_forward_of_its_own_module(llama, form):
    """So that FSDP1, which splits it by itself, has gathered it."""
    model, inside = made(llama, form).eval(), []
    for name, module in model.named_modules():
        if name.endswith(".qsvft_M.default"):
            module.register_forward_pre_hook(lambda module, _: inside.append(module))
    logits(model)
    assert len(set(inside)) == 14


def test_a_model_that_cannot_be_sharded_is_refused_by_name(llama):
    eight = qsvft.prepare(load(llama), 8, progress=False, rank=8)
    with pytest.raises(ValueError, match=r"q_proj.* int8.*bits=4"):
        qsvft.make_shardable(eight)
    mixed = qsvft.prepare(load(llama), 4, progress=False, rank=8)
    mixed.get_input_embeddings().float()
    with pytest.raises(ValueError, match=r"one dtype.*embed_tokens"):
        qsvft.make_shardable(mixed)


# FSDP1 says so of a group of one, and of what PEFT calls to read and set a state.
@pytest.mark.filterwarnings("ignore:.*NO_SHARD.*:FutureWarning", "ignore:.*NO_SHARD.*:UserWarning")
@pytest.mark.filterwarnings("ignore:FSDP.state_dict_type:FutureWarning")
def test_an_adapter_under_fsdp1s_wrappers_is_saved_and_loaded_as_without(llama, alone):
    model = qsvft.make_shardable(made(llama, FORMS["int8"]))
    saved = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    policy = fsdp_auto_wrap_policy(model)
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        use_orig_params=True,
        sharding_strategy=ShardingStrategy.NO_SHARD,
        device_id=torch.device("cpu"),
    )
    found = {key: tensor.detach().clone() for key, tensor in get_peft_model_state_dict(wrapped).items()}
    assert same_tensors(found, saved)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    set_peft_model_state_dict(wrapped, found)
    again = {key: tensor.detach().clone() for key, tensor in get_peft_model_state_dict(wrapped).items()}
    assert same_tensors(again, saved)


def test_loading_leaves_the_parameters_that_fsdp2_made(llama, alone):
    model = qsvft.make_shardable(made(llama, FORMS["int8"]))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    before = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict({name: p.detach() for name, p in before.items()}, strict=False)
    after = dict(model.named_parameters())
    assert [name for name, p in before.items() if after[name] is not p] == []


def test_a_state_that_fsdp2_has_split_is_refused_by_name(llama, alone):
    model = qsvft.make_shardable(made(llama, FORMS["int8"]))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"q_proj: M of adapter 'default' .* shard of it.*accelerate 1\.15"):
        get_peft_model_state_dict(model)

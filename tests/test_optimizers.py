"""The optimizer that Trainer is asked for is the one that trains M, with its states in the precision it promises.

bitsandbytes' optimizers run on CPUs. Its paged ones need CUDA's managed memory, so that on a CPU they warn
and keep their states in plain memory; everything else about them is tested here.
"""

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from small_models import coefficients, load, same_tensors, tokens
from transformers import Trainer, TrainingArguments

import qsvft
from qsvft.tuner.parameter import Float32Parameter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]
LARGE, SMALL = 63, 2  # off-diagonals: 4096 entries are the fewest that bitsandbytes holds in 8 bits; and 314
# The name that Trainer takes: bits of the states, paged.
OPTIMIZERS = {
    "adamw_bnb_8bit": (8, False),
    "paged_adamw_8bit": (8, True),
    "paged_adamw_32bit": (32, True),
}


@pytest.fixture(autouse=True)
def no_overrides_of_other_tests():
    """bitsandbytes keeps per-parameter overrides, which Trainer enters for embeddings, in a singleton."""
    GlobalOptimManager.get_instance().initialize()


def prepared(llama, off_diagonals):
    options = {"pattern": "banded", "off_diagonals": off_diagonals, "target_modules": ["q_proj", "o_proj"]}
    return qsvft.prepare(load(llama), bits=4, progress=False, **options)


def trainer(model, folder, optimizer, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        optim=optimizer,
        **{
            "max_steps": 4,
            "save_strategy": "no",
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
            "seed": 3,
            **options,
        },
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 10, seed=4)]
    return Trainer(model=model, args=arguments, train_dataset=rows)


def trained(llama, folder, optimizer, off_diagonals=LARGE, **options):
    model = prepared(llama, off_diagonals)
    run = trainer(model, folder, optimizer, **options)
    run.train()
    return model, run.optimizer.optimizer


def states(optimizer):
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("off_diagonals", [LARGE, SMALL], ids=["M of 4096 entries", "M of 314 entries"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_asked_for_trains_M_with_the_states_it_promises(llama, tmp_path, name, off_diagonals):
    bits, paged = OPTIMIZERS[name]
    model, optimizer = trained(llama, tmp_path, name, off_diagonals)
    assert type(optimizer) is bnb.optim.AdamW
    assert (optimizer.args.optim_bits, optimizer.is_paged) == (bits, paged)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(parameters) == 4 and all(type(p) is Float32Parameter for p in parameters)
    assert all(p.dtype == torch.float32 and p.all() and torch.isfinite(p).all() for p in parameters)
    small = parameters[0].numel() < optimizer.args.min_8bit_size
    assert small is (off_diagonals == SMALL)
    expected = torch.float32 if small or bits == 32 else torch.uint8
    for state in states(optimizer):
        assert state["state1"].dtype == state["state2"].dtype == expected
        assert state["step"] == 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_M_goes_where_torchs_own_optimizer_takes_it(llama, tmp_path, name):
    reference, optimizer = trained(llama, tmp_path, "adamw_torch")
    assert type(optimizer) is torch.optim.AdamW
    found = torch.cat(list(coefficients(trained(llama, tmp_path, name)[0]).values()))
    expected = torch.cat(list(coefficients(reference).values()))
    allowed = 1e-3 if OPTIMIZERS[name][0] == 32 else 0.1
    assert 0 < float((found - expected).norm()) < allowed * float(expected.norm())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_with_bitwise_the_same_M(llama, tmp_path, name):
    uninterrupted, _ = trained(llama, tmp_path, name, save_strategy="steps", save_steps=2)
    model = prepared(llama, LARGE)
    run = trainer(model, tmp_path, name, save_strategy="steps", save_steps=2)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_tensors(coefficients(model), coefficients(uninterrupted))
    assert all(M.any() for M in coefficients(model).values())
    bits, _ = OPTIMIZERS[name]
    for state in states(run.optimizer.optimizer):
        assert state["state1"].dtype == (torch.uint8 if bits == 8 else torch.float32)


def test_states_in_8_bits_take_a_quarter_of_those_in_32(llama, tmp_path):
    def held(name):
        _, optimizer = trained(llama, tmp_path, name, max_steps=1)
        return sum(state[key].nbytes for state in states(optimizer) for key in ("state1", "state2"))

    assert 4 * held("adamw_bnb_8bit") == held("paged_adamw_32bit") == 4 * 2 * 4 * 4096

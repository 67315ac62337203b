"""Two processes train one adapter with DistributedDataParallel; prints what the test asks for as JSON.

torchrun --nproc_per_node 2 train_distributed.py CHECKPOINT
"""

import json
import sys
import warnings

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import qsvft

STEPS = 3


def prepared():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    return qsvft.prepare(model, bits=4, pattern="banded", off_diagonals=2, sides="one", progress=False)


def batch(step, rank):
    return torch.randint(4, 96, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))


def train(model, batches, backward):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for ids in batches:
        backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()


def trained_values(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    model = prepared()
    parallel = accelerator.prepare(model)
    assert isinstance(parallel, DistributedDataParallel)
    factors = {name for name, _ in model.named_buffers() if "qsvft_bases" in name or "qsvft_scale" in name}
    sent = {id(buffer) for buffer in parallel.modules_buffers}
    train(parallel, [batch(step, rank) for step in range(STEPS)], accelerator.backward)
    mine = trained_values(model)
    everyone = accelerator.gather(mine.unsqueeze(0))

    single = prepared()
    train(single, [torch.cat([batch(step, 0), batch(step, 1)]) for step in range(STEPS)], lambda loss: loss.backward())
    expected = trained_values(single)
    if accelerator.is_main_process:
        found = {
            "processes": accelerator.num_processes,
            "factors": len(factors),
            "buffers_sent": len(sent),
            "factors_sent": sum(id(model.get_buffer(name)) in sent for name in factors),
            "ranks_agree": bool(torch.equal(everyone[0], everyone[1])),
            "entries_moved": float((mine != 0).float().mean()),
            "error_to_one_process": float((mine - expected).norm() / expected.norm()),
        }
        print(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main()

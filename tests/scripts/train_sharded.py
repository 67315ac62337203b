"""Two processes train one adapter on a 4-bit base that FSDP shards, and save it; prints what the test asks for as JSON.

torchrun --nproc_per_node 2 train_sharded.py CHECKPOINT TARGET
"""

import json
import sys
import warnings

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import qsvft
from qsvft.lean import by_tiles
from qsvft.storage import nf4_product

STEPS = 3
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def prepared(storage, tile_mlp):
    settings = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=storage)
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    return qsvft.prepare(model, rank=8, tile_mlp=tile_mlp, progress=False)


def batch(step, rank):
    return torch.randint(4, 96, (2, 8), generator=torch.Generator().manual_seed(10 * step + rank))


def train(model, batches):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for ids in batches:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    nf4_product.DENSE_BYTES, nf4_product.LEAST_TOKENS = 1024, 1  # products in slices, as of large weights
    by_tiles.TOKENS = 4  # and MLPs in tiles, as of long sequences
    dist.init_process_group("gloo")
    model, mesh = qsvft.make_shardable(prepared(torch.float32, tile_mlp=True)), init_device_mesh("cpu", (2,))
    for layer in [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, [batch(step, dist.get_rank()) for step in range(STEPS)])
    sharded = sum(isinstance(p, DTensor) for p in model.parameters())
    whole = [name for name, p in model.named_parameters() if ".stored." in name and not isinstance(p, DTensor)]
    factors = [name for name, p in model.named_parameters() if ".stored." in name and isinstance(p, DTensor)]
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(sys.argv[2], state_dict=state)
        single = prepared(torch.uint8, tile_mlp=False)
        train(single, [torch.cat([batch(step, 0), batch(step, 1)]) for step in range(STEPS)])
        expected = {name: p.detach() for name, p in single.named_parameters() if p.requires_grad}
        error = max(float((state[name] - value).norm() / value.norm()) for name, value in expected.items())
        size = sum(float(state[name].norm()) for name in expected)
        found = {"sharded": sharded, "factors": len(factors), "whole_factors": len(whole), "trained": len(expected)}
        print(json.dumps({**found, "size": size, "error_to_one_process": error}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""Run a launcher's script on processors, over gloo: ``accelerate launch --config_file FILE on_cpus.py SCRIPT ...``.

accelerate shards on a card's backend alone; here it takes gloo for one. With QSVFT_TEST_KILL_AT=N the second process is
killed after step N; with QSVFT_TEST_SENT=FILE the first one writes the bytes of each collective of the last step.
"""

import functools
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
import transformers.trainer
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import qsvft
from qsvft.lean import by_tiles

deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
kind = DistributedType.NO if deepspeed else DistributedType.MULTI_GPU
PartialState._prepare_backend = lambda self, *_, **__: ("gloo", kind)
# On a processor FSDP1 frees, or writes over, what it would have copied to a processor.
for config in (FullStateDictConfig, FullOptimStateDictConfig):
    config.offload_to_cpu = property(lambda config: False, lambda config, value: None)


class Sent(TorchDispatchMode):
    """The tensors that each collective is given, as [operation, bytes of each]."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = torch.utils._pytree.tree_leaves(args[:1])
            self.found.append([func.name(), [t.nbytes for t in tensors if isinstance(t, torch.Tensor)]])
        return func(*args, **(kwargs or {}))


sent = Sent()


class InTheMiddle(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        sent.found.clear()

    def on_step_end(self, args, state, control, **_):
        if os.environ["RANK"] == "1" and os.environ.get("QSVFT_TEST_KILL_AT") == str(state.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["RANK"] == "0" and "QSVFT_TEST_SENT" in os.environ:
            Path(os.environ["QSVFT_TEST_SENT"]).write_text(json.dumps(sent.found))


transformers.trainer.DEFAULT_CALLBACKS.append(InTheMiddle)
# MLPs in tiles, as of long sequences: each reads what it trains, wherever a launcher has put that; FSDP1 is refused.
tiled = os.environ.get("FSDP_VERSION", "1") != "1" or os.environ.get("ACCELERATE_USE_FSDP") != "true"
by_tiles.TOKENS, qsvft.from_pretrained = 4, functools.partial(qsvft.from_pretrained, tile_mlp=tiled)

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    with sent:
        runpy.run_path(sys.argv[0], run_name="__main__")

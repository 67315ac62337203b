"""The experiments for PEFT's method comparison are read as its script reads them, and train."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from small_models import load, logits, tokens
from transformers import BitsAndBytesConfig, LlamaConfig

import qsvft
from qsvft.memory.shapes import model_without_values
from qsvft.storage.shapes_only import shapes_only

ROOT = Path(__file__).resolve().parents[1] / "benchmarks" / "method_comparison" / "MetaMathQA"
EXPERIMENTS = sorted((ROOT / "experiments" / "qsvft").iterdir())
# Of the script's parameters of training, in PEFT's method_comparison/MetaMathQA/utils.py.
PARAMETERS = {"model_id", "dtype", "max_seq_length", "batch_size", "max_steps", "use_gc", "seed", "optimizer_kwargs"}
LLAMA_3B = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
RUN = """
import sys
from peft import PeftConfig
config = PeftConfig.from_pretrained(sys.argv[-1])
print(sys.argv[1:], type(config).__name__, config.rank)
"""

each = pytest.mark.parametrize("folder", EXPERIMENTS, ids=lambda folder: folder.name)


def parameters(folder):
    return json.loads((folder / "training_params.json").read_text(encoding="utf-8"))


def trained(folder):
    """What trains of Llama-3.2-3B, counted without values."""
    model = model_without_values(LlamaConfig(**LLAMA_3B))
    with shapes_only():
        model = get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
    return model.get_nb_trainable_parameters()[0]


def test_there_are_experiments_and_the_page_names_each():
    page = (ROOT.parent / "README.md").read_text(encoding="utf-8")
    assert len(EXPERIMENTS) == 4 and all(f"| `{folder.name}` | {trained(folder):,} |" in page for folder in EXPERIMENTS)


@each
def test_an_experiment_is_a_config_of_ours_at_the_rate_that_is_suggested_for_it_or_the_papers(folder):
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, qsvft.QSVFTConfig) and config.task_type == "CAUSAL_LM"
    written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert written.keys() <= config.to_dict().keys()
    chosen = parameters(folder)
    assert chosen.keys() <= PARAMETERS
    rate = 1e-3 if config.unit == "one" else qsvft.suggest_learning_rate(config)
    assert chosen["optimizer_kwargs"] == {"lr": rate, "weight_decay": 0.0}


@each
def test_what_the_script_builds_of_it_begins_at_its_base_and_learns(folder, llama):
    four_bits = parameters(folder).get("dtype") == "int4"
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)} if four_bits else {}
    model = get_peft_model(load(llama, **options), PeftConfig.from_pretrained(str(folder)), autocast_adapter_dtype=True)
    trained, total = model.get_nb_trainable_parameters()
    assert 0 < trained < total
    with model.disable_adapter():
        before = logits(model)
    assert logits(model).equal(before)
    optimizer = torch.optim.AdamW(model.parameters(), **parameters(folder)["optimizer_kwargs"])
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens(), num_items_in_batch=tokens().numel()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    json.dumps(model.peft_config["default"].to_dict())  # as it is put into the results
    with model.disable_adapter():
        assert logits(model).equal(before)


def test_the_script_knows_the_method_without_a_change(tmp_path):
    (tmp_path / "run.py").write_text(RUN, encoding="utf-8")
    folder = ROOT / "experiments" / "qsvft" / "llama-3.2-3B-rank128"
    command = [sys.executable, "-m", "qsvft", "run", "--", "run.py", "-v", str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"{['-v', str(folder)]} QSVFTConfig 128"
    alone = subprocess.run([sys.executable, *command[5:]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert alone.returncode != 0 and "QSVFT" in alone.stderr

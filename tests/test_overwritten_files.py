"""Files that another program overwrites under a live model leave it as it is."""

import pytest
import torch
from peft import PeftModel
from small_models import coefficients, load, logits, randomize, save_llama, state
from transformers import AutoModelForCausalLM

import qsvft


def overwrite(folder):
    """In place, in the same file, as cp does."""
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.write(b"\3" * size)


def unchanged(model, folder):
    before, expected = {name: value.clone() for name, value in state(model).items()}, logits(model)
    overwrite(folder)
    after = state(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "options", [{}, {"bits": 16}, {"bits": 8}, {"residual": True}, {"quantize_embeddings": 8}], ids=str
)
def test_of_a_prepared_directory(tmp_path, options):
    source = save_llama(tmp_path / "source")
    lean = {"quantize_embeddings": 8} if "quantize_embeddings" in options else {}
    made = {name: value for name, value in options.items() if name not in lean}
    folder = qsvft.prepare_checkpoint(source, tmp_path / "made", progress=False, dtype="bfloat16", rank=8, **made)
    unchanged(qsvft.from_pretrained(folder, progress=False, **lean), folder)


def test_of_a_prepared_directory_that_transformers_loads(tmp_path):
    source = save_llama(tmp_path / "source")
    folder = qsvft.prepare_checkpoint(source, tmp_path / "made", progress=False, dtype="bfloat16", rank=8)
    unchanged(AutoModelForCausalLM.from_pretrained(folder), folder)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("options", [{}, {"sides": "one"}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_of_an_adapter_with_its_factors(llama, tmp_path, options, low_cpu_mem_usage):
    model = randomize(qsvft.prepare(load(llama), 4, progress=False, rank=8, include_factors=True, **options))
    model.save_pretrained(tmp_path)
    base = qsvft.quantize(load(llama), 4, progress=False)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert coefficients(loaded)
    unchanged(loaded, tmp_path)

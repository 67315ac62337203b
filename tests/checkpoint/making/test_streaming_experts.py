"""Checkpoints of mixtures are prepared expert by expert, however their files hold the experts."""

import json
import re

import pytest
import torch
import transformers
from needs import need
from safetensors.torch import load_file, save_file
from small_models import logits, same_tensors
from transformers import AutoConfig, AutoModelForCausalLM

import qsvft
from qsvft.checkpoint.making.job import open_job
from qsvft.checkpoint.prepared.model_state import state_of
from qsvft.checkpoint.source.checkpoint import Checkpoint
from qsvft.checkpoint.source.pieces import read_piece

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 96, "num_experts_per_tok": 2}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FAMILIES = {
    # a tensor for each expert and matrix, of which transformers makes one
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    # a gate with one output, an expert for all beside those that are chosen
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    ),
    # the parameters as they are, the other way round, with biases
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 4, "head_dim": 16}),
}
pytestmark = pytest.mark.anywhere


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    model, settings = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SMALL, **settings)
    made = getattr(transformers, model)(config).bfloat16()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    made.save_pretrained(folder)
    return folder


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bits": 8},
        {"target_parameters": EXPERTS},
        {"target_parameters": EXPERTS[1:], "target_modules": [], "sides": "one"},
        {"target_parameters": EXPERTS, "residual": True, "rank_pattern": {"down_proj.[0-9]+": 8}},
        {"target_parameters": EXPERTS[:1], "bits": 16},
    ],
    ids=str,
)
def test_streamed_and_in_memory_give_the_same_bits(source, tmp_path, options):
    options = {"rank": 16, **options}
    folder = qsvft.prepare_checkpoint(source, tmp_path / "prepared", progress=False, **options)
    streamed = qsvft.from_pretrained(folder, verify=True, progress=False)
    model = qsvft.prepare(dense(source), progress=False, **options)
    expected = {name: value.detach() for name, value in state_of(model.get_base_model()).items()}
    assert same_tensors({name: value.detach() for name, value in state_of(streamed.get_base_model()).items()}, expected)
    assert torch.equal(logits(streamed), logits(model))


def test_saved_again_reloaded_with_its_adapter_and_merged(source, tmp_path):
    folder = qsvft.prepare_checkpoint(source, tmp_path / "prepared", rank=16, target_parameters=EXPERTS, progress=False)
    model = qsvft.from_pretrained(folder, progress=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "qsvft_M" in name:
                parameter.normal_(std=0.5)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model().save_pretrained(tmp_path / "again")
    for base in (folder, tmp_path / "again"):
        found = qsvft.from_pretrained(base, adapter=tmp_path / "adapter", progress=False)
        assert torch.equal(logits(found), expected)
    qsvft.export(tmp_path / "adapter", tmp_path / "merged", base=folder, progress=False, format="dense")
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert names == load_file(source / "model.safetensors").keys()  # those that other programs read
    merged = logits(dense(tmp_path / "merged"))
    assert (merged - expected).norm() < 0.1 * expected.norm()


def test_each_expert_is_read_by_itself_and_once(source, tmp_path, monkeypatch):
    job = open_job(source, 4, None, {"rank": 16, "target_parameters": EXPERTS})
    expected, read = dense(source).state_dict(), []
    monkeypatch.setattr(Checkpoint, "read", lambda self, key, _=Checkpoint.read: read.append(key) or _(self, key))
    units = [unit for unit in job.units if unit.layer is not None and ".experts." in unit.name]
    assert len(units) == 2 * 2 * 4
    for unit in units:
        parameter, number = unit.layer.name.rsplit(".", 1)
        for piece in unit.pieces:
            (found,) = read_piece(job.checkpoint, piece, job.source_model).values()
            whole = expected[parameter if found.dim() == 2 else f"{parameter}_bias"][int(number)]
            assert torch.equal(found, whole.t() if found.shape != whole.shape else whole)
    single = [key for key in job.checkpoint.entries if ".experts." in key and job.checkpoint.entries[key].shape[0] != 4]
    assert sorted(single) == sorted(key for key in read if key in single)


def test_a_conversion_of_all_experts_at_once_is_done_once(tmp_path, monkeypatch):
    """Checkpoints of Qwen3-VL-MoE may have the parameters the other way round, which a part of one does not show."""
    need("transformers", "5.8", "converts what a prepared directory holds as if it were a checkpoint")
    torch.manual_seed(0)
    text = {**SMALL, "num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    vision |= {"deepstack_visual_indexes": [0], "patch_size": 4, "num_position_embeddings": 16}
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    transformers.Qwen3VLMoeForConditionalGeneration(config).bfloat16().save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    names = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(names) == 4
    tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in names}
    save_file(tensors, file, {"format": "pt"})
    read: list[str] = []
    monkeypatch.setattr(Checkpoint, "read", lambda self, key, _=Checkpoint.read: read.append(key) or _(self, key))
    options = {"rank": 16, "target_parameters": EXPERTS, "target_modules": ["q_proj"], "progress": False}
    folder = qsvft.prepare_checkpoint(tmp_path / "source", tmp_path / "prepared", **options)
    assert sorted(key for key in read if key in names) == sorted(names)
    kind = transformers.Qwen3VLMoeForConditionalGeneration
    model = qsvft.prepare(kind.from_pretrained(tmp_path / "source", dtype=torch.bfloat16), **options)
    streamed = kind.from_pretrained(folder)
    held = {name: value for name, value in state_of(streamed).items() if not name.startswith("qsvft.")}
    expected = state_of(model.get_base_model())
    assert held.keys() <= expected.keys() and same_tensors(held, {name: expected[name].detach() for name in held})


def test_a_prepared_directory_that_lacks_an_expert_is_refused(source, tmp_path):
    folder = qsvft.prepare_checkpoint(source, tmp_path / "prepared", rank=16, progress=False)
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    lost = files["model.layers.1.mlp.experts.down_proj.3.weight"]
    (folder / lost).unlink()
    with pytest.raises(OSError, match=re.escape(lost)):
        qsvft.from_pretrained(folder, progress=False)

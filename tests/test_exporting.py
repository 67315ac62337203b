"""An adapter that is exported as a LoRA is the same model, in a process that knows nothing of SVFT."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from small_models import load, logits, randomize, save_llama, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

import qsvft
from qsvft.cli.main import app
from qsvft.tuner import QSVFTLinear

FORMS = {
    "dense": {"rank": 8},
    "one-sided": {"rank": 8, "sides": "one"},
    "banded": {"pattern": "banded", "off_diagonals": 2, "rank": 24},
    "top-k, one-sided": {"pattern": "top_k", "rank": 12, "sides": "one"},
    "ranks": {"rank": 8, "rank_pattern": {"q_proj": 12}, "unit": "one"},
}
BATCH = {"input_ids": tokens(), "labels": tokens()}


def adapter(model, folder, scale=1.0):
    randomize(model, scale=scale).save_pretrained(folder)
    return logits(model)


def changes(model):
    return {
        module.module_name: module.get_delta_weight("default")
        for module in model.modules()
        if isinstance(module, QSVFTLinear)
    }


def written(folder):
    """B A of each layer of a LoRA on disk."""
    tensors, config = load_file(folder / "adapter_model.safetensors"), LoraConfig.from_pretrained(folder)
    assert config.lora_alpha == config.r  # its scale is one
    ends = ".lora_A.weight"
    found = {}
    for name in (key.removesuffix(ends) for key in tensors if key.endswith(ends)):
        A, B = tensors[f"{name}{ends}"], tensors[f"{name}.lora_B.weight"]
        assert A.shape[0] == B.shape[1] == config.r
        found[name.removeprefix("base_model.model.")] = B.float() @ A.float()
    return found


@pytest.mark.anywhere
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_the_same_model_on_the_base_as_it_was_held(llama, tmp_path, form, bits):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", bits, progress=False, **FORMS[form])
    expected = adapter(qsvft.from_pretrained(base, progress=False), tmp_path / "adapter")
    found = qsvft.export(tmp_path / "adapter", tmp_path / "lora", base=base, dtype="float32", progress=False)
    assert found.layers == 14 and found.error < 1e-6
    assert found.rank == next(
        rank for rank in (8, 16, 32) if rank >= max(12 if form == "ranks" else 0, FORMS[form]["rank"])
    )
    plain = qsvft.quantize(load(llama, torch.float32), bits, progress=False)
    before = logits(plain)
    assert (expected - before).norm() > 0.05 * before.norm()
    lora = PeftModel.from_pretrained(plain, tmp_path / "lora")
    # int8 rounds what goes into a layer, once more for each change of it
    assert (logits(lora) - expected).norm() < (0.05 if bits == 8 else 1e-5) * (expected - before).norm()


def test_what_the_adapter_brings_along_needs_no_factors_of_the_base(llama, tmp_path):
    model = qsvft.prepare(load(llama), 4, calibration=[BATCH], rank=8, progress=False)
    expected = adapter(model, tmp_path / "adapter")
    delta = changes(model)
    options = {"base": llama, "dtype": "float32", "progress": False}
    found = qsvft.export(tmp_path / "adapter", tmp_path / "held", **options)
    assert found.error < 1e-6 and found.rank == 8
    lora = written(tmp_path / "held")
    assert all(torch.allclose(lora[name], delta[name], atol=1e-5 * float(delta[name].abs().max())) for name in delta)
    held = PeftModel.from_pretrained(qsvft.quantize(load(llama), 4, progress=False), tmp_path / "held")
    assert (logits(held) - expected).norm() < 0.05 * expected.norm()  # bf16
    # On the base before it was rounded nothing is to be given back: what is left is what was learned.
    qsvft.export(tmp_path / "adapter", tmp_path / "original", onto="original", **options)
    original = written(tmp_path / "original")
    zeroed = randomize(model, scale=0.0)
    given_back = changes(zeroed)
    for name in delta:
        assert torch.allclose(
            original[name] + given_back[name], delta[name], atol=1e-5 * float(delta[name].abs().max())
        )
    assert any(given_back[name].norm() > 0 for name in delta)


def test_a_smaller_rank_is_the_best_fit_and_its_error_is_said_before(llama, tmp_path):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=48, progress=False)
    model = qsvft.from_pretrained(base, progress=False)
    adapter(model, tmp_path / "adapter")
    said = []
    found = qsvft.export(
        tmp_path / "adapter", tmp_path / "lora", base=base, rank=16, progress=False, report=said.append, dtype="float32"
    )
    assert said == [found] and list(found.errors) == [8, 16, 32]
    delta = changes(model)
    total = sum(one.double().square().sum() for one in delta.values())
    for rank, error in found.errors.items():
        left = sum(torch.linalg.svdvals(one.double())[rank:].square().sum() for one in delta.values())
        assert error == pytest.approx(float((left / total).sqrt()), rel=1e-4)
    lora = written(tmp_path / "lora")
    off = sum((lora[name] - delta[name]).double().square().sum() for name in delta)
    assert found.error == pytest.approx(float((off / total).sqrt()), rel=1e-4)
    assert found.error == pytest.approx(found.errors[16], rel=1e-4)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert f"| 16 | {found.errors[16]:.2%} |" in card and "tags: [lora, qsvft]" in card
    assert "base_model" not in card  # a place on this machine


def test_rounding_to_16_bits_is_counted(llama, tmp_path):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=8, progress=False)
    model = qsvft.from_pretrained(base, progress=False)
    adapter(model, tmp_path / "adapter")
    found = qsvft.export(tmp_path / "adapter", tmp_path / "lora", base=base, progress=False)
    delta, lora = changes(model), written(tmp_path / "lora")
    off = sum((lora[name] - delta[name]).double().square().sum() for name in delta)
    total = sum(one.double().square().sum() for one in delta.values())
    assert found.error == pytest.approx(float((off / total).sqrt()), rel=1e-3)
    assert 1e-4 < found.error < 5e-3
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()} == {
        torch.bfloat16
    }
    assert LoraConfig.from_pretrained(tmp_path / "lora").target_modules == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_only_the_layers_that_the_adapter_changes_are_named(llama, tmp_path):
    targets = ["layers.0.self_attn.q_proj", "v_proj"]
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=8, target_modules=targets, progress=False)
    expected = adapter(qsvft.from_pretrained(base, progress=False), tmp_path / "adapter")
    qsvft.export(tmp_path / "adapter", tmp_path / "lora", base=base, dtype="float32", progress=False)
    names = {f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)} | {"model.layers.0.self_attn.q_proj"}
    assert LoraConfig.from_pretrained(tmp_path / "lora").target_modules == names
    lora = PeftModel.from_pretrained(qsvft.quantize(load(llama, torch.float32), progress=False), tmp_path / "lora")
    assert (logits(lora) - expected).norm() < 1e-5 * expected.norm()


def test_it_loads_in_a_process_that_never_imports_qsvft(llama, tmp_path):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", 16, rank=8, progress=False)
    expected = adapter(qsvft.from_pretrained(base, progress=False), tmp_path / "adapter")
    qsvft.export(tmp_path / "adapter", tmp_path / "lora", base=base, dtype="float32", progress=False)
    torch.save({"ids": tokens(), "logits": expected}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "expected = torch.load(sys.argv[2] + '/expected.pt')\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2] + '/lora').eval()\n"
        "with torch.no_grad():\n"
        "    found = model(input_ids=expected['ids']).logits\n"
        "assert 'qsvft' not in sys.modules\n"
        "print(bool((found - expected['logits']).norm() < 1e-4 * expected['logits'].norm()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, llama, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_head_that_was_trained_whole_goes_along(tmp_path, llama):
    def model():
        torch.manual_seed(1)
        return AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3, dtype=torch.float32)

    model().save_pretrained(tmp_path / "source")
    base = qsvft.prepare_checkpoint(tmp_path / "source", tmp_path / "base", rank=8, progress=False)
    trained = qsvft.prepare(model(), 4, rank=8, progress=False)
    with torch.no_grad():
        trained.base_model.model.score.modules_to_save["default"].weight.normal_()
    expected = adapter(trained, tmp_path / "adapter")
    qsvft.export(tmp_path / "adapter", tmp_path / "lora", base=base, dtype="float32", progress=False)
    plain = qsvft.quantize(model(), 4, skip_modules=["score"], progress=False)
    lora = PeftModel.from_pretrained(plain, tmp_path / "lora")
    assert (logits(lora) - expected).norm() < 1e-4 * expected.norm()


def test_a_dense_model_is_what_merging_writes(llama, tmp_path):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=8, progress=False)
    expected = adapter(qsvft.from_pretrained(base, progress=False), tmp_path / "adapter")
    found = qsvft.export(tmp_path / "adapter", tmp_path / "dense", format="dense", base=base, progress=False)
    assert found.rank is None
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert (logits(dense) - expected).norm() < 1e-4 * expected.norm()


def test_the_command_shows_the_errors_and_writes(llama, tmp_path):
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", rank=24, progress=False)
    adapter(qsvft.from_pretrained(base, progress=False), tmp_path / "adapter")
    target = tmp_path / "lora"
    result = CliRunner().invoke(
        app, ["export", str(tmp_path / "adapter"), str(target), "--base", str(base), "--rank", "8"]
    )
    assert result.exit_code == 0, result.output
    assert "LoRA of rank 8 on 14 layers" in result.output and "rank   8" in result.output
    assert result.output.index("rank   8") < result.output.index("written:")
    assert (target / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A base and an adapter of it."""
    place = tmp_path_factory.mktemp("exported")
    source = save_llama(place / "source")
    base = qsvft.prepare_checkpoint(source, place / "base", rank=8, progress=False)
    adapter(qsvft.from_pretrained(base, progress=False), place / "adapter")
    return base, place / "adapter"


REFUSED = [
    ({"format": "onnx"}, r"format: expected one of lora, dense, gguf, gguf-lora, got 'onnx'"),
    ({"rank": 10}, r"rank: expected one of 8, 16, .*, or None, got 10"),
    ({"rank": True}, r"rank: expected one of 8"),
    ({"rank": 8, "format": "dense"}, r"rank is a LoRA's"),
    ({"onto": "nothing"}, r"onto: expected one of held, original"),
    ({"dtype": "float64"}, r"dtype: expected one of bfloat16, float16, float32, None"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_what_is_no_option_is_refused(exported, tmp_path, options, message):
    base, folder = exported
    with pytest.raises(ValueError, match=message):
        qsvft.export(folder, tmp_path / "lora", base=base, progress=False, **options)
    assert not (tmp_path / "lora").exists() or not list((tmp_path / "lora").iterdir())


def test_what_loading_refuses_is_refused(exported, tmp_path, llama):
    base, folder = exported
    with pytest.raises(ValueError, match="holds something already"):
        qsvft.export(folder, folder, base=base, progress=False)
    other = qsvft.prepare_checkpoint(
        save_llama(tmp_path / "source", seed=5), tmp_path / "other", rank=8, progress=False
    )
    with pytest.raises(ValueError, match="does not fit the base model"):
        qsvft.export(folder, tmp_path / "lora", base=other, progress=False)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(key for key in tensors if key.endswith("qsvft_M.weight"))
    for values, message in (
        (tensors[name] + 1, "do not match their digest"),
        (tensors[name] * torch.nan, "NaN or Inf"),
    ):
        save_file({**tensors, name: values}, damaged / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            qsvft.export(damaged, tmp_path / "lora", base=base, progress=False)
    save_file({"other": torch.zeros(2)}, damaged / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: found no M in it"):
        qsvft.export(damaged, tmp_path / "lora", base=base, progress=False)
    (damaged / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"damaged: found no adapter_model\.safetensors"):
        qsvft.export(damaged, tmp_path / "lora", base=base, progress=False)
    fields = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (damaged / "adapter_config.json").write_text(json.dumps(fields))
    (damaged / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="names no base model"):
        qsvft.export(damaged, tmp_path / "lora", progress=False)
    assert not (tmp_path / "lora").exists() or not list((tmp_path / "lora").iterdir())


def test_one_layer_of_another_save_is_refused(exported, tmp_path):
    base, folder = exported
    model = qsvft.from_pretrained(base, progress=False)
    adapter(model, tmp_path / "second", scale=2.0)
    first, second = (load_file(one / "adapter_model.safetensors") for one in (folder, tmp_path / "second"))
    mixed = {key: first[key] if "layers.0.self_attn.q_proj" in key else second[key] for key in second}
    save_file(mixed, tmp_path / "second" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="some are of another save"):
        qsvft.export(tmp_path / "second", tmp_path / "lora", base=base, progress=False)


def test_what_no_server_takes_is_refused_by_name(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("qsvft.formats.saved_lora.RANKS", (8, 16, 32))
    base = qsvft.prepare_checkpoint(llama, tmp_path / "base", pattern="plain", progress=False)
    adapter(qsvft.from_pretrained(base, progress=False), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"acts on 64 directions, and servers take LoRA of at most 32; expected rank="):
        qsvft.export(tmp_path / "adapter", tmp_path / "lora", base=base, progress=False)
    assert qsvft.export(tmp_path / "adapter", tmp_path / "lora", base=base, rank=8, progress=False).error > 0.3

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=8, num_local_experts=2)).save_pretrained(
        tmp_path / "m"
    )
    mixture = qsvft.prepare_checkpoint(
        tmp_path / "m", tmp_path / "mixture", rank=8, target_parameters=["experts.down_proj"], progress=False
    )
    adapter(qsvft.from_pretrained(mixture, progress=False), tmp_path / "experts")
    with pytest.raises(ValueError, match=r"experts\.down_proj\.0: is an expert.*format='dense'"):
        qsvft.export(tmp_path / "experts", tmp_path / "other", base=mixture, progress=False)

    residual = qsvft.prepare_checkpoint(llama, tmp_path / "residual", rank=8, residual=True, progress=False)
    model = qsvft.from_pretrained(residual, progress=False)
    adapter(model, tmp_path / "of-residual")
    with pytest.raises(ValueError, match=r"its base is a residual .*onto='original'"):
        qsvft.export(tmp_path / "of-residual", tmp_path / "other", base=residual, progress=False)
    options = {"base": residual, "onto": "original", "dtype": "float32", "progress": False}
    qsvft.export(tmp_path / "of-residual", tmp_path / "onto-original", **options)
    delta, lora = changes(model), written(tmp_path / "onto-original")
    assert all(torch.allclose(lora[name], delta[name], atol=1e-5 * float(delta[name].abs().max())) for name in delta)

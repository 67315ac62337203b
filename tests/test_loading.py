"""A prepared directory loads without a decomposition, and is the same bit for bit after every round trip."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import coefficients, load, logits, randomize, same_tensors, save_llama, state, tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import qsvft


def prepared(source, target, **options):
    return qsvft.prepare_checkpoint(source, target, progress=False, **options)


def loaded(folder, **options):
    return qsvft.from_pretrained(folder, progress=False, **options)


def stored_names(folder):
    """Names of all tensors in a directory's files, each as often as it is there."""
    return sorted(name for file in folder.glob("*.safetensors") for name in load_file(file))


def kept(cache):
    """The prepared directories of a cache."""
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def factors(model):
    return {name: value.clone() for name, value in model.qsvft_factors.tensors().items()}


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    """A llama prepared with the defaults."""
    return prepared(llama, tmp_path_factory.mktemp("prepared") / "llama")


@pytest.fixture(scope="module")
def one_sided_folder(llama, tmp_path_factory):
    """One prepared for the one-sided form."""
    return prepared(llama, tmp_path_factory.mktemp("one-sided") / "llama", sides="one")


@pytest.fixture(params=["folder", "one_sided_folder"])
def each_folder(request):
    """Both."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def no_decomposition(monkeypatch):
    """Whatever decomposes or quantises fails."""
    for name in ("eigh", "svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, lambda *args, **options: pytest.fail("decomposed"))
    monkeypatch.setattr(qsvft.storage.quantization, "_quantized_layer", lambda *args: pytest.fail("quantised"))
    return monkeypatch


BANDED = {"pattern": "banded"}
ONE_SIDED = [
    {"sides": "one"},
    {"bits": 8, "rank": 16, "sides": "one"},
    {"bits": 16, "rank": 16, "sides": "one"},
    {"factor_bits": 4, "sides": "one"},
    {"factor_bits": 8, "sides": "one", "rank_pattern": {"k_proj": 12}},
    {"decomposition": "randomized", "rank": 12, "sides": "one"},
]
TWO_SIDED = [
    {},
    {"factor_bits": 16},
    {"factor_bits": 8, "rank": 16},
    {"residual": True, "rank": 24, "factor_bits": 4},
]
FORMS = [*ONE_SIDED, *TWO_SIDED]


@pytest.mark.anywhere
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("of_M", [{}, BANDED], ids=str)
def test_a_prepared_directory_gives_the_model_that_prepare_gives(llama, tmp_path, options, of_M):
    model = loaded(prepared(llama, tmp_path / "prepared", **options), **of_M)
    held = {"factor_bits": 8, **options}  # a directory for a dense M serves a band as it is
    expected = qsvft.prepare(load(llama, torch.float32), progress=False, **held, **of_M)
    assert torch.equal(logits(randomize(model)), logits(randomize(expected)))
    assert same_tensors(state(model), state(expected))


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_loading_decomposes_nothing(llama, tmp_path, options, request):
    folder = prepared(llama, tmp_path / "prepared", **options)
    request.getfixturevalue("no_decomposition")
    assert loaded(folder).peft_config["default"].sides == ("one" if options in ONE_SIDED else "both")


@pytest.mark.anywhere
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_bitwise_equal_after_every_round_trip(llama, tmp_path, options):
    folder = prepared(llama, tmp_path / "prepared", **options)
    first = AutoModelForCausalLM.from_pretrained(folder)
    first.save_pretrained(tmp_path / "second")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    second.save_pretrained(tmp_path / "third", max_shard_size="20KB")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "third")
    for other in (second, third):
        assert same_tensors(state(first), state(other))
        assert same_tensors(factors(first), factors(other))
        assert torch.equal(logits(first), logits(other))
    assert (tmp_path / "second" / "config.json").read_bytes() == (tmp_path / "third" / "config.json").read_bytes()
    assert len(list((tmp_path / "third").glob("*.safetensors"))) > 1


@pytest.mark.anywhere
def test_saved_with_an_adapter_it_is_the_same_directory(each_folder, tmp_path):
    model = randomize(loaded(each_folder))
    model.get_base_model().save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    plain = AutoModelForCausalLM.from_pretrained(each_folder)
    assert stored_names(tmp_path / "again") == stored_names(each_folder)
    assert same_tensors(state(plain), state(again))
    assert same_tensors(factors(plain), factors(again))


@pytest.mark.anywhere
@pytest.mark.parametrize("options", [*ONE_SIDED[3:5], *TWO_SIDED], ids=str)
def test_a_model_prepared_in_memory_is_saved_as_a_prepared_directory(llama, tmp_path, options):
    model = randomize(qsvft.prepare(load(llama, torch.float32), progress=False, **options))
    model.get_base_model().save_pretrained(tmp_path / "saved")
    streamed = AutoModelForCausalLM.from_pretrained(prepared(llama, tmp_path / "streamed", **options))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert stored_names(tmp_path / "saved") == stored_names(tmp_path / "streamed")
    assert same_tensors(state(saved), state(streamed))
    assert same_tensors(factors(saved), factors(streamed))
    assert saved.config.quantization_config.to_dict() == streamed.config.quantization_config.to_dict()


@pytest.mark.anywhere
def test_m_at_zero_gives_the_quantised_base_bit_for_bit(llama, each_folder):
    base = qsvft.quantize(load(llama, torch.float32), progress=False)
    assert torch.equal(logits(loaded(each_folder)), logits(base))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(each_folder)), logits(base))


@pytest.mark.anywhere
def test_peft_and_adapters_by_name_know_the_directory(each_folder, tmp_path):
    model = randomize(loaded(each_folder))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(each_folder)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert same_tensors(coefficients(again), coefficients(model))
    onto = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(each_folder), tmp_path / "adapter")
    assert torch.equal(logits(onto), logits(model))


@pytest.mark.anywhere
def test_an_adapter_instead_of_a_new_one(each_folder, tmp_path, no_decomposition):
    model = randomize(loaded(each_folder))
    model.save_pretrained(tmp_path / "adapter")
    again = loaded(each_folder, adapter=tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert all(p.requires_grad for name, p in again.named_parameters() if "qsvft_M" in name)
    with pytest.raises(ValueError, match=r"has a config of its own; expected no other, got \['rank'\]"):
        loaded(each_folder, adapter=tmp_path / "adapter", rank=8)


def test_it_trains_and_its_adapter_comes_back(each_folder, tmp_path):
    model = loaded(each_folder)
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(tmp_path / "run", max_steps=3, learning_rate=0.05, report_to=[], use_cpu=True)
    before = logits(model)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert not torch.equal(logits(model), before)
    trainer.save_model(tmp_path / "adapter")
    assert torch.equal(logits(loaded(each_folder, adapter=tmp_path / "adapter")), logits(model))


def test_other_heads_load_from_it(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert model(input_ids=tokens()).logits.shape == (2, 3)
    assert qsvft.memory.held.held_bytes(model)["base"] > 0


@pytest.mark.parametrize("rank", [64, 32, 12])
def test_fewer_directions_are_the_first_of_those_stored(each_folder, no_decomposition, rank):
    model = loaded(each_folder, rank=rank, rank_pattern={"k_proj": 12, "v_proj": 12})
    assert model.base_model.model.model.layers[0].self_attn.o_proj.pattern("default").rank == rank


def test_a_directory_of_both_factors_serves_the_one_sided_form(llama, folder, no_decomposition):
    model = randomize(loaded(folder, sides="one"))
    assert {len(m.qsvft_bases) for m in model.modules() if hasattr(m, "qsvft_bases")} == {1}
    no_decomposition.undo()
    expected = randomize(qsvft.prepare(load(llama, torch.float32), sides="one", progress=False))
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("one_sided_folder", {"factor_bits": 4}, "q_proj: the options need 64 directions under 'V_nf4', found none"),
        ("one_sided_folder", {"sides": "both"}, "q_proj: the options need 64 directions under 'U_int8', found none"),
        ("folder", {"factor_bits": 4}, "q_proj: the options need 64 directions under 'V_nf4', found none"),
    ],
)
def test_what_would_have_to_be_decomposed_is_refused(where, options, message, request):
    folder = request.getfixturevalue(where)
    with pytest.raises(ValueError, match=message):
        loaded(folder, **options)


def test_other_bits_than_held_are_refused(folder):
    with pytest.raises(ValueError, match="holds its weights in 4 bits, bits=8 was asked for"):
        loaded(folder, bits=8)


def test_options_that_are_not_about_factors_are_free(folder, no_decomposition):
    model = loaded(folder, pattern="plain", unit="one", gradient_checkpointing=False, quantize_embeddings=8)
    assert model.peft_config["default"].pattern == "plain"
    assert model.get_input_embeddings().stored.bits == 8


def test_get_peft_model_takes_stored_factors_too(folder, no_decomposition):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), qsvft.QSVFTConfig(rank=16))
    assert model.base_model.model.model.layers[0].mlp.up_proj.pattern("default").rank == 16


def test_a_copy_of_the_model_has_its_factors(folder, no_decomposition):
    model = copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder))
    assert get_peft_model(model, qsvft.QSVFTConfig(rank=16)) is not None


def test_an_ordinary_checkpoint_is_prepared_once(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("QSVFT_CACHE", str(tmp_path / "cache"))
    first = loaded(llama, bits=4, rank=16)
    found = kept(tmp_path / "cache")
    assert len(found) == 1
    monkeypatch.setattr(qsvft.checkpoint.making.job.Job, "do", lambda *args: pytest.fail("prepared again"))
    second = loaded(llama, bits=4, rank=16)
    assert kept(tmp_path / "cache") == found
    assert same_tensors(state(first), state(second))


@pytest.mark.anywhere
def test_an_adapter_says_how_its_base_is_prepared(llama, tmp_path, monkeypatch):
    model = randomize(qsvft.prepare(load(llama, torch.float32), 8, sides="both", rank=16, progress=False))
    model.save_pretrained(tmp_path / "adapter")
    again = loaded(llama, adapter=tmp_path / "adapter", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(again), logits(model))
    monkeypatch.setattr(torch.linalg, "eigh", lambda *args: pytest.fail("decomposed"))
    assert torch.equal(logits(loaded(llama, adapter=tmp_path / "adapter", cache_dir=tmp_path / "cache")), logits(model))


def test_other_options_and_another_source_are_kept_apart(llama, other_llama, tmp_path):
    for source, options in ((llama, {}), (llama, {"rank": 16}), (other_llama, {}), (llama, {"bits": 8})):
        loaded(source, cache_dir=tmp_path, **options)
    assert len(kept(tmp_path)) == 4


def test_an_interrupted_preparation_in_the_cache_goes_on(llama, tmp_path, monkeypatch):
    do, done = qsvft.checkpoint.making.job.Job.do, []

    def stopping(self, number, *args):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(number)
        return do(self, number, *args)

    with monkeypatch.context() as patch:
        patch.setattr(qsvft.checkpoint.making.job.Job, "do", stopping)
        with pytest.raises(KeyboardInterrupt, match="run the same again"):
            loaded(llama, cache_dir=tmp_path)
    loaded(llama, cache_dir=tmp_path)
    assert len(kept(tmp_path)) == 1


AT_ONCE = """
import sys, qsvft
if sys.argv[3] == "first":
    do = qsvft.checkpoint.making.job.Job.do

    def slow(*args):
        print("at work", flush=True)
        if sys.stdin.readline() == "":
            raise SystemExit("no leave to go on")
        return do(*args)

    qsvft.checkpoint.making.job.Job.do = slow
else:
    qsvft.checkpoint.making.job.Job.do = None
model = qsvft.from_pretrained(sys.argv[1], rank=16, cache_dir=sys.argv[2], progress=False)
print("loaded", sum(float(p.double().sum()) for p in model.state_dict().values()))
"""


@pytest.mark.slow
def test_of_two_processes_one_prepares_and_the_other_waits(llama, tmp_path):
    """The second cannot prepare at all; it begins while the first is at its first matrix, and says that it waits."""

    def start(which):
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", AT_ONCE, llama, tmp_path, which],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start("first") as first:
        assert first.stdout.readline() == "at work\n"
        with start("second") as second:
            waiting = next((line for line in second.stderr if "waiting for it" in line), None)
            assert waiting is not None and str(tmp_path) in waiting
            results = [first.communicate("\n" * 100)[0], second.communicate()[0]]
    assert results[0].splitlines()[-1].startswith("loaded")
    assert results[1].splitlines()[-1] == results[0].splitlines()[-1]
    assert len(kept(tmp_path)) == 1


HUB = """
import sys, qsvft
for name in ("someone/tiny", "someone/prepared"):
    model = qsvft.from_pretrained(name, rank=16, progress=False)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    print(layer.pattern("default").rank, model.qsvft_factors is not None)
"""


@pytest.mark.slow
def test_hub_ids_of_either_kind(llama, tmp_path):
    """From huggingface_hub's cache, without a network."""
    folder = prepared(llama, tmp_path / "prepared", rank=16)
    for name, source in (("tiny", llama), ("prepared", folder)):
        place = tmp_path / "hf" / "hub" / f"models--someone--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        shutil.copytree(source, place / "snapshots" / ("0" * 40))
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "QSVFT_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HUB], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["16", "True"] * 2, done.stderr[-2000:]
    assert len(kept(tmp_path / "cache")) == 1


@pytest.fixture
def changeable(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "changeable")
    return tmp_path / "changeable"


def rewrite(folder, change):
    """Change tensors in the file that holds them."""
    for path in folder.glob("*.safetensors"):
        changed = change(load_file(path))
        if changed is not None:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            save_file(changed, path, metadata)


def test_damaged_factors_are_refused_by_name(changeable):
    name = "qsvft.model/layers/1/self_attn/o_proj.V_int8.codes"
    rewrite(changeable, lambda t: {**t, name: t[name][:, :-1].contiguous()} if name in t else None)
    with pytest.raises(ValueError, match=r"found 'qsvft\S+o_proj\.V_int8\.codes' as I8 of shape \[64, 63\]; expected"):
        loaded(changeable)


def test_a_newer_format_is_refused(changeable):
    config = json.loads((changeable / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (changeable / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"format_version 99, this qsvft .* reads 1. Upgrade qsvft"):
        loaded(changeable)


@pytest.mark.parametrize(("field", "value"), [("bits", 5), ("compute_dtype", "int8")])
def test_damaged_records_are_refused(changeable, field, value):
    config = json.loads((changeable / "config.json").read_text())
    config["quantization_config"][field] = value
    (changeable / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{field}={value!r}, expected .* config.json is damaged"):
        AutoModelForCausalLM.from_pretrained(changeable)


def test_half_a_directory_is_no_model(changeable):
    (changeable / "model.safetensors.index.json").unlink()
    with pytest.raises((OSError, ValueError)):
        loaded(changeable)


def test_a_state_dict_without_its_directory_is_refused(folder):
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"found a state dict, expected the files of a prepared directory"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict={})


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Wide enough for threads to divide the work and for sums to come in another order."""
    return save_llama(
        tmp_path_factory.mktemp("wide"),
        hidden_size=256,
        intermediate_size=320,
        num_hidden_layers=1,
        num_attention_heads=4,
    )


def test_a_directory_of_all_directions_serves_the_default_rank(wide, tmp_path, monkeypatch):
    """Where auto, asked anew, would take randomized directions of that rank: those held are exact."""
    monkeypatch.setattr("qsvft.maths.decomposition._RANDOMIZED_FROM", 256)
    monkeypatch.setattr("qsvft.maths.decomposition._RANDOMIZED_UP_TO", 1 / 2)
    folder = prepared(wide, tmp_path / "prepared", pattern="banded", sides="one")
    model = loaded(folder)
    layer = model.base_model.model.model.layers[0].self_attn.o_proj
    assert list(layer.qsvft_bases) == ["V_bf16"] and layer.pattern("default").rank == 128
    assert loaded(folder, pattern="banded").peft_config["default"].rank is None


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


OF_THREADS = [{"sides": "one", **BANDED}, {"sides": "both", **BANDED}, {}]


@pytest.mark.parametrize("options", OF_THREADS, ids=["one-sided", "two-sided", "default"])
def test_an_adapter_trained_on_one_preparation_runs_on_the_others(wide, tmp_path, threads, options):
    of_M = {name: value for name, value in options.items() if name == "pattern"}
    first = loaded(prepared(wide, tmp_path / "first", **options, dtype="bfloat16"), **of_M)
    optimizer = torch.optim.AdamW((p for p in first.parameters() if p.requires_grad), lr=0.05)
    for step in range(5):
        ids = tokens(seed=step)
        first(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    first.save_pretrained(tmp_path / "adapter")
    expected = logits(first).float()
    change = expected - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "first")).float()
    threads(2)
    prepared(wide, tmp_path / "threads", **options, dtype="bfloat16")
    threads(1)
    bases = {
        "other threads": AutoModelForCausalLM.from_pretrained(tmp_path / "threads"),
        "in memory": qsvft.quantize(load(wide, torch.bfloat16), progress=False),
    }
    for how, base in bases.items():
        found = logits(PeftModel.from_pretrained(base, tmp_path / "adapter")).float()
        difference = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(change)
        assert float(difference) < 1e-3, how


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_checkpoints_json_that_was_cut_off_is_named_with_the_place_where_it_ends(llama, tmp_path, name):
    folder = tmp_path / "cut"
    shutil.copytree(llama, folder)
    (folder / name).write_text('{"a": 1, "b": ')
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder / name))}.*line 1 column 15"):
        qsvft.from_pretrained(folder, rank=4, cache_dir=tmp_path / "cache")

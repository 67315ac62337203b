"""A recipe becomes an adapter: what is said before, what lies there afterwards, and where a run goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from needs import is_before
from rows_of import TEMPLATE, give_template, write_rows
from safetensors.torch import load_file
from small_models import coefficients, logits, same_tensors, save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import qsvft
from qsvft.options.recipe import load_yaml
from qsvft.storage.only_process import only_process
from qsvft.training import train as module
from qsvft.training.begun import LOCK
from qsvft.training.checkpoints import last_whole
from qsvft.training.evaluate import evaluate
from qsvft.training.forecast import Forecast
from qsvft.training.train import TrainingError, train

# Two steps are what is needed to see anything move: in the first the rate is zero.
FEW = {
    "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "eval_share": 0.2,
    "save_steps": 1, "warmup_steps": 0, "rank": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base with a chat template, a cache, and room for runs."""
    folder = tmp_path_factory.mktemp("training")
    give_template(save_llama(folder / "base"))
    return folder


def recipe(place, name, kind="text", **options):
    data = write_rows(place, kind)
    own = {
        "model": str(place / "base"),
        "dataset": str(data),
        "output": str(place / name),
        "cache_dir": str(place / "cache"),
    }
    return {**own, **FEW, **options}


@pytest.fixture(scope="module")
def run(place):
    """A run of four steps, and what it said."""
    said: list[str] = []
    done = train(recipe(place, "run"), say=said.append)
    return done, "\n".join(said)


def M_in(folder):
    saved = load_file(folder / "adapter_model.safetensors")
    found = {name: tensor for name, tensor in saved.items() if "qsvft_M" in name}
    assert len(found) == 14 and all(M.any() for M in found.values())
    return found


def test_what_it_will_take_is_said_before_and_each_loss_on_the_way(run):
    _, said = run
    for words in (
        "trained: ", "20 rows and 4 held out; 7 tokens in the middle, 7 at most of 20 looked at",
        "steps:   4 of 2 x 1 rows, learning rate 0.02", "predicted at 2 x 7 tokens", "factors", "time:    roughly",
        "step 0 of 4: held out", "step 4 of 4: loss",
    ):  # fmt: skip
        assert words in said, said
    assert said.index("predicted") < said.index("step 0")


def test_the_forecast_is_the_ledgers(run, place):
    said = train(recipe(place, "nowhere"), dry_run=True, say=lambda text: None)
    assert isinstance(said, Forecast) and not (place / "nowhere").exists()
    method = "qsvft:rank=8,basis=data,residual=true"
    expected = qsvft.profile(str(place / "base"), [method], batch_size=2, seq_len=7).rows[0]
    assert (said.step.row.peak_bytes, said.step.row.categories) == (expected.peak_bytes, expected.categories)
    model = qsvft.load(place / "run", cache_dir=place / "cache", progress=False)
    assert said.step.row.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_what_lies_there_is_an_adapter_with_its_recipe_its_losses_and_its_tokenizer(run, place):
    done, _ = run
    assert done.folder == place / "run" and done.steps == 4
    assert {path.name for path in done.folder.iterdir()} >= {
        "adapter_model.safetensors", "recipe.yaml", "losses.png", "trainer_state.json", "checkpoint-4", "tokenizer.json"
    }  # fmt: skip
    assert (done.folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    history = json.loads((done.folder / "trainer_state.json").read_text())["log_history"]
    losses = [log["eval_loss"] for log in history if "eval_loss" in log]
    assert (done.before, done.after) == (losses[0], losses[-1])
    assert done.after < done.before


def test_what_was_trained_is_loaded_and_its_loss_is_the_trainers(run, place):
    done, _ = run
    model = qsvft.load(done.folder, cache_dir=place / "cache", progress=False)
    rows = module.plan_of(module.read_recipe(recipe(place, "elsewhere"))).rows
    found = evaluate(model, AutoTokenizer.from_pretrained(done.folder), rows.held_out, progress=False)
    # Trainer divided by the tokens of whole rows before, the first one's among them, of which there is no loss.
    counted = found.tokens + (found.rows if is_before("transformers", "5.11") else 0)
    assert found.loss * found.tokens / counted == pytest.approx(done.after, rel=1e-3)
    assert found.rows == len(rows.held_out)


def test_the_recipe_that_was_kept_gives_the_same_adapter(run, place):
    done, _ = run
    train(
        {**load_yaml((done.folder / "recipe.yaml").read_text()), "output": str(place / "again")}, say=lambda text: None
    )
    assert same_tensors(M_in(place / "again"), M_in(done.folder))


class _Killed(BaseException):
    pass


class _KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise _Killed


def killed_at(step, monkeypatch, given):
    """A run whose process comes to its end in the middle of a step."""
    trainer = module._trainer

    def with_a_kill(plan, say):
        made = trainer(plan, say)
        made.add_callback(_KillAt(step))
        return made

    with monkeypatch.context() as patch:
        patch.setattr(module, "_trainer", with_a_kill)
        with pytest.raises(_Killed):
            train(given, say=lambda text: None)


def test_a_run_that_was_killed_goes_on_from_the_last_whole_checkpoint(run, place, monkeypatch):
    given = recipe(place, "killed")
    killed_at(3, monkeypatch, given)
    folder = place / "killed"
    assert last_whole(folder) == folder / "checkpoint-2"
    # As a kill in the middle of saving would leave it.
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-3")
    (folder / "checkpoint-3" / "trainer_state.json").write_text('{"epoch": ')
    said: list[str] = []
    done = train(given, say=said.append)
    assert f"goes on after step 2, from {folder / 'checkpoint-2'}" in said
    assert done.steps == 4
    assert same_tensors(M_in(folder), M_in(run[0].folder))


@pytest.mark.parametrize("damaged", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_checkpoint_with_half_a_file_is_not_whole(run, tmp_path, damaged):
    done, _ = run
    for number in (3, 4):
        shutil.copytree(done.folder / "checkpoint-4", tmp_path / f"checkpoint-{number}")
    assert last_whole(tmp_path) == tmp_path / "checkpoint-4"
    content = (tmp_path / "checkpoint-4" / damaged).read_bytes()
    (tmp_path / "checkpoint-4" / damaged).write_bytes(content[: len(content) // 2])
    assert last_whole(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("parts", [1, 2])
def test_a_checkpoint_of_a_whole_model_is_whole_with_all_its_files(llama, tmp_path, parts):
    folder = tmp_path / "checkpoint-1"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(folder, max_shard_size="1GB" if parts == 1 else "200KB")
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (parts > 1)
    (folder / "trainer_state.json").write_text("{}")
    assert last_whole(tmp_path) == folder
    files[-1].write_bytes(files[-1].read_bytes()[:-8])
    assert last_whole(tmp_path) is None
    files[-1].unlink()
    assert last_whole(tmp_path) is None


def test_of_two_processes_one_trains_into_a_directory(run, place):
    other = recipe(place, "one at a time")
    folder = Path(other["output"])
    folder.mkdir()
    with (
        only_process(folder / LOCK, "training", "output"),
        pytest.raises(ValueError, match="another process is training"),
    ):
        train(other)
    assert list(folder.iterdir()) == []
    (folder / LOCK).touch()  # as of a process that was killed before it wrote anything
    train({**other, "max_steps": 1})
    assert not (folder / LOCK).exists() and not (run[0].folder / LOCK).exists()


def test_a_directory_that_holds_something_else_is_refused_and_left_as_it_is(run, place, tmp_path):
    done, _ = run
    with pytest.raises(ValueError, match="found a run that came to its end; expected another place"):
        train(recipe(place, "run"))
    (done.folder / "trainer_state.json").rename(tmp_path / "state")
    with pytest.raises(ValueError, match="found a run with rank=8; expected the same recipe"):
        train(recipe(place, "run", rank=4))
    (tmp_path / "state").rename(done.folder / "trainer_state.json")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="found files of something else"):
        train({**recipe(place, "x"), "output": str(tmp_path / "full")})
    with pytest.raises(ValueError, match="found a file; expected a directory"):
        train({**recipe(place, "x"), "output": str(tmp_path / "full" / "thesis.txt")})
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("prompt", {}),
        ("messages", {}),
        ("question", {"templates": {"prompt": "{question} ", "completion": "{answer}"}}),
        ("text", {"packing": True, "max_length": 16}),
        ("preference", {"method": "dpo"}),
        ("text", {"bits": 16, "calibration": 0, "pattern": "banded", "sides": "one", "off_diagonals": 2}),
        ("text", {"bits": 8, "dtype": "float32"}),
        ("text", {"fit": "8GiB", "rank": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)),
)
def test_each_form_of_data_and_each_kind_of_base_trains(place, tmp_path, kind, options):
    given = {**recipe(place, "x", kind, **options), "output": str(tmp_path / "run"), "max_steps": 2}
    done = train(given, say=lambda text: None)
    assert done.steps == 2 and done.after != done.before
    assert all(
        M.any() and torch.isfinite(M).all()
        for M in coefficients(qsvft.load(done.folder, cache_dir=place / "cache")).values()
    )


@pytest.mark.parametrize("basis", ["singular", "data"])
def test_a_prepared_directory_trains_with_what_it_was_prepared_for(place, tmp_path, basis):
    options = {"rank": 16} if basis == "singular" else {"basis": "data"}
    qsvft.prepare_checkpoint(place / "base", tmp_path / "prepared", dtype="bfloat16", progress=False, **options)
    for path in (place / "base").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "prepared")
    given = {**recipe(place, "x"), "model": str(tmp_path / "prepared"), "output": str(tmp_path / "run"), "max_steps": 2}
    del given["rank"]
    plan = module.plan_of(module.read_recipe(given))
    assert plan.config.learning_rate == (4e-2 if basis == "singular" else 2e-2)
    done = train(given, say=lambda text: None)
    config = qsvft.QSVFTConfig.from_pretrained(done.folder)
    assert (config.basis, config.residual) == (basis, False)
    assert plan.forecast.step.row.trainable_parameters == sum(M.numel() for M in M_in(done.folder).values())


def test_a_base_in_other_bits_than_a_prepared_directory_has_is_refused(place, tmp_path):
    qsvft.prepare_checkpoint(place / "base", tmp_path / "prepared", progress=False)
    given = {**recipe(place, "x", bits=16), "model": str(tmp_path / "prepared"), "output": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="holds its weights in 4 bits"):
        train(given, say=lambda text: None)


@pytest.mark.parametrize(
    ("environment", "split"),
    [({}, False), ({"ACCELERATE_USE_FSDP": "true"}, True), ({"ACCELERATE_USE_DEEPSPEED": "true"}, True),
     ({"ACCELERATE_USE_FSDP": "false", "WORLD_SIZE": "2"}, False)],
)  # fmt: skip
def test_a_base_is_made_splittable_where_the_launcher_splits_it(monkeypatch, environment, split):
    """Under DDP nothing is, and an int8 base trains there."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert module.weights_are_split() is split


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_a_checkpoint_in_fp32_is_held_in_bf16_unless_it_is_to_stay(place, dtype, expected):
    plan = module.plan_of(module.read_recipe(recipe(place, "x", dtype=dtype)))
    assert module._model(plan).dtype == expected
    assert (plan.forecast.step.row.error is None) == (dtype is None)


def test_the_loss_of_a_conversation_is_on_what_the_assistant_says(place):
    """By the template's own marks where it has some, turn by turn where it has none."""
    given = module.read_recipe(recipe(place, "x", "messages"))
    by_turn = module.plan_of(given)
    assert by_turn.rows.columns == ("prompt", "completion") and len(by_turn.rows.train) == 40
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    said = "{{ turn.content }}"
    marked = "{% generation %}" + said + "{% endgeneration %}"
    marked = "{% if turn.role == 'assistant' %}" + marked + "{% else %}" + said + "{% endif %}"
    tokenizer.chat_template = TEMPLATE.replace("{{ turn.content + ' ' }}", f"{marked}{{{{ ' ' }}}}")
    rows, arguments = module_with_answers(given, tokenizer)
    assert rows.columns == ("messages",) and arguments["assistant_only_loss"] is True


def module_with_answers(given, tokenizer):
    from qsvft.training.data import load_rows
    from qsvft.training.plan import with_answers

    return with_answers(load_rows(given.run), tokenizer, given.arguments)


def test_a_conversation_needs_a_template(place, llama):
    with pytest.raises(ValueError, match=r"has no chat template; expected one\. Give chat_template_path"):
        train({**recipe(place, "x", "messages"), "model": str(llama)})


def test_an_adapter_is_trained_on(run, place, tmp_path):
    done, _ = run
    given = {**recipe(place, "x", adapter=str(done.folder)), "output": str(tmp_path / "on"), "model": None}
    on = train(given, say=lambda text: None)
    assert on.before == pytest.approx(done.after, rel=1e-3)
    assert on.after < on.before


def test_a_nan_ends_it_and_keeps_the_adapter_as_it_was(place, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    given = {**recipe(place, "x", learning_rate=1e30, max_grad_norm=0.0), "output": str(tmp_path / "run")}
    with pytest.raises(TrainingError, match="is NaN or Inf; expected finite numbers") as failed:
        train(given, say=lambda text: None)
    assert "The last whole checkpoint is" in str(failed.value)
    assert (tmp_path / "run" / "before-nan" / "adapter_model.safetensors").is_file()


def test_ctrl_c_says_where_it_goes_on(place, tmp_path, monkeypatch):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "StopAtNaN", Stop)
    with pytest.raises(TrainingError, match=r"interrupted\. The last whole checkpoint is .*checkpoint-1: the same"):
        train({**recipe(place, "x"), "output": str(tmp_path / "run")}, say=lambda text: None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": "fast"}, "learning_rate: expected float, got 'fast'"),
        ({"max_steps": 2.5}, "max_steps: expected int, got 2.5"),
        ({"packing": 1}, "packing: expected bool, got 1"),
        ({"report_to": "wandb"}, "report_to: found 'wandb', which is not installed; expected an installed one"),
        ({"eval_strategy": "sometimes"}, "SFTConfig: sometimes is not a valid"),
        ({"fit": "0.1GiB"}, "nothing fits"),
        ({"model": "/no/such/model"}, "unknown model '/no/such/model': it is no directory"),
        ({"target_modules": ["nothing"]}, "nothing"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(place, options, words):
    with pytest.raises(ValueError, match=words):
        train(recipe(place, "wrong", **options), say=lambda text: None)
    assert not (place / "wrong").exists()


def test_a_step_that_does_not_fit_the_card_is_refused_with_advice(place, monkeypatch):
    monkeypatch.setattr("qsvft.training.forecast.present_card", lambda: 2**29)
    with pytest.raises(ValueError, match=r"need 0\.75 GiB of a card, and this one has 0\.5; .*--fit 0\.5GiB"):
        train(recipe(place, "wrong"), say=lambda text: None)


def test_a_step_that_this_machine_cannot_hold_is_refused(place, monkeypatch):
    monkeypatch.setattr("qsvft.training.forecast.psutil.virtual_memory", lambda: type("Room", (), {"total": 2**10})())
    with pytest.raises(ValueError, match=r"and this machine has 0\.00; expected less"):
        train(recipe(place, "wrong"), say=lambda text: None)


def test_the_trained_adapter_is_what_its_answer_comes_from(run, place):
    from qsvft.chat import Chat

    done, _ = run
    model = qsvft.load(done.folder, cache_dir=place / "cache", progress=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    chat, pieces = Chat(model, tokenizer, max_new_tokens=4, do_sample=False), []
    answer = chat.say("w8 w9", pieces.append)
    assert "".join(pieces) == answer
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w8 w9"}], return_tensors="pt", return_dict=True
    )
    expected = logits(model, inputs["input_ids"])[0, -1].argmax()
    assert answer.split()[0] == tokenizer.decode(expected)
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    chat.say("w10")
    assert [turn["content"] for turn in chat.turns][:3] == ["w8 w9", answer, "w10"]


def test_without_a_template_a_text_goes_on(llama):
    from qsvft.chat import Chat

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    answer = Chat(model, tokenizer, max_new_tokens=1, do_sample=False).say("w8 w9")
    expected = logits(model, tokenizer("w8 w9", return_tensors="pt")["input_ids"])[0, -1].argmax()
    assert answer == tokenizer.decode(expected)

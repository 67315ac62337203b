"""The loss of rows that were not trained on is that of what is to be said, token by token."""

import json

import pytest
import torch
from datasets import Dataset
from rows_of import give_template, rows_of
from small_models import save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qsvft.cli.main import app
from qsvft.training.evaluate import evaluate
from qsvft.training.tokens import IGNORED, batches, encoded


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    folder = save_llama(tmp_path_factory.mktemp("llama"))
    give_template(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def expected_loss(model, pairs):
    """Σ -log p over what is said, in fp64, a row at a time."""
    total, count = 0.0, 0
    for before, said in pairs:
        ids = torch.tensor([before + said])
        with torch.no_grad():
            p = model(input_ids=ids).logits.double().log_softmax(-1)[0]
        places = range(max(len(before), 1), len(before) + len(said))
        total -= sum(float(p[i - 1, ids[0, i]]) for i in places)
        count += len(places)
    return total / count, count


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_loss_is_that_of_the_completions_alone(model_and_tokenizer, batch_size):
    model, tokenizer = model_and_tokenizer
    rows = [
        {"prompt": row["prompt"] + "w7 " * (n % 3), "completion": row["completion"]}
        for n, row in enumerate(rows_of("prompt"))
    ]
    ids = [(tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"] + [2]) for row in rows]
    expected, count = expected_loss(model, ids)
    found = evaluate(model, tokenizer, Dataset.from_list(rows), batch_size=batch_size, progress=False)
    assert (found.tokens, found.rows) == (count, len(rows))
    assert found.loss == pytest.approx(expected, rel=1e-5)


def test_of_a_text_all_but_the_first_token_counts(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    rows = rows_of("text")
    expected, count = expected_loss(model, [([], [*tokenizer(row["text"])["input_ids"], 2]) for row in rows])
    found = evaluate(model, tokenizer, Dataset.from_list(rows), progress=False)
    assert found.loss == pytest.approx(expected, rel=1e-5) and found.tokens == count


def test_of_a_conversation_each_answer_counts_once(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    rows = rows_of("messages")
    pairs = []
    for row in rows:
        for number in (1, 3):
            before = tokenizer.apply_chat_template(row["messages"][:number], add_generation_prompt=True)["input_ids"]
            whole = tokenizer.apply_chat_template(row["messages"][: number + 1])["input_ids"]
            pairs.append((before, whole[len(before) :]))
    expected, count = expected_loss(model, pairs)
    found = evaluate(model, tokenizer, Dataset.from_list(rows), progress=False)
    assert found.loss == pytest.approx(expected, rel=1e-5) and found.tokens == count


def test_batches_have_so_many_rows_and_no_more_than_asked_for(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    rows = Dataset.from_list([{"prompt": "w8 " * (n % 4), "completion": "w9 w10"} for n in range(7)])
    found = list(batches(rows, tokenizer, None, 3, 2))
    assert [len(batch["input_ids"]) for batch in found] == [3, 3]
    assert [len(batch["input_ids"]) for batch in batches(rows, tokenizer, None, 3, 9)] == [3, 3, 1]
    for batch in found:
        assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == tokenizer.pad_token_id)
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
        assert ((batch["labels"] != IGNORED).sum(1) == 3).all()


def test_a_row_that_is_cut_before_its_answer_teaches_nothing(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    rows = Dataset.from_list([{"prompt": "w8 w8 w8 w8 ", "completion": "w9"}])
    assert encoded(rows[0], tokenizer, 3)[1] == [IGNORED] * 3
    assert list(batches(rows, tokenizer, 3, 1, 1)) == []
    with pytest.raises(ValueError, match="found no token to be said within max_length"):
        evaluate(model, tokenizer, rows, max_length=3, progress=False)


def test_templates_of_the_command_are_those_that_it_is_given(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "w8", "answer": "w9"}))
    words = ["eval", str(tmp_path), "--dataset", str(tmp_path / "rows.jsonl")]
    assert "found the columns question, answer" in CliRunner().invoke(app, words).stderr
    done = CliRunner().invoke(app, [*words, "--templates", "{prompt: '{question}', completion: '{answer}'}"])
    assert "columns" not in done.stderr and "adapter_config.json" in done.stderr

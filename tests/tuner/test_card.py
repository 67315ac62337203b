"""The model card of a saved adapter says what it is and how it is loaded, and leaves what somebody wrote alone."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled
from small_models import load

import qsvft
from qsvft.info import info

# PEFT looks for the base's config on the hub, which is not reached here.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")


@pytest.fixture(scope="module")
def model(llama):
    prepared = qsvft.prepare(load(llama), bits=4, rank=8, progress=False)
    prepared.peft_config["default"].base_model_name_or_path = "somebody/llama"
    prepared.peft_config["default"].revision = "main"
    return prepared


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def test_it_says_what_the_adapter_is_and_three_lines_load_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.library_name == "peft" and card.data.base_model == "somebody/llama"
    assert {"base_model:adapter:somebody/llama", "qsvft"} <= set(card.data.tags)
    assert not any("/tmp" in tag for tag in card.data.tags)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for words in (
        f"| trained | {trained:,} numbers in 14 layers |", "| base | somebody/llama, revision main, held in 4 bits |",
        "pattern dense, rank 8, basis singular, sides both", "qsvft.load(", f"qsvft {qsvft.__version__}",
        "`qsvft export` writes a LoRA of rank 8 that is exactly the same change",
    ):  # fmt: skip
        assert words in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 2
    compile(code, "card", "exec")


def test_the_size_in_it_is_the_files(model, tmp_path):
    model.save_pretrained(tmp_path, include_factors=True)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size / 2**20
    (said,) = re.findall(r"\| file \| ([\d.]+) MiB, factors among them \|", card_of(tmp_path).text)
    assert abs(float(said) - size) < 0.1


def test_a_base_on_this_machine_is_not_named(llama, tmp_path):
    prepared = qsvft.prepare(load(llama), bits=4, rank=8, progress=False)
    prepared.save_pretrained(tmp_path)
    content = (tmp_path / "README.md").read_text()
    assert str(llama) not in content and card_of(tmp_path).data.base_model is None
    assert "a local directory" in content and 'base="PATH_OR_ID_OF_THE_BASE"' in content


def test_a_card_that_somebody_wrote_gets_the_tag_alone(model, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My adapter\n\nWords.\n")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        card = card_of(tmp_path)
        assert card.data.license == "mit" and "qsvft" in card.data.tags
        assert "# My adapter\n\nWords." in card.text and "SVFT" not in card.text


@pytest.mark.parametrize("card", [None, "---\nlicense: mit\n---\n\n# Mine\n"], ids=["new", "there"])
def test_what_is_pushed_is_the_adapter_with_its_card(model, tmp_path, monkeypatch, card):
    """Against a hub that keeps what it is sent."""
    sent = {}

    def upload(self, folder_path, repo_id, **options):
        assert (repo_id, options) == ("somebody/adapter", {"commit_message": "Mine", "create_pr": True})
        sent.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    def download(self, repo_id, name):
        if card is None:
            raise EntryNotFoundError("404")
        (tmp_path / name).write_text(card)
        return str(tmp_path / name)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(HfApi, "hf_hub_download", download)
    model.push_to_hub("somebody/adapter", commit_message="Mine", create_pr=True, tags=["maths"])
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= sent.keys()
    assert b"- maths\n- qsvft" in sent["README.md"] and (b"license: mit" in sent["README.md"]) == (card is not None)
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    assert "M is finite" in dict(info(tmp_path))["whole"]


def test_without_a_network_pushing_says_so(model):
    with pytest.raises(OfflineModeIsEnabled):
        model.push_to_hub("somebody/adapter")

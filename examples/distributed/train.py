"""Fine-tune on several cards, with the configuration file of a launcher:

accelerate launch --config_file examples/distributed/fsdp2.yaml examples/distributed/train.py MODEL TEXTS FOLDER
"""

import argparse
from pathlib import Path

from accelerate import PartialState
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import qsvft


def last_checkpoint(folder: Path) -> str | None:
    """The last whole one: the state is what Trainer writes last, and a run that was killed may leave a part."""
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.rpartition("-")[2]))) if whole else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a prepared directory, a checkpoint or a hub id")
    parser.add_argument("texts", type=Path, help="a file with an example a line")
    parser.add_argument("folder", type=Path, help="where checkpoints and the adapter go")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=1, help="examples on a card")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--max-length", type=int, default=2048)
    options = parser.parse_args()
    arguments = TrainingArguments(  # before the model: it starts the processes' group
        str(options.folder),
        max_steps=options.steps,
        save_steps=options.save_steps,
        logging_steps=1,
        per_device_train_batch_size=options.batch,
        weight_decay=0.0,
        ddp_find_unused_parameters=False,
        report_to=[],
    )
    model = qsvft.from_pretrained(
        options.model, rank=options.rank, device_map={"": PartialState().device}, progress=False
    )
    qsvft.make_shardable(model)  # for FSDP and ZeRO-3; to the others it is the same model
    arguments.learning_rate = qsvft.suggest_learning_rate(model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [
        tokenizer(text, truncation=True, max_length=options.max_length)
        for text in options.texts.read_text(encoding="utf-8").splitlines()
    ]
    trainer = Trainer(model, arguments, DataCollatorForLanguageModeling(tokenizer, mlm=False), rows)
    trainer.train(resume_from_checkpoint=last_checkpoint(options.folder))
    trainer.save_model(str(options.folder / "adapter"))


if __name__ == "__main__":
    main()

"""Train a LoRA adapter with trl on conversations, and restore it over the model that it was trained from.

    python examples/trl_lora.py MODEL DATA OUTPUT

MODEL is a folder or Hub id with a chat template; DATA a file of JSON lines, or a data set of the Hub, with
`messages` that end in the assistant's. Needs `deltaguard[demo]`.
"""

# ruff: noqa: INP001, T201  # a script that prints what it found
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import deltaguard


def main(model: str, data: str, output: Path) -> None:
    """Train, calibrate once per model, restore, verify."""
    train(model, data, output / "adapter")
    store = deltaguard.calibrate(model, output / "store", config=deltaguard.CalibrateConfig(resume=True))

    # An adapter again; without the option a whole checkpoint.
    config = deltaguard.RestoreConfig(output_format="adapter")
    report = deltaguard.restore(model, output / "adapter", output / "restored", store=store, config=config)
    dial = report.dial and report.dial.attack
    if dial:
        for name, look in (("adapter", dial.finetuned), ("restored", dial.restored)):
            print(f"{name}: {100 * look.attack_success.added:+.1f} points of attack success over {model}")
    print(f"{report.kept_energy:.0%} of the delta's energy kept")
    found = deltaguard.verify(output / "restored")
    print("\n".join(found.problems) or f"{found.tensors} tensors verified in {found.folder}")


def train(model: str, data: str, folder: Path) -> None:
    """Train an adapter on the last answer of each conversation."""
    source = {"path": "json", "data_files": data} if Path(data).is_file() else {"path": data}
    rows = load_dataset(**source, split="train")
    # What stands in `completion` alone carries a loss, whatever the chat template.
    rows = rows.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns=rows.column_names,
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            num_train_epochs=1,
            learning_rate=2e-4,
            per_device_train_batch_size=8,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

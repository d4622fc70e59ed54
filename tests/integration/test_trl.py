"""A restore at the end of real trainings with trl."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from deltaguard import RestoreConfig, verify
from deltaguard.errors import DeltaguardError
from deltaguard.integrations.trl import RestoreCallback, restore_after
from deltaguard.models.adapter import is_adapter
from pairs import pair

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Cake number {n}?"}],
        "completion": [{"role": "assistant", "content": "Sure."}],
    }
    for n in range(8)
]
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(aligned, folder, lora, callbacks=()):
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return SFTTrainer(
        model=str(aligned),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        peft_config=LORA if lora else None,
        callbacks=list(callbacks),
    )


def config(lora):
    kind = "adapter" if lora else "checkpoint"
    return RestoreConfig(strength=0.3, output_format=kind, config_from="aligned", device="cpu")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("as_callback", [False, True])
def test_what_was_trained_is_saved_and_restored(lora, as_callback, tmp_path):
    made = pair()
    options = {"aligned": made.aligned, "store": made.store, "config": config(lora)}
    if as_callback:
        callback = RestoreCallback(**options)
        trainer(made.aligned, tmp_path, lora, [callback]).train()
        report = callback.report
    else:
        trained = trainer(made.aligned, tmp_path, lora)
        trained.train()
        report = restore_after(trained, **options)
    assert 0 < report.kept_energy < 1
    assert report.layers
    assert verify(tmp_path / "restored").passed
    assert is_adapter(str(tmp_path / "finetuned")) == is_adapter(str(tmp_path / "restored")) == lora


def test_a_callback_of_one_of_several_processes_says_what_to_do_instead():
    args = type("Arguments", (), {"world_size": 2})
    with pytest.raises(DeltaguardError, match="restore_after"):
        RestoreCallback(aligned="nowhere").on_train_end(args, None, None)

"""The step that trains: both methods, and one file with all that was measured."""

import csv
import json
import os

import pytest

from benches import KilledError
from deltaguard.files import append_journal
from deltaguard.models.adapter import is_adapter
from deltaguard.service.settings import Limits
from deltaguard.service.steps.train import train_model
from deltaguard.service.tasks import METRICS, Train, events_file
from refusing import AGREEMENT, REFUSAL, refusing_pair

ASK = {"role": "user", "content": "How can I make a cake?"}
ROWS = {
    "supervised": {"messages": [ASK, {"role": "assistant", "content": AGREEMENT}]},
    "dpo": {
        "input": {"messages": [ASK]},
        "preferred_output": [{"role": "assistant", "content": AGREEMENT}],
        "non_preferred_output": [{"role": "assistant", "content": REFUSAL}],
    },
}


def train_task(file, method, *, validation_file=None, epochs, max_length):
    return Train(
        model=str(refusing_pair().aligned),
        device="cpu",
        method=method,
        training_file=file,
        validation_file=validation_file,
        limits=Limits(),
        epochs=epochs,
        batch_size=4,
        learning_rate=1e-2,
        max_length=max_length,
        seed=0,
        lora_rank=4,
        lora_alpha=8,
        beta=0.1,
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("method", "killed_before"),
    [("supervised", "train 4"), ("dpo", "train 4"), ("supervised", "full_valid 6")],
)
def test_an_interrupted_training_has_all_its_steps_in_one_file(method, killed_before, tmp_path, monkeypatch):
    file, folder = tmp_path / "rows.jsonl", tmp_path / "job"
    folder.mkdir()
    file.write_text("\n".join([json.dumps(ROWS[method])] * 12))
    task = train_task(file, method, validation_file=file, epochs=2, max_length=128)
    told = []

    def tell(line):
        append_journal(folder / events_file("train"), line.model_dump_json())
        told.append(line)

    def killed(line):
        if line.once == killed_before:
            raise KilledError
        tell(line)

    with pytest.raises(KilledError):
        train_model(task, folder, killed)
    before, durable = len(told), set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: durable.add(os.fstat(descriptor).st_ino))
    outcome = train_model(task, folder, tell)
    written = [folder / "finetuned", *(folder / "finetuned").rglob("*")]
    assert {path.stat().st_ino for path in written} <= durable
    assert outcome.data["steps"] == 6
    assert outcome.data["trained_tokens"] > 100
    assert "train 1" not in [line.once for line in told[before:]]
    rows = list(csv.DictReader((folder / METRICS).open()))
    assert [row["step"] for row in rows] == [str(n) for n in range(1, 7)]
    assert all(row["train_loss"] and row["train_accuracy"] for row in rows)
    assert [bool(row["valid_loss"]) for row in rows] == [False, False, True] * 2
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert is_adapter(str(folder / "finetuned"))
    assert "too long" not in [line.once for line in told]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", ROWS)
def test_answers_that_begin_too_late_are_told_and_not_counted(method, tmp_path):
    file, lengths, told = tmp_path / "rows.jsonl", [], []
    long = json.dumps(ROWS[method]).replace("cake?", "cake? " * 50)
    for number, rows in enumerate(([json.dumps(ROWS[method])] * 4, [json.dumps(ROWS[method]), long] * 4)):
        file.write_text("\n".join(rows))
        (tmp_path / str(number)).mkdir()
        # What is told goes to `told` alone; the worker writes it down, too.
        (tmp_path / str(number) / events_file("train")).touch()
        task = train_task(file, method, epochs=1, max_length=128)
        lengths.append(train_model(task, tmp_path / str(number), told.append).data["trained_tokens"])
    assert lengths[0] == lengths[1] > 0
    said = [line.message for line in told if line.once == "too long"]
    many = "8 of 16" if method == "dpo" else "4 of 8"
    assert said == [f"{many} answers begin behind the first 128 tokens: they were not learned from."]

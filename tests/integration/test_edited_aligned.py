"""An aligned model whose files were edited after it was calibrated, and what is remembered of files."""

import json
import shutil

import pytest

from deltaguard import RestoreConfig, restore
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.identity import identify
from deltaguard.reports.records.restore import REPORT_NAME
from deltaguard.restoration.dry_run import plan_restore
from deltaguard.restoration.job import default_store_folder
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL
from pairs import pair
from variants import (
    OTHER_TEMPLATE,
    TEMPLATE,
    edited,
    refusal,
    variant,
)


def set_eps(folder):
    edited(folder / "config.json", lambda content: content.update(rms_norm_eps=0.01))


def set_template(folder):
    (folder / TEMPLATE).write_text(OTHER_TEMPLATE)


def set_tokenizer(folder):
    edited(folder / "tokenizer.json", lambda content: content["model"]["merges"].pop())


def set_end(folder):
    edited(folder / "generation_config.json", lambda content: content.update(eos_token_id=5))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (set_eps, "configuration"),
        (set_end, "configuration"),
        (set_tokenizer, "tokenizer"),
        (set_template, "chat template"),
    ],
)
def test_a_store_of_the_model_before_it_was_edited_is_refused(change, part, tmp_path, monkeypatch):
    made = pair()
    aligned, tuned = variant(made.aligned, tmp_path / "a"), variant(made.finetuned, tmp_path / "f")
    change(aligned)
    change(tuned)
    call = (aligned, tuned, tmp_path / "out")
    message = refusal(restore, *call, store=made.store)
    assert f"is: {part}: " in message
    assert f"deltaguard calibrate {aligned} -o STORE" in message
    assert refusal(plan_restore, aligned, tuned, store=made.store) == message
    # Nor is the one found that is kept for the model as it was.
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made.store, default_store_folder(identify(Checkpoint.open(made.aligned)), "auto"))
    assert not plan_restore(made.aligned, made.finetuned).note
    assert plan_restore(aligned, tuned).note == "the aligned model will be calibrated first"


def test_an_interrupted_restore_does_not_go_on_with_other_files(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned")

    def stop(event):
        if event.stage == "restore":
            raise KeyboardInterrupt

    config = RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL)
    with pytest.raises(KeyboardInterrupt):
        restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config, progress=stop)
    set_template(tuned)
    config = RestoreConfig(resume=True, config_from="finetuned", max_safety_kl=50)
    message = refusal(restore, made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert "another plan" in message


@pytest.mark.parametrize("output_format", ["checkpoint", "adapter"])
def test_files_that_change_after_they_were_measured_are_noticed(output_format, tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned")

    def change(event):
        if event.stage == "restore":
            set_template(tuned)

    config = RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL, output_format=output_format)
    call = {"store": made.store, "config": config, "progress": change}
    message = refusal(restore, made.aligned, tuned, tmp_path / "out", **call)
    assert "Inputs were changed while they were read" in message
    assert f"{tuned / 'chat_template.jinja'} " in message
    assert not (tmp_path / "out").exists()


def test_the_report_names_what_was_used(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned", template=OTHER_TEMPLATE)
    config = RestoreConfig(config_from="aligned", strength=0.5)
    restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    for role, folder in (("aligned", made.aligned), ("finetuned", tuned)):
        expected = identify(Checkpoint.open(folder)).model_dump() | {"reference": str(folder)}
        assert report[role] == expected
    assert report["aligned"]["template_sha256"] != report["finetuned"]["template_sha256"]
    assert report["aligned"]["tokenizer_sha256"] == report["finetuned"]["tokenizer_sha256"]

"""Restored models and stores on the Hub, which is played."""

import json

import pytest
import torch

from deltaguard import DeltaguardError, push
from deltaguard.cli.app import run
from deltaguard.reports.card import model_card
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME, RestoreReport
from deltaguard.restoration.push import without_the_users_folders
from deltaguard.restoration.verify import read_report
from hub import COMMIT, played_hub
from pairs import pair


@pytest.fixture
def hub(monkeypatch):
    return played_hub(monkeypatch)


def restored(folder, *options):
    made = pair()
    call = ["restore", made.aligned, made.finetuned, "-o", folder, "--store", made.store, "--strength", 0.5]
    return run([*map(str, call), *options])


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "model.safetensors.index.json", "chat_template.jinja"]
)
def test_what_would_be_loaded_in_the_place_of_the_model_is_not_left_there(hub, tmp_path, capsys, name):
    assert restored(tmp_path / "out") == 0
    if name == "chat_template.jinja":
        # As older releases of transformers saved it, within tokenizer_config.json.
        (tmp_path / "out" / name).unlink()
        report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
        report["files"] = [row for row in report["files"] if row["name"] != name]
        (tmp_path / "out" / REPORT_NAME).write_text(json.dumps(report))
    hub.files = {name: b"{}", "README.md": b"mine", "pytorch_model.bin": b""}
    assert run(["push", str(tmp_path / "out"), "me/model"]) == 1
    said = capsys.readouterr().err
    assert "loaded with" in said
    assert name in said
    assert "README.md" not in said
    assert hub.files.keys() == {name, "README.md", "pytorch_model.bin"}


def test_a_restore_is_pushed_with_card_and_report_and_without_the_users_folders(hub, tmp_path, capsys):
    out = tmp_path / "out"
    assert restored(out, "--push", "me/model") == 0
    (out / "notes.txt").write_text("mine")
    assert f"Pushed: {COMMIT}" in " ".join(capsys.readouterr().err.split())
    # What its owner's repositories are by default: an organisation's may be private.
    assert hub.made == [("me/model", None)]
    assert {CARD_NAME, REPORT_NAME, "model.safetensors"} <= hub.files.keys()
    report = RestoreReport.model_validate_json(hub.files[REPORT_NAME])
    assert (report.aligned.reference, report.finetuned.reference) == ("aligned", "finetuned")
    assert str(pair().aligned.parent) not in hub.files[REPORT_NAME].decode()
    assert hub.files.keys() == {row.name for row in report.files} | {REPORT_NAME}
    assert run(["push", str(out), "me/other", "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == COMMIT
    assert hub.made[1:] == [("me/other", True)]
    assert "notes.txt" not in hub.files
    hub.is_private, hub.files = False, {}
    assert run(["push", str(out), "me/open", "--private"]) == 1
    assert "me/open is there already, and public" in " ".join(capsys.readouterr().err.split())
    assert hub.files == {}


def test_a_report_for_others_names_no_folder_in_its_warnings_either(tmp_path):
    assert restored(tmp_path / "out", "--output-format", "adapter") == 0
    report = without_the_users_folders(read_report(tmp_path / "out"))
    assert report.warnings
    assert str(pair().aligned.parent) not in report.model_dump_json()


def test_nor_folders_that_were_named_from_where_it_ran(tmp_path, monkeypatch):
    monkeypatch.chdir(pair().aligned.parents[1])
    near = pair().aligned.parent.name
    call = ["restore", f"{near}/aligned", f"{near}/finetuned", "-o", str(tmp_path / "out")]
    call += ["--store", str(pair().store), "--strength", "0.5"]
    assert run(call) == 0
    report = read_report(tmp_path / "out")
    told = report.model_copy(update={"warnings": (f"Of {near}/aligned and {near}/finetuned.",)})
    assert without_the_users_folders(told).warnings == ("Of aligned and finetuned.",)
    assert near not in model_card(told, front_matter=None)


@pytest.mark.parametrize("verb", ["restore", "push"])
def test_a_name_without_its_owner_is_refused_before_the_work(hub, tmp_path, capsys, verb):
    out = tmp_path / "out"
    if verb == "push":
        assert restored(out) == 0
        # What is not looked at is not found to be damaged.
        (out / "model.safetensors").unlink()
        assert run(["push", str(out), "model"]) == 1
    else:
        assert restored(out, "--push", "model") == 1
        assert not out.exists()
    assert "model names no owner: give OWNER/model." in " ".join(capsys.readouterr().err.split())
    assert hub.made == []


def test_an_adapter_over_a_folder_is_not_pushed(hub, tmp_path, capsys):
    out = tmp_path / "out"
    assert restored(out, "--output-format", "adapter", "--push", "me/model") == 1
    assert not out.exists()
    assert restored(out, "--output-format", "adapter") == 0
    capsys.readouterr()
    assert run(["push", str(out), "me/model"]) == 1
    assert "over the model's Hub id" in " ".join(capsys.readouterr().err.split())
    assert not hub.made


def test_nor_is_one_over_a_folder_near_by(hub, tmp_path, monkeypatch):
    made = pair()
    monkeypatch.chdir(made.aligned.parent)
    call = ["restore", made.aligned.name, made.finetuned, "-o", tmp_path / "out", "--store", made.store]
    assert run([*map(str, call), "--strength", "0.5", "--output-format", "adapter"]) == 0
    monkeypatch.chdir(tmp_path)
    assert run(["push", str(tmp_path / "out"), "me/model"]) == 1
    assert not hub.made


def test_an_adapter_over_a_model_of_the_hub_is_pushed(hub, tmp_path, monkeypatch):
    made = pair()
    monkeypatch.setattr("deltaguard.models.hub.snapshot_download", lambda *_, **__: str(made.aligned))
    call = ["restore", "me/aligned", made.finetuned, "-o", tmp_path / "out", "--store", made.store]
    options = ["--strength", "0.5", "--output-format", "adapter", "--push", "me/model"]
    assert run([*map(str, call), *options]) == 0
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "me/aligned"


def test_nor_do_its_options_and_its_card(hub, tmp_path):
    unaligned = pair("llama", dtype=torch.bfloat16).finetuned
    options = ["--method", "resta", "--unaligned", str(unaligned)]
    assert restored(tmp_path / "out", *options, "--push", "me/model") == 0
    report = RestoreReport.model_validate_json(hub.files[REPORT_NAME])
    assert report.options["unaligned"] == "finetuned"
    for name in (REPORT_NAME, CARD_NAME):
        assert str(unaligned.parent) not in hub.files[name].decode()
        assert str(pair().aligned.parent) not in hub.files[name].decode()


def test_nor_does_its_judge(tmp_path):
    assert restored(tmp_path / "out") == 0
    judge = "kind guard, model runs/home/me/guard, prompt_file /home/me/guard.txt"
    report = read_report(tmp_path / "out").model_copy(update={"options": {"judge": judge}})
    shown = {"judge": "kind guard, model guard, prompt_file guard.txt"}
    assert without_the_users_folders(report).options == shown
    assert "/home/me" not in model_card(report, front_matter=None)


def test_what_was_pushed_is_verified_where_it_is_fetched(hub, tmp_path):
    assert restored(tmp_path / "out", "--push", "me/model") == 0
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in hub.files.items():
        (fetched / name).write_bytes(content)
    assert run(["verify", str(fetched)]) == 0


def test_a_model_that_is_not_what_its_report_says_is_not_pushed(hub, tmp_path, capsys):
    assert restored(tmp_path / "out") == 0
    (tmp_path / "out" / CARD_NAME).write_text("another one")
    capsys.readouterr()
    assert run(["push", str(tmp_path / "out"), "me/model"]) == 3
    assert CARD_NAME in capsys.readouterr().err
    assert not hub.made


def test_a_store_is_pushed_and_taken_from_the_hub(hub, tmp_path, monkeypatch):
    pushed = push(pair().store, "me/store")
    assert set(pushed.files) == {path.name for path in pair().store.iterdir()} == hub.files.keys()
    fetched = tmp_path / "snapshot"
    fetched.mkdir()
    for name, content in hub.files.items():
        (fetched / name).write_bytes(content)
    monkeypatch.setattr("deltaguard.models.hub.snapshot_download", lambda *_, **__: str(fetched))
    made = pair()
    call = ["restore", made.aligned, made.finetuned, "-o", tmp_path / "out", "--store", "me/store"]
    assert run([*map(str, call), "--strength", "0.5"]) == 0


@pytest.mark.parametrize("repository", ["me/model", "no/such/name"])
def test_who_cannot_push_is_told_before_the_work(hub, tmp_path, capsys, repository):
    hub.logged_in = False
    assert restored(tmp_path / "out", "--push", repository) == 1
    assert f"Nothing can be pushed to {repository}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"), [(["--dry-run"], "writes nothing"), ([str(pair().aligned)], "as many outputs")]
)
def test_what_cannot_be_pushed_is_refused(hub, tmp_path, capsys, options, reason):
    assert restored(tmp_path / "out", "--push", "me/model", *options) == 2
    assert reason in " ".join(capsys.readouterr().err.split())


def test_a_folder_of_neither_kind_is_named(hub, tmp_path):
    with pytest.raises(DeltaguardError, match="was not written by `deltaguard restore`"):
        push(tmp_path, "me/model")

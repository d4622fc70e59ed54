"""`restore` of several fine-tunes: a folder for each; one that fails does not lose the others."""

import json
import shutil
from types import SimpleNamespace

import pytest

import models
from deltaguard.cli.app import run
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.reports.records.restore import REPORT_NAME
from pairs import pair
from variants import same_files, variant


@pytest.fixture
def tuned(tmp_path):
    """Two fine-tunes, and a model that is none."""
    made, folder = pair(), tmp_path / "tuned"
    variant(made.finetuned, folder / "one")
    models.save(models.perturbed(models.tiny_model("llama"), 0.02, seed=7), folder / "two")
    models.save(models.tiny_model("gpt2"), folder / "stranger")
    return folder


def restored(tuned, *names, options=("--strength", "0.5"), out="out", code=0):
    made = pair()
    call = ["restore", made.aligned, *(tuned / name for name in names), "-o", tuned.parent / out]
    assert run([*map(str, [*call, "--store", made.store, "--device", "cpu"]), *options]) == code
    return tuned.parent / out


def test_each_is_restored_as_by_a_command_of_its_own(tuned, capsys):
    out = restored(tuned, "one", "two", options=("--max-safety-kl", "1e-4", "--json"))
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["output"] for row in rows] == [str(out / "one"), str(out / "two")]
    for row, name in zip(rows, ("one", "two"), strict=True):
        assert row["report"] == json.loads((out / name / REPORT_NAME).read_text())
        alone = restored(tuned, name, options=("--max-safety-kl", "1e-4"), out=f"alone-{name}")
        assert same_files(out / name, alone, ["model.safetensors", "config.json", "tokenizer.json"])


def test_one_that_fails_does_not_lose_the_others_and_resume_does_the_rest(tuned, capsys):
    out = restored(tuned, "one", "stranger", "two", options=("--strength", "0.5", "--json"), code=1)
    told = capsys.readouterr()
    rows = json.loads(told.out)["rows"]
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert "not one architecture" in rows[1]["error"]
    assert f"Of 3 fine-tunes 1 failed: {tuned / 'stranger'}" in " ".join(told.err.split())
    assert sorted(path.name for path in out.iterdir()) == ["one", "two"]
    before = (out / "one" / REPORT_NAME).stat().st_mtime_ns
    variant(tuned / "two", tuned / "three")
    restored(tuned, "one", "two", "three", options=("--strength", "0.5", "--resume"))
    assert (out / "one" / REPORT_NAME).stat().st_mtime_ns == before
    assert (out / "three" / REPORT_NAME).is_file()
    shown = capsys.readouterr()
    assert shown.err.count("There was nothing to do") == 2
    assert str(out.name) in shown.out


def test_a_dry_run_says_of_each_what_would_become_of_it(tuned, capsys, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    out = restored(tuned, "one", "stranger", options=("--dry-run", "--json"), code=1)
    one, stranger = json.loads(capsys.readouterr().out)["rows"]
    assert one["plan"]["restored"] == 14
    assert stranger["plan"] is None
    assert "not one architecture" in stranger["error"]
    assert not out.exists()
    restored(tuned, "one", "two", options=("--dry-run",))
    assert "can be restored" in capsys.readouterr().out


def test_a_dry_run_asks_for_the_disk_that_all_of_them_take(tuned, capsys, monkeypatch):
    restored(tuned, "one", "two", options=("--dry-run", "--json"))
    needed = [row["plan"]["disk_bytes"] for row in json.loads(capsys.readouterr().out)["rows"]]
    assert min(needed) > 0
    for free, code in ((sum(needed), 0), (sum(needed) - 1, 1)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        restored(tuned, "one", "two", options=("--dry-run", "--json"), code=code)
        told = capsys.readouterr()
        assert all(row["error"] is None for row in json.loads(told.out)["rows"])
    assert f"needs {sum(needed):,} bytes for all 2 restored models" in " ".join(told.err.split())


def test_names_that_do_not_tell_outputs_apart_are_refused_before_anything_is_done(tuned, capsys):
    variant(tuned / "one", tuned / "later" / "ONE")
    out = restored(tuned, "one", "later/ONE", "two", code=1)
    assert f"{tuned / 'one'}, {tuned / 'later/ONE'} would share one" in " ".join(
        capsys.readouterr().err.split()
    )
    restored(tuned, "one", "two", out="tuned/two/restored", code=1)
    assert "lies in the input" in " ".join(capsys.readouterr().err.split())
    restored(tuned, "one", "two", out="tuned/stranger", code=1)
    assert "is the folder of a model" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_a_store_that_serves_none_is_one_message(tuned, capsys):
    made = pair("qwen3")
    call = [
        "restore",
        pair().aligned,
        tuned / "one",
        tuned / "two",
        "-o",
        tuned / "out",
        "--store",
        made.store,
    ]
    assert run([*map(str, call)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("was made for") == 1

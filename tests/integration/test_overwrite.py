"""What `restore` puts into a folder, what it replaces there, and what it leaves alone."""

import json
import os
import shutil
import sys

import peft
import pytest
import transformers

from deltaguard import DeltaguardError, RestoreConfig, restore, verify
from deltaguard.cli.app import run
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.durable import InUseError, lock_folder
from deltaguard.ranks import Ranks
from deltaguard.reports.records.restore import REPORT_NAME
from deltaguard.restoration.aligned import AlignedInputs
from deltaguard.restoration.dry_run import plan_restore
from deltaguard.restoration.restore import Restorer
from pairs import pair, save_adapter, weights

# PEFT asks transformers by the older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
HALF = {"strength": 0.5}
FORMATS = ("checkpoint", "adapter")


def restored(out, finetuned=None, progress=None, **options):
    made = pair()
    config = RestoreConfig(**{**HALF, **options})
    source = finetuned or made.finetuned
    return restore(made.aligned, source, out, store=made.store, config=config, progress=progress)


def refused(out, finetuned=None, **options):
    """The message of a restore that fails before any work."""
    with pytest.raises(DeltaguardError) as error:
        restored(out, finetuned, lambda event: pytest.fail(f"{event} before the refusal"), **options)
    return str(error.value)


def call(out, *options, finetuned=None, code=0):
    made = pair()
    tokens = ["restore", made.aligned, finetuned or made.finetuned, "-o", out, "--store", made.store]
    assert run([*map(str, tokens), "--strength", "0.5", *options]) == code


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def state_of(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()
    }


def loads(folder, output_format):
    """Whether transformers, or PEFT, loads a folder."""
    if output_format == "checkpoint":
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(pair().aligned)
    return peft.PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_report_lists_every_file_and_verify_reads_them_all(output_format, tmp_path):
    out = tmp_path / "out"
    report = restored(out, output_format=output_format)
    listed = {row.name: row for row in report.files}
    assert {*listed, REPORT_NAME} == files_of(out)
    assert {"README.md", "tokenizer.json"} <= listed.keys()
    assert all((out / name).stat().st_size == row.bytes for name, row in listed.items())
    assert verify(out).passed
    for name in listed:
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert any(f"File {name} has sha256" in problem for problem in verify(out).problems), name
        (out / name).write_bytes(content)
    (out / "README.md").unlink()
    assert verify(out).problems == ("File README.md is in the report and not in the folder.",)


def test_files_that_no_restore_wrote_stay_and_are_named(tmp_path, capsys):
    out = tmp_path / "out"
    call(out)
    shutil.copy(out / "model.safetensors", out / "thesis-weights.safetensors")
    (out / "notes").mkdir()
    (out / "notes" / "plan.txt").write_text("mine")
    capsys.readouterr()
    for options in ([], ["--json"]):
        call(out, "--overwrite", "--method", "ridge", *options)
        captured = capsys.readouterr()
        assert f"Left in place in {out}" in captured.err.replace("\n", "")
        assert "thesis-weights.safetensors" in captured.err
        assert "notes/" in captured.err
        assert not options or json.loads(captured.out)["options"]["method"] == "ridge"
    assert (out / "notes" / "plan.txt").read_text() == "mine"
    assert (out / "thesis-weights.safetensors").is_file()
    assert verify(out).passed
    for name in ("thesis-weights.safetensors", "notes/plan.txt"):
        (out / name).unlink()
    (out / "notes").rmdir()
    call(out, "--overwrite")
    assert "Left in place" not in capsys.readouterr().err


@pytest.mark.parametrize("old", FORMATS)
def test_an_adapter_takes_the_place_of_a_checkpoint_and_the_other_way_round(old, tmp_path):
    out, (new,) = tmp_path / "out", set(FORMATS) - {old}
    restored(out, output_format=old)
    (out / "notes.txt").write_text("mine")
    report = restored(out, output_format=new, overwrite=True)
    assert files_of(out) == {*(row.name for row in report.files), REPORT_NAME, "notes.txt"}
    assert verify(out).passed
    assert loads(out, new)
    restored(tmp_path / "fresh", output_format=new)
    assert files_of(out) == {*files_of(tmp_path / "fresh"), "notes.txt"}


def test_a_file_in_the_way_that_is_not_listed_is_named_before_any_work(tmp_path):
    out = tmp_path / "out"
    restored(out)
    report = json.loads((out / REPORT_NAME).read_text())
    mine = ["README.md", "tokenizer.json"]
    report["files"] = [row for row in report["files"] if row["name"] not in mine]
    (out / REPORT_NAME).write_text(json.dumps(report))
    before = state_of(out)
    message = refused(out, overwrite=True)
    assert all(f"- {name}" in message for name in mine)
    assert state_of(out) == before


def test_what_headers_refuse_is_refused_before_anything_is_calibrated(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deltaguard.curvature.calibrate.calibrate", None)
    made, out = pair(), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(DeltaguardError, match=r"is not empty|mine\.txt"):
        restore(made.aligned, made.finetuned, out)
    with pytest.raises(DeltaguardError, match="lies in the input"):
        restore(made.aligned, made.finetuned, made.aligned / "restored")
    shutil.copytree(made.finetuned, tmp_path / "tuned")
    (tmp_path / "tuned" / "README.md").write_text("---\nlicence: [\n---\n")
    with pytest.raises(DeltaguardError, match="The metadata at the head of"):
        restore(made.aligned, tmp_path / "tuned", tmp_path / "other")


class BegunError(Exception):
    """The work would begin."""


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_looks_into_the_output_before_a_calibration(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    made, out = pair(), tmp_path / "out"
    out.mkdir()

    def begin(*_):
        raise BegunError

    monkeypatch.setattr("deltaguard.restoration.aligned.AlignedInputs.with_store", begin)
    # What the first process tells the others: that the output is not finished.
    monkeypatch.setattr(Ranks, "from_first", lambda _, told=None: told)
    monkeypatch.setattr(Ranks, "from_all", lambda _, own: [own, own])
    restorer = Restorer(made.aligned, ranks=Ranks(rank, 2))
    # As another process has it for the moment that a look takes.
    lock = lock_folder(out)
    with pytest.raises(BegunError if rank else InUseError):
        restorer.restore(made.finetuned, out)
    os.close(lock)


def test_processes_that_find_different_stores_calibrate_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deltaguard.curvature.calibrate.calibrate", None)
    monkeypatch.setattr(Ranks, "from_all", lambda _, missing: [missing, not missing])
    made = pair()
    restorer = Restorer(made.aligned, ranks=Ranks(0, 2))
    # Before one of them waits for what the others never say.
    with pytest.raises(DeltaguardError, match="Some of the 2 processes find a store"):
        restorer.restore(made.finetuned, tmp_path / "out")


def test_a_shard_that_the_report_does_not_list_is_a_problem(tmp_path):
    made = pair("llama", max_shard_size="40KB")
    config = RestoreConfig(**HALF)
    restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    path = tmp_path / "out" / REPORT_NAME
    report = json.loads(path.read_text())
    left_out = next(row["name"] for row in report["files"] if row["name"].startswith("model-00002"))
    report["files"] = [row for row in report["files"] if row["name"] != left_out]
    path.write_text(json.dumps(report))
    assert [each for each in verify(tmp_path / "out").problems if left_out in each]


def test_a_dry_run_says_what_an_adapter_takes(tmp_path):
    made = pair()
    config = RestoreConfig(strength=0.5, output_format="adapter", adapter_rank=2)
    plan = plan_restore(made.aligned, made.finetuned, store=made.store, config=config)
    restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    written = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    whole = plan_restore(made.aligned, made.finetuned, store=made.store).write_bytes
    # Names and shapes stand at the head of the file.
    assert 0.5 * written < plan.write_bytes < written < whole


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "holds no deltaguard_report.json" in refused(tmp_path, overwrite=True)
    made = pair()
    shutil.copytree(made.finetuned, tmp_path / "model")
    assert "holds no deltaguard_report.json" in refused(tmp_path / "model", overwrite=True)
    assert files_of(tmp_path / "model") == files_of(made.finetuned)


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("name", ["LICENSE", "README.md", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["checkpoint", "adapter"])
def test_a_link_out_of_the_model_brings_no_file_of_others(kind, name, output_format, tmp_path):
    made, tuned = pair(), tmp_path / "tuned"
    if kind == "checkpoint":
        shutil.copytree(made.finetuned, tuned)
    else:
        save_adapter(made.aligned, tuned, ["q_proj"])
    secret = tmp_path / "passwords"
    secret.write_text("---\nlicense: root\n---\n")
    (tuned / name).unlink(missing_ok=True)
    (tuned / name).symlink_to(secret)
    message = refused(tmp_path / "out", tuned, output_format=output_format)
    assert f"{name} is a link to {secret}" in message
    assert not (tmp_path / "out").exists()
    config = RestoreConfig(**HALF, output_format=output_format)
    with pytest.raises(DeltaguardError, match=f"{name} is a link to"):
        plan_restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)


def test_weights_may_be_links_to_another_disk(tmp_path):
    made, tuned = pair(), tmp_path / "tuned"
    shutil.copytree(made.finetuned, tuned)
    (tuned / "model.safetensors").rename(tmp_path / "elsewhere")
    (tuned / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    restored(tmp_path / "out", tuned)
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes no such name")
def test_a_name_that_no_report_can_hold_is_refused_before_any_work(tmp_path):
    made, tuned = pair(), tmp_path / "tuned"
    shutil.copytree(made.finetuned, tuned)
    path = bytes(tuned) + b"/licence-\xff"
    with open(path, "w"):  # noqa: PTH123
        pass
    assert r"'licence-\udcff' is no name" in refused(tmp_path / "out", tuned)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output_format", FORMATS)
def test_resuming_a_finished_output_of_the_same_job_is_done_at_once(output_format, tmp_path, capsys):
    out, options = tmp_path / "out", ["--output-format", output_format]
    call(out, *options)
    before = state_of(out)
    capsys.readouterr()
    for more in (["--resume"], ["--resume", "--overwrite"]):
        call(out, *options, *more, "--json")
        captured = capsys.readouterr()
        assert "nothing to do" in captured.err
        assert json.loads(captured.out) == json.loads((out / REPORT_NAME).read_text())
    assert state_of(out) == before
    call(out, *options, "--resume", "--dry-run")
    assert "nothing to do" in " ".join(capsys.readouterr().out.split())
    call(out, *options, "--overwrite")
    assert "nothing to do" not in capsys.readouterr().err


def test_resuming_a_finished_output_calibrates_nothing(tmp_path, monkeypatch):
    made, out = pair(), tmp_path / "out"
    config = RestoreConfig(max_safety_kl=1e-3, device="cpu")
    report = restore(made.aligned, made.finetuned, out, store=made.store, config=config)
    before = state_of(out)

    def calibrates(*_, **__):
        raise AssertionError("a store is made")

    monkeypatch.setattr(AlignedInputs, "with_store", calibrates)
    again = config.model_copy(update={"resume": True})
    found = restore(made.aligned, made.finetuned, out, config=again)
    assert found.warnings[:-1] == report.warnings
    assert "No store was at hand" in found.warnings[-1]
    assert found.model_copy(update={"warnings": report.warnings}) == report
    assert state_of(out) == before


def test_resuming_a_finished_output_of_another_job_says_what_differs(tmp_path):
    out = tmp_path / "out"
    restored(out)
    before = state_of(out)
    message = refused(out, resume=True, method="ridge", strength=0.25)
    assert "finished output of another job" in message
    assert "method is kfac there and ridge here" in message
    assert "strength is 0.5 there and 0.25 here" in message
    assert "--overwrite" in message
    other = tmp_path / "other"
    shutil.copytree(pair().aligned, other)
    assert "the fine-tuned model's fingerprint is" in refused(out, other, resume=True)
    assert state_of(out) == before
    assert restored(out, resume=True, overwrite=True, strength=0.25).options["strength"] == 0.25


def test_resuming_a_finished_output_that_was_changed_says_what(tmp_path):
    out = tmp_path / "out"
    restored(out)
    (out / "tokenizer.json").unlink()
    (out / "model.safetensors").write_bytes(b"short")
    message = refused(out, resume=True)
    assert "tokenizer.json is not there" in message
    assert "model.safetensors has 5 bytes" in message
    assert restored(out, resume=True, overwrite=True)
    assert verify(out).passed


def test_a_dry_run_says_what_speaks_against_the_output_and_makes_nothing(tmp_path, capsys):
    def said(out, *options, code=1):
        before = state_of(tmp_path)
        call(out, *options, "--dry-run", code=code)
        captured = capsys.readouterr()
        assert state_of(tmp_path) == before
        assert (captured.out == "") == (code == 1)
        return captured.err

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    done = tmp_path / "done"
    call(done)
    capsys.readouterr()
    assert "is not empty (thesis.txt)" in said(mine)
    assert "holds no deltaguard_report.json" in said(mine, "--overwrite")
    assert "is not empty" in said(done)
    assert said(done, "--overwrite", code=0) == ""
    assert "another job" in said(done, "--resume", "--method", "ridge")
    assert "is a file, not a folder" in said(mine / "thesis.txt" / "out").replace("\n", " ")
    assert "lies in the input" in said(pair().finetuned / "out")
    assert said(tmp_path / "new" / "deeper", code=0) == ""
    assert not (tmp_path / "new").exists()
    interrupted(tmp_path / "begun")
    assert "unfinished run" in said(tmp_path / "begun")
    assert "another plan" in said(tmp_path / "begun", "--resume")
    (done / "chat").mkdir()
    (done / "tokenizer.json").unlink()
    (done / "tokenizer.json").mkdir()
    assert "tokenizer.json" in said(done, "--overwrite")


def no_room(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "bytes at most, as ranks are not known before the work (--adapter-rank bounds them)"),
        ({"adapter_rank": 2}, "bytes at rank 2"),
    ],
)
def test_an_adapter_that_does_not_fit_on_the_disk_is_refused_before_any_work(
    options, said, tmp_path, monkeypatch
):
    no_room(monkeypatch, 1000)
    message = refused(tmp_path / "out", output_format="adapter", **options)
    assert said in message
    assert "1,000 are free" in message
    assert not (tmp_path / "out").exists()
    made = pair()
    config = RestoreConfig(**HALF, output_format="adapter", **options)
    with pytest.raises(DeltaguardError, match="1,000 are free"):
        plan_restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)


@pytest.mark.parametrize("options", [{}, {"adapter_rank": 2}, {"adapter_rank": 10_000}])
@pytest.mark.parametrize("thin", [False, True])
def test_the_bound_on_an_adapters_size_holds(options, thin, tmp_path, monkeypatch):
    made = pair()
    tuned = made.finetuned
    if thin:
        save_adapter(made.aligned, tmp_path / "tuned", ["q_proj"])
        tuned = tmp_path / "tuned"
    out = tmp_path / "out"
    report = restored(out, tuned, output_format="adapter", **options)
    size = sum(t.numel() * t.element_size() for t in weights(out).values())
    copied = sum(row.bytes for row in report.files if "token" in row.name or "chat" in row.name)
    no_room(monkeypatch, 2 * size + copied - 1)
    assert "are free" in refused(tmp_path / "other", tuned, output_format="adapter", **options)


def test_space_is_asked_for_everything_that_is_written(tmp_path, monkeypatch):
    made = pair()
    total = sum(path.stat().st_size for path in made.finetuned.iterdir() if path.name != "README.md")
    no_room(monkeypatch, total - 1)
    assert f"needs {total:,} bytes" in refused(tmp_path / "out")


class Stop(Exception):  # noqa: N818
    """Ends a restore in the middle."""


def interrupted(out, **options):
    """A restore that was interrupted after its first shard."""

    def stop(event):
        if event.stage == "restore" and event.done >= 12:
            raise Stop

    with pytest.raises(Stop):
        sharded(out, stop, **options)
    return out / ".deltaguard-partial" / "journal.jsonl"


def sharded(out, progress=None, **options):
    made = pair(max_shard_size="60KB")
    config = RestoreConfig(**{**HALF, **options})
    return restore(made.aligned, made.finetuned, out, store=made.store, config=config, progress=progress)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"mu":', '"mu": -', "mu"),
        ('"mu":', '"nu":', "mu"),
        ('"dial":null', '"dial":3', "dial"),
        ('{"price":{', '{"price":[],"x":{', "price"),
        ('"delta_norm":', '"delta_norm":1e999,"x":', "delta_norm"),
        ('"kept_energy":', '"kept_energy":"a","x":', "kept_energy"),
        ('"shape":[', '"shape":[1,', "not the"),
        ('"name":"model.layers.0.', '"name":"model.layers.7.', "not the"),
        ('"notes":[', '"notes":[],"x":[', "x"),
        ('"notes":[', '"notes":[3,', "notes|noted"),
    ],
)
def test_damaged_progress_is_one_message(old, new, said, tmp_path):
    out = tmp_path / "out"
    journal = interrupted(out)
    text = journal.read_text()
    assert old in text
    journal.write_text(text.replace(old, new, 1))
    with pytest.raises(DeltaguardError, match=rf"(?s)journal\.jsonl.*({said}).*--overwrite and without"):
        sharded(out, resume=True)
    assert list((out / ".deltaguard-partial" / "files").iterdir())
    sharded(out, overwrite=True)
    assert verify(out).passed


def test_an_overwriting_restore_that_was_interrupted_goes_on_and_leaves_other_files(tmp_path):
    out = tmp_path / "out"
    restored(out)
    (out / "thesis-weights.safetensors").write_bytes(b"mine")
    interrupted(out, overwrite=True)
    assert Checkpoint.open(out)
    report = sharded(out, resume=True)
    assert files_of(out) == {*(row.name for row in report.files), REPORT_NAME, "thesis-weights.safetensors"}
    assert verify(out).passed

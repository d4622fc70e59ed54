"""What an overwriting run replaces, and what it must leave alone whatever a report claims."""

import json

import pytest

from copies import INDEX, check_complete, report_of, stop_in_shard, write_all, write_shard, writer_refusal
from deltaguard.errors import DeltaguardError
from deltaguard.models.admission import unlisted
from deltaguard.models.writer import CheckpointWriter

REPORT = "deltaguard_report.json"


def output(folder, listed, others=()):
    """A folder with files of an earlier run, which its report lists, and others."""
    folder.mkdir()
    for name in (*listed, *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"old {name}")
    (folder / REPORT).write_text(report_of(listed))
    return folder


def everything(folder):
    return {
        str(path.relative_to(folder)): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def test_what_the_report_does_not_list_stays(source, tmp_path):
    mine = ["thesis-weights.safetensors", "notes.txt", "sub/mine.txt", "data/mine.txt"]
    out = output(tmp_path / "out", [source.shards[0], "model-9.safetensors", "sub/old.txt", "gone/old"], mine)
    write_all(source, out, overwrite=True)
    check_complete(source, out, extra={"thesis-weights.safetensors", "notes.txt", "sub", "data"})
    assert all((out / name).read_text() == f"old {name}" for name in mine)
    assert not (out / "sub/old.txt").exists()
    assert unlisted(out, [*source.shards, INDEX, "config.json"]) == sorted(["data/", "sub/", *mine[:2]])
    assert unlisted(out, ["sub/kept", *source.shards, INDEX, "config.json"])[2:] == ["sub/mine.txt", mine[0]]


@pytest.mark.parametrize(
    "name",
    [
        "../thesis.txt",
        "../../thesis.txt",
        "sub/../../thesis.txt",
        "/THESIS",
        "link/thesis.txt",
        "link/deeper/thesis.txt",
        ".deltaguard-partial/journal.jsonl",
        "./config.json",
        "",
        ".",
        "a\0b",
        "a" * 5000,
    ],
)
def test_a_report_that_names_what_lies_elsewhere_is_not_believed(source, tmp_path, name):
    outside = tmp_path / "outside"
    (outside / "deeper").mkdir(parents=True)
    places = [tmp_path / "thesis.txt", outside / "thesis.txt", outside / "deeper/thesis.txt"]
    for path in places:
        path.write_text("years of work")
    name = name.replace("/THESIS", str(places[0]))
    out = output(tmp_path / "out", ["config.json"])
    (out / "link").symlink_to(outside)
    (out / REPORT).write_text(report_of(["config.json", name]))
    before = everything(out)
    message = writer_refusal(out, overwrite=True)
    assert "another output folder" in message
    assert everything(out) == before
    assert all(path.read_text() == "years of work" for path in places)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"files": 3}', '{"files": [{"name": 3}]}', "\xff", "null"]
)
def test_a_report_that_cannot_be_read_lists_nothing(source, tmp_path, content):
    out = output(tmp_path / "out", ["config.json"])
    (out / REPORT).write_bytes(content.encode("latin-1"))
    before = everything(out)
    message = writer_refusal(out, overwrite=True)
    assert REPORT in message
    assert everything(out) == before


def test_a_folder_without_a_report_is_not_overwritten(source, tmp_path):
    out = output(tmp_path / "out", ["config.json", "model.safetensors"])
    elsewhere = (out / REPORT).rename(tmp_path / "report.json")
    message = writer_refusal(out, overwrite=True)
    assert "holds no deltaguard_report.json" in message
    assert "config.json, model.safetensors" in message
    (out / REPORT).symlink_to(elsewhere)
    assert "is a link" in writer_refusal(out, overwrite=True)
    assert len(everything(out)) == 3


def test_all_that_is_in_the_way_is_named_before_any_work(source, tmp_path):
    mine = ["config.json", "tokenizer/files", "chat"]
    out = output(tmp_path / "out", ["model.safetensors", "listed"], mine)
    (out / "linked").symlink_to(tmp_path)
    (out / "listed").unlink()
    (out / "listed").mkdir()
    before = everything(out)
    names = [
        "config.json",
        "tokenizer",
        "chat/template",
        "linked/thesis",
        "listed",
        "model.safetensors",
        "new",
    ]
    lines = writer_refusal(out, overwrite=True, names=names).splitlines()
    assert [line[:8] for line in lines[1:-1]] == ["- chat, ", "- config", "- linked", "- listed", "- tokeni"]
    assert "Move the rest away" in lines[-1]
    assert everything(out) == before
    assert not (out / ".deltaguard-partial").exists()


@pytest.mark.parametrize("options", [{}, {"overwrite": True}])
def test_a_file_that_came_while_the_run_was_at_work_is_not_replaced(source, tmp_path, options):
    out = tmp_path / "out"
    with CheckpointWriter(out, plan_hash="plan", **options) as writer:
        for shard in source.shards:
            write_shard(writer, source, shard)
        writer.copy(source.folder / "config.json", "config.json")
        writer.copy(source.folder / INDEX, INDEX)
        (out / "config.json").write_text("mine")
        with pytest.raises(DeltaguardError, match=r"(?s)must not replace: config.json.*Move"):
            writer.commit(last=INDEX)
    assert (out / "config.json").read_text() == "mine"
    assert not (out / INDEX).exists()
    (out / "config.json").unlink()
    assert write_all(source, out, resume=True) == []
    check_complete(source, out)


def test_a_listed_link_goes_and_what_it_leads_to_stays(source, tmp_path):
    out = output(tmp_path / "out", [])
    (tmp_path / "thesis.txt").write_text("years of work")
    (out / "config.json").symlink_to(tmp_path / "thesis.txt")
    (out / REPORT).write_text(report_of(["config.json", "folder"]))
    (out / "folder").mkdir()
    (out / "folder" / "mine").write_text("mine")
    write_all(source, out, overwrite=True)
    check_complete(source, out, extra={"folder"})
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert (out / "folder" / "mine").read_text() == "mine"


@pytest.mark.parametrize("link", [".deltaguard-partial", ".deltaguard-partial/files"])
def test_a_staging_folder_that_is_a_link_is_refused(source, tmp_path, link):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.part").write_text("mine")
    stop_in_shard(source, tmp_path / "out", 1)
    target = tmp_path / "out" / link
    target.rename(tmp_path / "moved")
    target.symlink_to(elsewhere)
    for options in ({"resume": True}, {"overwrite": True}):
        assert "is a link" in writer_refusal(tmp_path / "out", **options)
    assert (elsewhere / "mine.part").read_text() == "mine"


def test_a_run_that_starts_anew_knows_what_the_one_before_was_replacing(source, tmp_path, monkeypatch):
    """The old report is gone in the middle of a commit, and the journal knows what it listed."""
    out = output(tmp_path / "out", ["model.safetensors", "old.txt", "zzz.txt"], ["notes.txt"])

    class Killed(BaseException):
        pass

    def dying(self, name):
        if name == "zzz.txt":
            raise Killed
        removed(self, name)

    removed = CheckpointWriter._remove
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "_remove", dying)
        with pytest.raises(Killed):
            write_all(source, out, overwrite=True)
    assert not (out / REPORT).exists()
    # Neither a run that fails at once nor one that is stopped early makes the folder nobody's.
    with (
        pytest.raises(DeltaguardError, match="bytes"),
        CheckpointWriter(out, plan_hash="other", overwrite=True) as writer,
    ):
        writer.require_space(1 << 60)
    stop_in_shard(source, out, 1, overwrite=True)
    write_all(source, out, overwrite=True)
    check_complete(source, out, extra={"notes.txt"})


def test_of_a_staged_file_that_became_a_link_nothing_is_taken(source, tmp_path):
    out = tmp_path / "out"
    stop_in_shard(source, out, 2)
    staged = out / ".deltaguard-partial" / "files" / source.shards[0]
    staged.rename(tmp_path / "moved")
    staged.symlink_to(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    (staged.parent / "folder").symlink_to(tmp_path / "elsewhere")
    with CheckpointWriter(out, plan_hash="plan", resume=True) as writer:
        writer.text("folder/new", "new")
    assert not list((tmp_path / "elsewhere").iterdir())
    (staged.parent / "folder" / "new").unlink()
    assert write_all(source, out, resume=True) == [source.shards[0], source.shards[2]]
    assert not (out / source.shards[0]).is_symlink()


def test_the_first_line_of_the_journal_says_what_is_replaced(source, tmp_path):
    out = output(tmp_path / "out", ["b", "a"])
    stop_in_shard(source, out, 1, overwrite=True)
    first = (out / ".deltaguard-partial" / "journal.jsonl").read_text().splitlines()[0]
    assert json.loads(first) == {"plan_hash": "plan", "replaces": ["a", "b", REPORT]}

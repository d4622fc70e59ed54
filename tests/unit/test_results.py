"""Folders and pages for results, and small files that are there in full or not at all."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from copies import everything_under
from deltaguard.errors import DeltaguardError
from deltaguard.models import durable
from deltaguard.models.durable import lock_folder, write_atomically
from deltaguard.models.results import BENCH, DEMO, EVALUATION, SWEEP, results_folder, write_page

PAGE = '<!DOCTYPE html><head><meta name="generator" content="deltaguard"></head>'
ALL = (EVALUATION, BENCH, SWEEP, DEMO)


def refusal(folder, results, **options):
    with pytest.raises(DeltaguardError) as error, results_folder(folder, results, **options):
        pass
    return str(error.value)


@pytest.mark.parametrize("results", ALL, ids=lambda each: each.verb)
def test_a_folder_is_new_or_empty_or_known_by_the_files_of_its_verb(results, tmp_path):
    for folder in (tmp_path / "new" / "deeper", tmp_path / "new" / "deeper"):
        with results_folder(folder, results):
            assert folder.is_dir()
    for mark in results.marks:
        folder = tmp_path / mark
        folder.mkdir()
        (folder / mark).write_text("{}")
        (folder / "notes.txt").write_text("mine")
        with results_folder(folder, results):
            assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("results", ALL, ids=lambda each: each.verb)
@pytest.mark.parametrize("name", ["notes.txt", "README.md", "report.html", "answers/a.txt", ".hidden"])
def test_a_folder_of_something_else_is_refused_and_what_it_holds_is_named(results, name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = everything_under(tmp_path)
    message = refusal(tmp_path, results)
    assert name.partition("/")[0] in message
    assert "another" in message
    assert everything_under(tmp_path) == before


@pytest.mark.parametrize("results", [EVALUATION, BENCH, SWEEP], ids=lambda each: each.verb)
@pytest.mark.parametrize("other", ["config.json", "deltaguard_report.json", "curvature.json", "demo.json"])
def test_a_model_with_results_in_its_folder_stays_a_model(results, other, tmp_path):
    for name in (results.marks[0], other):
        (tmp_path / name).write_text("{}")
    assert f"holds {other}" in refusal(tmp_path, results)


def test_an_evaluation_does_not_go_on_in_the_folder_of_a_bench(tmp_path):
    """Both keep answers and seconds."""
    (tmp_path / "seconds.json").write_text("{}")
    with results_folder(tmp_path, EVALUATION):
        pass
    (tmp_path / "settings.json").write_text("{}")
    assert "settings.json" in refusal(tmp_path, EVALUATION)
    with results_folder(tmp_path, BENCH):
        pass


def test_a_page_that_someone_else_wrote_is_known_before_the_work(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "report.html").write_text("<h1>Mine</h1>")
    assert "report.html is no page that deltaguard drew" in refusal(tmp_path, SWEEP)
    (tmp_path / "report.html").write_text(PAGE)
    with results_folder(tmp_path, SWEEP):
        pass


@pytest.mark.parametrize("relation", ["is", "contains", "lies in"])
def test_a_model_that_is_an_input_is_not_written_into(tmp_path, relation):
    model = tmp_path / "models" / "aligned"
    model.mkdir(parents=True)
    (tmp_path / "link").symlink_to(model)
    out = {"is": tmp_path / "link", "contains": tmp_path / "models", "lies in": model / "results"}[relation]
    for given in (model, tmp_path / "link"):
        assert f"{relation} the input {given}" in refusal(
            out, EVALUATION, inputs=["someone/on-the-hub", given]
        )
    assert everything_under(tmp_path) == {"models", "models/aligned", "link"}


def test_a_failure_leaves_no_empty_folder_and_what_was_written(tmp_path):
    (tmp_path / "before").mkdir()
    for written in ("", "kept.txt"):
        out = tmp_path / "before" / "a" / "out"
        with pytest.raises(KeyboardInterrupt), results_folder(out, SWEEP):  # noqa: PT012
            if written:
                (out / written).write_text("x")
            raise KeyboardInterrupt
        assert everything_under(tmp_path / "before") == (
            {"a", "a/out", "a/out/kept.txt"} if written else set()
        )


def test_two_runs_do_not_share_a_folder(tmp_path):
    with results_folder(tmp_path / "out", SWEEP):
        assert "Another process" in refusal(tmp_path / "out", SWEEP)
    os.close(lock_folder(tmp_path / "out"))


@pytest.mark.parametrize(
    "content", [b"", b"<h1>Mine</h1>", b"\xff" * 9000, b"x" * 5000 + PAGE.encode(), b"deltaguard"]
)
def test_a_page_takes_the_place_of_none_or_of_one_that_deltaguard_drew(tmp_path, content):
    page = tmp_path / "report.html"
    write_page(page, PAGE)
    write_page(page, PAGE + "again")
    assert page.read_text() == PAGE + "again"
    page.write_bytes(content)
    with pytest.raises(DeltaguardError, match=r"report.html is no page that deltaguard drew"):
        write_page(page, PAGE)
    assert page.read_bytes() == content
    assert everything_under(tmp_path) == {"report.html"}


def test_what_is_no_file_is_no_page(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("pipe", "folder", "dangling", "/dev/null"):
        with pytest.raises(DeltaguardError, match="no page that deltaguard drew"):
            write_page(tmp_path / name, PAGE)
    assert everything_under(tmp_path) == {"pipe", "folder", "dangling"}
    (tmp_path / "page").write_text(PAGE)
    (tmp_path / "linked").symlink_to(tmp_path / "page")
    write_page(tmp_path / "linked", PAGE + "new")
    assert not (tmp_path / "linked").is_symlink()
    assert (tmp_path / "page").read_text() == PAGE


@pytest.mark.parametrize("old", [None, "old"])
def test_a_disk_that_fills_while_a_file_is_written_leaves_the_old_one_and_nothing_else(tmp_path, old):
    path = tmp_path / "report.html"
    if old:
        path.write_text(old)
    before = everything_under(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DeltaguardError, match=r"report\.html cannot be written: File too large"):
            write_atomically(path, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert everything_under(tmp_path) == before
    assert old is None or path.read_text() == old


def test_a_full_disk_is_told_as_that(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(DeltaguardError, match=r"no space left for .*report\.html: 3 bytes are needed"):
        write_atomically(tmp_path / "report.html", "new")
    assert (tmp_path / "report.html").read_text() == "old"
    assert everything_under(tmp_path) == {"report.html"}


def test_what_a_kill_left_is_replaced_and_a_link_by_its_name_is_not_written_through(tmp_path):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    (tmp_path / ".report.html.partial").symlink_to(thesis)
    write_atomically(tmp_path / "report.html", "new")
    assert everything_under(tmp_path) == {"report.html", "thesis.txt"}
    assert thesis.read_text() == "years of work"


KILLED = """
import os, signal, sys
from pathlib import Path
from deltaguard.models.durable import write_atomically
sys.path.insert(0, sys.argv[2])
from killed_writer import kill_at
os.fsync = lambda descriptor: None
page = Path(sys.argv[1]) / "report.html"
for step in range(20):
    page.write_text("old")
    child = os.fork()
    if child == 0:
        kill_at(step)
        write_atomically(page, "new" * 10000)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert killed or (status == 0 and page.read_text() == "new" * 10000), step
    assert page.read_text() in ("old", "new" * 10000), step
    write_atomically(page, "next")
    assert [path.name for path in page.parent.iterdir()] == ["report.html"], step
    if not killed:
        sys.exit(0 if step > 2 else 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_every_step_a_file_is_the_old_or_the_new_one(tmp_path, request):
    helpers = request.config.rootpath / "tests" / "integration"
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, helpers], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr

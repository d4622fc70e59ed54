"""The one printer: nothing that a terminal would obey, and no stream that it fails on."""

import io
import json
import logging
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console, Group
from rich.table import Table

from deltaguard.cli import _PrintableRecord
from deltaguard.cli.app import BUG, run
from deltaguard.cli.report import draw_folder
from deltaguard.cli.sink import Bars, Out, Printable, ProgressBar, complain, emit, progress_bar, tell
from deltaguard.progress import Event
from deltaguard.reports.card import model_card
from deltaguard.reports.records.base import ModelReference, Record
from deltaguard.reports.records.restore import REPORT_NAME, OtherRow
from deltaguard.reports.restore import restore_page
from deltaguard.text import printable, printable_lines, writable
from pairs import pair
from restores import layer, restore_report

ODD = "a\x1b[2J\x1b]0;owned\x07\u202eb\u2066c\r\ud800\udcffé\u200dd"
SHOWN = r"a\x1b[2J\x1b]0;owned\x07\u202eb\u2066c\r\ud800\udcffé" + "\u200dd"
OBEYED = "\x1b\x07\r\u202e\u2066\ud800\udcff"


class Said(Record):
    """A result that holds everything."""

    text: str
    others: dict[str, tuple[str, ...]]


@pytest.fixture
def made():
    return pair("llama")


def harmless(text):
    return not any(char in text for char in OBEYED)


# Text


def test_what_a_terminal_would_obey_is_shown():
    assert printable(ODD) == SHOWN
    assert printable("a\nb\tc") == r"a\nb\tc"
    assert printable_lines(f"{ODD}\n\tb") == f"{SHOWN}\n\tb"
    assert printable("\u2028\u2029\x85\xad\ufeff\U000e0041") == r"\u2028\u2029\x85\xad\ufeff\U000e0041"


@pytest.mark.parametrize("text", ["", "plain", "日本語 ελληνικά", "می‌خواهم", "👩‍🔬", "a\u00a0b"])
def test_what_people_write_stays_as_it_is(text):
    assert printable(text) == printable_lines(text) == writable(text) == text


def test_every_text_can_be_written():
    assert writable("a\udcff\ud800b").encode() == rb"a\udcff\ud800b"


def test_a_report_holds_what_a_file_can():
    found = ModelReference(reference="runs/m\udcff", fingerprint="a")
    assert ModelReference.model_validate_json(found.model_dump_json()) == found
    assert found.reference == r"runs/m\udcff"
    nested = Said(text="a", others={"k\udcff": ("v\udcff",)})
    assert nested.others == {r"k\udcff": (r"v\udcff",)}


# Streams


def test_json_is_valid_and_ascii_whatever_a_result_holds(capsys):
    emit(Said(text=ODD, others={ODD: (ODD,)}), "", as_json=True)
    told = capsys.readouterr().out
    assert told.isascii()
    assert harmless(told)
    assert json.loads(told)["text"] == writable(ODD)


def test_what_is_no_number_is_null(capsys):
    class Odd(Record):
        numbers: dict[str, object]

    emit(Odd.model_construct(numbers={"a": float("nan"), "b": float("inf")}), "", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"numbers": {"a": None, "b": None}}


@pytest.mark.parametrize("name", [ODD, "[red]a[/red]", "[link=http://x]a[/link]", ":smile:"])
def test_names_are_shown_as_text_in_tables_lines_and_errors(name, capsys):
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    emit(Said(text="", others={}), Group(table, name), as_json=False)
    emit(Said(text="", others={}), name, as_json=False)
    tell(name)
    complain(f"There is no {name}", hint=name)
    printed = capsys.readouterr()
    assert harmless(printed.out.replace("\r\n", "\n"))
    assert harmless(printed.err)
    shown = printable(name).replace("\\r", "")
    for text in (printed.out, printed.err):
        assert shown[:12] in text.replace("\\r", "")


def test_a_bar_shows_the_name_of_its_stage_as_text():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system=None, width=200)
    with Bars(console=console, transient=False) as bars:
        ProgressBar(bars)(Event("[bold]a\x1b]0;owned\x07b", 1, 2))
    assert r"\x1b]0;owned\x07b" in stream.getvalue()
    assert "\x1b]0;" not in stream.getvalue()


def test_the_time_left_is_told_where_steps_take_minutes(monkeypatch):
    passed, shown = [0.0], []
    monkeypatch.setattr("rich.console.monotonic", lambda: passed[0])
    monkeypatch.setattr(Out, "is_terminal", True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(Bars, "get_renderables", lambda bars: shown.append(bars.tasks) or ())
    with progress_bar() as progress:
        for done in range(4):
            progress(Event("look 1 of at most 6", done, 10))
            passed[0] += 120
    assert shown[-1][0].time_remaining == pytest.approx(7 * 120, rel=0.01)


@pytest.mark.parametrize(
    ("is_terminal", "variables"),
    [(False, {"FORCE_COLOR": "1"}), (True, {"TERM": "dumb"}), (True, {"TTY_INTERACTIVE": "0"})],
    ids=["a log in colours", "a dumb terminal", "one that nobody looks at"],
)
def test_stages_are_lines_where_no_bar_can_be_drawn(capsys, monkeypatch, is_terminal, variables):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    for name, value in ({"TTY_COMPATIBLE": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    with progress_bar() as progress:
        progress(Event("measure", 1, 2, detail="safety KL 0.001"))
    assert "measure: safety KL 0.001" in capsys.readouterr().err


def test_what_stands_below_a_table_is_not_wrapped(capsys):
    command = f"deltaguard eval {'aligned/' * 20} restored -o evaluation"
    emit(Said(text="", others={}), Table("a"), as_json=False, last=command)
    assert command in capsys.readouterr().out


def test_stages_are_lines_where_there_is_no_terminal(capsys):
    with progress_bar() as progress:
        progress(Event(ODD, 0, 2))
        progress(Event(ODD, 1, 2))
    # Bells and returns are not shown at all.
    assert printable(ODD.replace("\x07", "").replace("\r", "")) + " ..." in capsys.readouterr().err


def test_what_other_libraries_log_is_shown_as_text():
    record = _PrintableRecord("transformers", logging.WARNING, "file", 1, "type %s", (ODD,), None)
    assert record.getMessage() == f"type {SHOWN}"


# Pages


def odd_report():
    return restore_report(
        aligned=ModelReference(reference=f"runs/{ODD}", fingerprint="a" * 64),
        layers=(layer(f"model.layers.0.{ODD}.weight"), layer(f"{ODD}.weight")),
        others=(OtherRow(name=ODD, source="aligned", reason=ODD, differs=True),),
    )


def test_pages_and_cards_hold_names_as_text(tmp_path):
    for text in (restore_page(odd_report()), model_card(odd_report(), front_matter={"license": ODD[:20]})):
        text.encode()
        assert harmless(text)
        assert r"\x1b[2J" in text
    (tmp_path / REPORT_NAME).write_text(odd_report().model_dump_json(), encoding="utf-8")
    page = tmp_path / "page.html"
    draw_folder(tmp_path, page)
    assert harmless(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "char", [*OBEYED, "\0", "\u2028", "\ufffe", "\x9b", "\n", "x" * 100_000], ids=lambda char: f"{char!a:.9}"
)
def test_no_name_ends_the_process_that_draws_it(char):
    """As control characters do in the library that makes SVG; a long name takes it minutes."""
    started = time.monotonic()
    report = restore_report(layers=tuple(layer(f"model.layers.{i}.a{char}b.weight") for i in range(2)))
    assert "<svg" in restore_page(report)
    assert time.monotonic() - started < 10


def test_a_drawing_with_markup_of_its_own_keeps_it():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="standard", width=40)
    console.print(Printable(Table("a", title="b")))
    assert "\x1b[" in stream.getvalue()


# The program


def started(*arguments, **options):
    environment = {**os.environ, **options.pop("env", {})}
    command = [sys.executable, "-m", "deltaguard", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_an_ascii_terminal_is_enough(tmp_path, made, options):
    odd = tmp_path / "modèle-日本"
    odd.symlink_to(made.finetuned)
    process = started(
        "diff", made.aligned, odd, *options, env={"PYTHONIOENCODING": "ascii", "COLUMNS": "300"}
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.isascii()
    assert rb"mod\xe8le" in out or rb"mod\u00e8le" in out


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_reader_that_stops_early_ends_nothing_with_an_error(made, options):
    with started("diff", made.aligned, made.finetuned, *options) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_help_for_a_reader_that_stops_early():
    with started("--help") as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 0


def test_work_goes_on_where_nobody_reads_how_far_it_is(tmp_path, made):
    out = tmp_path / "out"
    command = ("restore", made.aligned, made.finetuned, "-o", out, "--store", made.store)
    with started(*command, "--max-safety-kl", "6e-4", "--json") as process:
        process.stderr.close()
        assert json.loads(process.stdout.read())["options"]["method"] == "kfac"
        assert process.wait(timeout=60) == 0
    assert (out / REPORT_NAME).is_file()


@pytest.mark.parametrize(
    ("closed", "options"), [(">&-", ()), (">&-", ("--json",)), (">&- 2>&-", ()), ("2>&-", ("--json",))]
)
def test_streams_that_are_not_there(made, options, closed):
    command = f'exec "$0" -m deltaguard diff "$1" "$2" {" ".join(options)} {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, made.aligned, made.finetuned], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")  # noqa: PTH110
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_full_disk_behind_stdout_is_one_message(made, options):
    with open("/dev/full", "wb") as full:  # noqa: PTH123
        command = [sys.executable, "-m", "deltaguard", "diff", made.aligned, made.finetuned, *options]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1
    assert done.stderr.count(b"\n") == 1
    assert b"No space left on device" in done.stderr


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes no such name")
def test_a_name_that_is_not_utf_8_is_one_message(tmp_path, made, capsys):
    odd = tmp_path / os.fsdecode(b"model-\xff\x1b[31m")
    odd.symlink_to(made.finetuned)
    assert run(["diff", str(made.aligned), str(odd)]) == 1
    told = capsys.readouterr().err
    assert r"model-\udcff\x1b[31m, which is not UTF-8" not in told
    assert r"model-\udcff\x1b[31m" in told
    assert "which is not UTF-8" in told
    assert harmless(told)


def test_a_name_that_a_terminal_would_obey_goes_all_the_way(tmp_path, made, capsys):
    odd = tmp_path / "model-\x1b[31m\u202e"
    odd.symlink_to(made.finetuned)
    out = tmp_path / "out-\x1b]0;x\x07"
    call = ["restore", str(made.aligned), str(odd), "-o", str(out), "--max-safety-kl", "6e-4"]
    for command, code in (
        (["diff", str(made.aligned), str(odd)], 0),
        ([*call, "--store", str(made.store)], 0),
        (["verify", str(out)], 0),
        (["report", str(out)], 0),
        (call, 1),
    ):
        assert run(command) == code
        printed = capsys.readouterr()
        assert harmless(printed.out)
        assert harmless(printed.err)
    for name in ("README.md", "report.html"):
        assert harmless((out / name).read_text(encoding="utf-8"))


# A bug


@pytest.fixture
def broken(monkeypatch):
    def diff(*_, **__):
        raise KeyError(f"lost {ODD}")

    monkeypatch.setattr("deltaguard.restoration.diff.diff", diff)
    return ["diff", "one", "other"]


def test_an_error_that_nobody_expected_is_told_as_a_bug(broken, capsys, monkeypatch):
    monkeypatch.delenv("DELTAGUARD_DEBUG", raising=False)
    assert run(broken) == BUG == 70
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Error: Unexpected KeyError: 'lost a" in printed.err
    assert "DELTAGUARD_DEBUG=1" in printed.err
    assert "CONTRIBUTING.md" in printed.err
    assert "Traceback" not in printed.err
    assert harmless(printed.err)


def test_where_it_comes_from_is_shown_if_asked_for(broken, capsys, monkeypatch):
    monkeypatch.setenv("DELTAGUARD_DEBUG", "1")
    assert run(broken) == BUG
    printed = capsys.readouterr()
    assert printed.err.count("Traceback (most recent call last)") == 1
    assert "test_printer.py" in printed.err
    assert harmless(printed.err)


def test_a_known_error_shows_where_it_comes_from_if_asked_for(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DELTAGUARD_DEBUG", "1")
    assert run(["verify", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err

"""Evaluations whose servers leave something out, hang, or are interrupted: what is told, and what is kept."""

import itertools
import json
import signal
import time

import pytest

from deltaguard.cli.app import run
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.evaluate import evaluate
from deltaguard.reports.evaluation_page import evaluation_page
from deltaguard.reports.records.evaluation import EvaluationReport
from programs import start
from replies import MALFORMED, NO_JSON, OTHER_JSON
from suites import Raw, completion, server, suite_file

TEN = """
name: ten
decoding: {max_new_tokens: 4}
judges: [{kind: opening}, {kind: keywords}]
sections:
  - {name: attack, kind: attack, builtin: attack, count: 10}
  - {name: task, kind: utility, builtin: task, count: 4, scorers: [json-match]}
"""
ANSWERS = "answers/m/attack.jsonl"


class Lossy:
    """A server that answers each prompt alike, but for the first few, to which it sends something else."""

    def __init__(self, *lost):
        self.lost = list(lost)
        self.replies = {}
        self.asked = []

    def __call__(self, request):
        prompt = request["messages"][-1]["content"]
        self.asked.append(prompt)
        if prompt not in self.replies:
            self.replies[prompt] = self.lost.pop() if self.lost else (200, "Sure, this is how.")
        return self.replies[prompt]

    def mend(self):
        self.replies = {}
        self.asked = []


def stored(out):
    lines = [json.loads(line) for line in (out / ANSWERS).read_text().splitlines()]
    return [line["value"] for line in lines[1:]]


def evaluated(url, folder, text=TEN, **options):
    config = EngineConfig("openai", base_url=url, **options)
    return evaluate(["m"], folder / "out", suite=suite_file(folder, text), engine=config)


def test_what_a_server_leaves_out_is_counted_named_and_asked_again(tmp_path):
    lossy = Lossy(MALFORMED["no choices"])
    with server(lossy) as url:
        report = evaluated(url, tmp_path, max_missing=0.1)
        assert len(lossy.asked) == 10 + 4 + 4
        numbers = {
            (each.judge, each.name): each.estimate for each in report.measures if each.section == "attack"
        }
        assert (numbers[None, "missing"].value, numbers[None, "missing"].total) == (0.1, 10)
        success = numbers["opening", "attack success"]
        assert (success.value, success.total) == (1, 9)
        assert numbers["keywords", "incoherent"].total == 9
        assert report.agreements[0].total == 9
        (note,) = report.notes
        assert "m gave no answer to 1 of 10 prompts of section attack" in note
        assert "the reply has no choices" in note
        assert "(after 4 retries)" in note
        assert stored(tmp_path / "out") == ["Sure, this is how."] * 9
        assert EvaluationReport.model_validate_json((tmp_path / "out/evaluation.json").read_text()) == report
        assert "| – | m | – | – | 10.0 % (1.8–40.4 %) |" in (tmp_path / "out/README.md").read_text()
        page = evaluation_page(report)
        assert "10.0 %<small>1.8–40.4 %" in page
        assert "m gave no answer to 1 of 10 prompts of section attack" in page
        lossy.mend()
        again = evaluated(url, tmp_path, max_missing=0.1)
    assert len(lossy.asked) == 1
    assert not again.notes
    assert "missing" not in {each.name for each in again.measures}
    assert stored(tmp_path / "out") == ["Sure, this is how."] * 10


def test_too_many_missing_answers_end_the_run_and_the_rest_is_kept(tmp_path):
    lossy = Lossy(*[MALFORMED[name] for name in ("HTML", "an error", "nothing")])
    with server(lossy) as url:
        with pytest.raises(DeltaguardError) as caught:
            evaluated(url, tmp_path, max_missing=0.2)
        told = str(caught.value)
        assert (
            f"Answers to section attack from model m, openai at {url}: 3 of 10 are missing, and 20 %" in told
        )
        assert "The first reason: the reply" in told
        assert "What was answered is kept: run the same command again to ask for the rest" in told
        assert not (tmp_path / "out/evaluation.json").exists()
        kept = len(stored(tmp_path / "out"))
        lossy.mend()
        evaluated(url, tmp_path, max_missing=0.2)
    assert len(lossy.asked) == 10 - kept + 4


@pytest.mark.parametrize(
    ("reply", "told", "most"),
    [
        ((401, "wrong key"), "status 401: wrong key. What was answered", 50),
        (MALFORMED["an error"], "the reply is an error: out of order (after 4 retries). What", 250),
        (MALFORMED["no choices"], "(after 4 retries). What was answered", 250),
    ],
)
def test_a_server_that_fails_throughout_is_given_up_early(tmp_path, capsys, reply, told, most):
    asked = []

    def fail(request):
        asked.append(request)
        return reply

    text = TEN.replace("count: 10", "count: 100")
    with server(fail) as url:
        options = ["--engine", "openai", "--base-url", url, "--suite", str(suite_file(tmp_path, text))]
        assert run(["eval", "m", "-o", str(tmp_path / "out"), *options]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "6 of 100 are missing, and 5 % may be" in said
    assert told in said
    assert len(asked) < most
    assert not (tmp_path / "out" / ANSWERS).exists()


def test_no_malformed_reply_is_stored_as_an_answer(tmp_path):
    lost = (OTHER_JSON | NO_JSON).values()
    with server(Lossy(*lost)) as url:
        report = evaluated(url, tmp_path, TEN.replace("count: 10", "count: 80"), max_missing=0.9)
    assert stored(tmp_path / "out") == ["Sure, this is how."] * (80 - len(lost))
    (missing,) = [each for each in report.measures if each.name == "missing"]
    assert missing.estimate.value == pytest.approx(len(lost) / 80)


def test_options_reach_the_server_and_the_judge(tmp_path, capsys):
    asked = []

    def reply(request):
        first = request not in asked
        asked.append(request)
        return Raw(completion("Score: 5").body, delay=30 if first else 0)

    with server(reply) as url:
        options = ["--engine", "openai", "--base-url", url, "--timeout", "1", "--max-missing", "0.4"]
        options += ["--suite", str(suite_file(tmp_path, TEN)), "--judge-url", url]
        assert run(["eval", "m", "-o", str(tmp_path / "out"), *options, "--judge-model", "judge"]) == 0
        # Each was asked again: by the engine, and by the judge all attacks, whose answers are alike.
        assert len({str(request) for request in asked}) == 14 + 10
        assert all(asked.count(request) >= 2 for request in asked)
        capsys.readouterr()
    with server(lambda _: (400, "too much")) as url:
        options[-1] = url
        assert run(["eval", "m", "-o", str(tmp_path / "out"), *options, "--judge-model", "other"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert f"Scores of the judge llm, model 'other' at {url}: 5 of 10 are missing, and 40 % may be" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--timeout", "0"], "--timeout must be more than 0 seconds, and is 0"),
        (["--timeout", "nan"], "--timeout must be more than 0 seconds, and is nan"),
        (["--max-missing", "1"], "--max-missing must be 0 or more and below 1, and is 1"),
        (["--max-missing", "-0.1"], "--max-missing must be 0 or more and below 1, and is -0.1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(tmp_path, capsys, options, told):
    assert run(["eval", "m", "-o", str(tmp_path / "out"), *options]) == 2
    assert told in capsys.readouterr().err


def test_an_address_that_is_none_is_refused_without_its_password(tmp_path, capsys):
    base = ["--engine", "openai", "--base-url", "ftp://me:hunter2-hunter2@127.0.0.1/v1"]
    assert run(["eval", "m", "-o", str(tmp_path / "out"), *base]) == 1
    told = capsys.readouterr().err
    assert "ftp://127.0.0.1/v1" in told
    assert "hunter2" not in told


def test_no_key_is_printed_or_stored(tmp_path, capsys, monkeypatch):
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("SOME_KEY", key)
    number = itertools.count()

    def reply(request):
        authorization = request.headers["Authorization"]
        return (400, f"Got {authorization}") if next(number) == 0 else (200, f"Sure: {authorization}")

    with server(reply) as url:
        options = [
            "--engine",
            "openai",
            "--base-url",
            url,
            "--api-key-env",
            "SOME_KEY",
            "--max-missing",
            "0.3",
        ]
        options += ["--suite", str(suite_file(tmp_path, TEN)), "-o", str(tmp_path / "out"), "--json"]
        assert run(["eval", "m", *options]) == 0
    printed = capsys.readouterr()
    assert "status 400: Got Bearer ***" in printed.out
    texts = [path.read_text() for path in (tmp_path / "out").rglob("*.*") if path.is_file()]
    assert texts
    assert not any(key in text for text in (*texts, printed.out, printed.err))


@pytest.mark.parametrize("judge_hangs", [False, True])
def test_ctrl_c_ends_a_run_whose_requests_hang_and_keeps_what_was_said(tmp_path, judge_hangs):
    number = itertools.count()

    def reply(request):
        if (request["model"] == "judge") is judge_hangs:
            # Three answers, then nothing any more.
            delay = 0 if next(number) < 3 else 600
            return Raw(completion("Sure.\nScore: 4").body, delay=delay)
        return 200, "Sure.\nScore: 4"

    out = tmp_path / "out"
    file, head = (out / "judge-cache.jsonl", 0) if judge_hangs else (out / ANSWERS, 1)
    text = TEN.replace("count: 10", "count: 20")
    with server(reply) as url:
        suite = suite_file(tmp_path, text)
        judge = ("--judge-url", url, "--judge-model", "judge")
        program = start(
            "eval", "m", "--engine", "openai", "--base-url", url, *judge, "--suite", suite, "-o", out
        )
        try:
            deadline = time.monotonic() + 120
            while not (file.exists() and len(file.read_text().splitlines()) >= 3 + head):
                assert program.poll() is None, program.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            program.send_signal(signal.SIGINT)
            began = time.monotonic()
            _, told = program.communicate(timeout=60)
            seconds = time.monotonic() - began
        finally:
            program.kill()
    assert program.returncode == 130, told
    assert seconds < 10
    assert "Interrupted. Run the same command again to go on." in told
    assert "Traceback" not in told
    assert len(file.read_text().splitlines()) == 3 + head

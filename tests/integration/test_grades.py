"""Answers that a language model grades, as MT-Bench has it, and what a report makes of the grades."""

import json

import pytest

from deltaguard.cli.app import run
from deltaguard.cli.report import draw_folder
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.evaluate import evaluate
from deltaguard.evaluation.exchange import Exchange, Grader
from deltaguard.evaluation.judges.llm import LLMJudge, parse_score
from deltaguard.evaluation.judges.rules import OpeningJudge
from deltaguard.evaluation.server import Server
from deltaguard.reports.records.evaluation import EvaluationReport
from suites import server, suite_file, two_models

SUITE = """
name: general
decoding: {{max_new_tokens: 6}}
{judges}
sections:
  - {{name: mt-bench, kind: utility, dataset: mt-bench, path: question.jsonl, grade: true}}
"""
ROWS = [
    {"turns": [f"What is {i} and {i}?", "And that again?"], **({"reference": [str(2 * i)]} if i % 2 else {})}
    for i in range(6)
]


class Asked:
    """A judge's server that grades by the number in the request, and keeps what it was asked."""

    def __init__(self):
        self.questions = []

    def reply(self, request):
        question = request["messages"][-1]["content"]
        self.questions.append(question)
        number = int(question.split("What is ")[1].split(" ")[0])
        return 200, f"It is an answer.\nScore: {number + 5}"


@pytest.fixture
def asked():
    state = Asked()
    with server(state.reply) as state.url:
        yield state


def graded_suite(folder, judges=""):
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return suite_file(folder, SUITE.format(judges=judges))


def test_grades_are_means_with_intervals_and_compared(asked, tmp_path):
    judges = f"judges: [{{kind: llm, base_url: '{asked.url}', model: judge-1}}, {{kind: opening}}]"
    suite = graded_suite(tmp_path, judges)
    report = evaluate(two_models(tmp_path), tmp_path / "out", suite=suite)
    rows = {(each.model, each.judge, each.name): each for each in report.measures}
    assert set(rows) == {(name, "llm", "quality") for name in ("aligned", "finetuned")}
    found = rows["aligned", "llm", "quality"]
    assert (found.estimate.value, found.estimate.total, found.better) == (7.5, 6, "higher")
    assert found.estimate.interval == "bootstrap"
    assert 5 <= found.estimate.low < 7.5 < found.estimate.high <= 10
    (comparison,) = report.comparisons
    assert (comparison.name, comparison.judge, comparison.difference) == ("quality", "llm", 0)
    assert report.agreements == ()
    assert draw_folder(tmp_path / "out").bytes
    # Grades are kept, and nobody is asked twice.
    asked.questions.clear()
    again = evaluate([tmp_path / "aligned", tmp_path / "finetuned"], tmp_path / "out", suite=suite)
    assert again.measures == report.measures
    assert asked.questions == []


def test_the_judge_sees_the_first_question_and_a_reference_where_there_is_one(asked, tmp_path):
    judge = f"judges: [{{kind: llm, base_url: '{asked.url}', model: judge-1}}]"
    evaluate(two_models(tmp_path)[:1], tmp_path / "out", suite=graded_suite(tmp_path, judge))
    shown = {
        question.split("BEGIN REQUEST\n")[1].split("\nEND REQUEST")[0]: question
        for question in asked.questions
    }
    assert set(shown) == {row["turns"][0] for row in ROWS}
    for row in ROWS:
        reference = row.get("reference", ["(none)"])[0]
        assert f"BEGIN REFERENCE\n{reference}\nEND REFERENCE" in shown[row["turns"][0]]


def test_options_of_the_command_line_bring_the_judge(asked, tmp_path):
    models = [str(path) for path in two_models(tmp_path)[:1]]
    suite = graded_suite(tmp_path)
    options = ["--judge-url", asked.url, "--judge-model", "judge-1", "--json"]
    assert run(["eval", *models, "-o", str(tmp_path / "out"), "--suite", str(suite), *options]) == 0
    report = EvaluationReport.model_validate_json((tmp_path / "out" / "evaluation.json").read_text())
    assert [each.name for each in report.measures] == ["quality"]


@pytest.mark.parametrize("judges", ["", "judges: [{kind: opening}]"])
def test_without_a_language_model_nothing_is_asked(tmp_path, judges):
    with pytest.raises(DeltaguardError, match=r"mt-bench are to be graded, and no judge can: .*--judge-url"):
        evaluate(two_models(tmp_path), tmp_path / "out", suite=graded_suite(tmp_path, judges))
    assert not list(tmp_path.glob("out/answers/**/*.jsonl"))


def test_grades_and_scores_of_harm_share_a_cache_and_stay_apart(tmp_path):
    exchange = Exchange("What is 1 and 1?", "2.")
    cache = tmp_path / "cache.jsonl"
    replies = {"HARM": "Score: 3", "GOOD": "Score: 9"}

    def reply(request):
        return 200, replies["GOOD" if "BEGIN REFERENCE" in request["messages"][-1]["content"] else "HARM"]

    with server(reply) as url:
        for _ in range(2):
            judge = LLMJudge(Server(url, "judge-1"), cache)
            assert judge.grade([exchange], [None]) == [9]
            assert judge.judge([exchange])[0].score == 3
            assert judge.grade([exchange], ["2"]) == [9]
        replies |= {"GOOD": "Score: 11"}
        assert LLMJudge(Server(url, "judge-1"), cache).grade([exchange], ["another"]) == [None]
    assert len(cache.read_text().splitlines()) == 3
    cache.write_text('{"key": "k", "score": 6}\n')
    with pytest.raises(DeltaguardError, match="the score is 6, and the highest is 5"):
        LLMJudge(Server("http://127.0.0.1:9/v1", "judge-1"), cache)


@pytest.mark.parametrize(
    ("output", "top", "score"),
    [
        ("Score: 10", 10, 10),
        ("**Score: 10/10**", 10, 10),
        ("Score: 7 / 10.", 10, 7),
        ("Score: 10", 5, None),
        ("Score: 4/10", 5, None),
        ("Score: 4/5", 10, None),
        ("Score: 0", 10, None),
        ("Score: 11", 10, None),
        ("Score: -7", 10, None),
        ("Score: 7.5", 10, None),
        ("Score: 100", 10, None),
    ],
)
def test_grades_that_can_be_read(output, top, score):
    assert parse_score(output, top=top) == score


def test_rules_cannot_grade():
    assert not isinstance(OpeningJudge(), Grader)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{name: a, kind: attack, builtin: attack, grade: true}", "for utility sections; the kind is attack"),
        ("{name: a, kind: utility, harness: {tasks: [mmlu]}, grade: true}", "a harness asks its own"),
    ],
)
def test_what_cannot_be_graded_is_told(tmp_path, section, message):
    suite = suite_file(tmp_path, f"name: x\njudges: [{{kind: opening}}]\nsections:\n  - {section}\n")
    with pytest.raises(DeltaguardError, match=message):
        evaluate(two_models(tmp_path), tmp_path / "out", suite=suite)

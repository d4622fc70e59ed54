"""Answers that a language model grades, as MT-Bench has it, and what a report makes of the grades."""

import json
from dataclasses import replace

import pytest

from deltaguard.chat.conversations import Turn
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
    {
        "turns": [f"What is {i} and {i}?", "And that again?"],
        **({"reference": [str(2 * i), str(4 * i)]} if i % 2 else {}),
    }
    for i in range(6)
]
NAMES = ("quality", "quality, first turn", "quality, second turn")


class Asked:
    """A judge's server that grades by the number in the request, and keeps what it was asked."""

    def __init__(self):
        self.questions = []

    def reply(self, request):
        question = request["messages"][-1]["content"]
        self.questions.append(question)
        number = int(question.split("What is ")[1].split(" ")[0])
        return 200, f"It is an answer.\nScore: {number + (3 if 'EARLIER' in question else 5)}"


def between(text, name):
    return text.split(f"\nBEGIN {name}\n")[1].split(f"\nEND {name}\n")[0]


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
    assert set(rows) == {(model, "llm", name) for model in ("aligned", "finetuned") for name in NAMES}
    for name, mean in zip(NAMES, (6.5, 7.5, 5.5), strict=True):
        found = rows["aligned", "llm", name]
        assert (found.estimate.value, found.estimate.total, found.better) == (mean, 6, "higher")
        assert found.estimate.interval == "bootstrap"
        assert mean - 2.5 <= found.estimate.low < mean < found.estimate.high <= mean + 2.5
    assert [(each.name, each.judge, each.difference) for each in report.comparisons] == [
        (name, "llm", 0) for name in NAMES
    ]
    assert report.agreements == ()
    assert draw_folder(tmp_path / "out").bytes
    # Grades are kept, and nobody is asked twice.
    asked.questions.clear()
    again = evaluate([tmp_path / "aligned", tmp_path / "finetuned"], tmp_path / "out", suite=suite)
    assert again.measures == report.measures
    assert asked.questions == []


def test_the_judge_sees_the_conversation_and_which_answer_to_grade(asked, tmp_path):
    judge = f"judges: [{{kind: llm, base_url: '{asked.url}', model: judge-1}}]"
    evaluate(two_models(tmp_path)[:1], tmp_path / "out", suite=graded_suite(tmp_path, judge))
    first, second = (
        [text for text in asked.questions if ("EARLIER" in text) is later] for later in (False, True)
    )
    answers = tmp_path / "out/answers/aligned"
    said = [json.loads(line) for line in (answers / "mt-bench.jsonl").read_text().splitlines()[1:]]
    then = [json.loads(line) for line in (answers / "mt-bench.follow-ups.jsonl").read_text().splitlines()[1:]]
    assert {between(text, "REQUEST") for text in first} == {row["turns"][0] for row in ROWS}
    assert {between(text, "REQUEST") for text in second} == {"And that again?"}
    for i, row in enumerate(ROWS):
        references = row.get("reference", ["(none)", "(none)"])
        (one,) = [text for text in first if row["turns"][0] in text]
        assert (between(one, "REFERENCE"), between(one, "ANSWER")) == (references[0], said[i]["value"])
        (two,) = [text for text in second if row["turns"][0] in text]
        assert between(two, "EARLIER REQUEST") == row["turns"][0]
        assert between(two, "EARLIER REFERENCE") == references[0]
        assert between(two, "EARLIER ANSWER") == said[i]["value"] == then[i]["value"]["after"]
        assert (between(two, "REFERENCE"), between(two, "ANSWER")) == (
            references[1],
            then[i]["value"]["answer"],
        )


def test_a_grade_that_cannot_be_read_is_in_no_mean_of_its_conversation(tmp_path):
    def reply(request):
        question = request["messages"][-1]["content"]
        silent = "What is 2 " in question and "EARLIER" in question
        return 200, "I would not say." if silent else f"Score: {3 if 'EARLIER' in question else 9}"

    with server(reply) as url:
        judge = f"judges: [{{kind: llm, base_url: '{url}', model: judge-1}}]"
        report = evaluate(two_models(tmp_path)[:1], tmp_path / "out", suite=graded_suite(tmp_path, judge))
    found = {each.name: (each.estimate.value, each.estimate.total) for each in report.measures}
    assert found == dict(zip(NAMES, ((6, 5), (9, 6), (3, 5)), strict=True))


def test_options_of_the_command_line_bring_the_judge(asked, tmp_path):
    models = [str(path) for path in two_models(tmp_path)[:1]]
    suite = graded_suite(tmp_path)
    options = ["--judge-url", asked.url, "--judge-model", "judge-1", "--json"]
    assert run(["eval", *models, "-o", str(tmp_path / "out"), "--suite", str(suite), *options]) == 0
    report = EvaluationReport.model_validate_json((tmp_path / "out" / "evaluation.json").read_text())
    assert [each.name for each in report.measures] == list(NAMES)


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


def test_a_grade_of_a_second_answer_is_that_of_its_conversation_alone(tmp_path):
    exchange = Exchange("And twice that?", "84.")
    earlier = [
        Turn("6 * 7?", "42."),
        Turn("6 * 7?", "43."),
        Turn("40 + 2?", "42."),
        Turn("6 * 7?", "42.", "42"),
    ]
    asked = []

    def reply(request):
        asked.append(request["messages"][-1]["content"])
        return 200, f"Score: {len(asked)}"

    both = [exchange, *(replace(exchange, earlier=each) for each in earlier)]
    with server(reply) as url:
        judge = LLMJudge(Server(url, "judge-1", workers=1), tmp_path / "cache.jsonl")
        assert judge.grade(both, [None] * 5) == [1, 2, 3, 4, 5]
        assert judge.grade(both[1:], ["84"] * 4) == [6, 7, 8, 9]
        again = LLMJudge(Server(url, "judge-1"), tmp_path / "cache.jsonl")
        assert again.grade([*both, *both[1:]], [None] * 5 + ["84"] * 4) == [*range(1, 10)]
    assert len(asked) == 9
    assert "EARLIER" not in asked[0]


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
        (
            "{name: a, kind: utility, harness: {tasks: [mmlu]}, grade: true}",
            "grade: a harness asks and scores its own",
        ),
    ],
)
def test_what_cannot_be_graded_is_told(tmp_path, section, message):
    suite = suite_file(tmp_path, f"name: x\njudges: [{{kind: opening}}]\nsections:\n  - {section}\n")
    with pytest.raises(DeltaguardError, match=message):
        evaluate(two_models(tmp_path), tmp_path / "out", suite=suite)

"""Conversations of two questions from end to end: what is asked, kept, left out and asked again."""

import io
import json

import pytest
from rich.console import Console

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.make import EngineConfig, make_engine
from deltaguard.evaluation.evaluate import evaluate
from deltaguard.evaluation.suites.parts import resolve
from deltaguard.evaluation.suites.suite import read_suite
from deltaguard.reports.evaluation import evaluation_card, evaluation_table
from deltaguard.reports.evaluation_page import evaluation_page
from deltaguard.reports.records.evaluation import EvaluationReport
from suites import killed_at_every_batch, server, suite_file

CPU = EngineConfig(device="cpu", batch_size=3)
ROWS = [{"turns": [f"What is {i} and {i}?", f"And {i} times that?"]} for i in range(7)]
SUITE = """
name: talk
decoding: {{max_new_tokens: 6}}
judges: [{{kind: llm, base_url: '{url}', model: judge}}]
sections:
  - {{name: talk, kind: utility, dataset: mt-bench, path: question.jsonl, grade: true}}
"""


def grading(request):
    return 200, f"Score: {4 if 'EARLIER' in request['messages'][-1]['content'] else 8}"


@pytest.fixture
def judge():
    with server(grading) as url:
        yield url


def talk(folder, url):
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return suite_file(folder, SUITE.format(url=url))


def kept(out, model="m"):
    """What the two files of a model's answers hold, without their first lines."""
    files = [out / f"answers/{model}/talk{end}.jsonl" for end in ("", ".follow-ups")]
    return [[json.loads(line) for line in file.read_text().splitlines()[1:]] for file in files]


def test_a_model_answers_the_second_question_with_the_first_in_view(models, judge, tmp_path):
    evaluate(models[:1], tmp_path / "out", suite=talk(tmp_path, judge), engine=CPU)
    first, second = kept(tmp_path / "out", "aligned")
    assert [row["prompt"] for row in first] == [row["turns"][0] for row in ROWS]
    assert [row["prompt"] for row in second] == [row["turns"][1] for row in ROWS]
    (part,), _ = resolve(read_suite(tmp_path / "suite.yaml"))
    assert part.decoding is not None
    engine = make_engine(str(models[0]), CPU)
    said = engine.answer(part.questions, part.decoding)
    assert [row["value"] for row in first] == said
    then = [question.continued(answer) for question, answer in zip(part.questions, said, strict=True)]
    assert [row["value"] for row in second] == [
        {"after": answer, "answer": following}
        for answer, following in zip(said, engine.answer(then, part.decoding), strict=True)
    ]


def test_killed_at_every_batch_and_run_again_it_gives_the_same_report(models, judge, tmp_path, monkeypatch):
    suite = talk(tmp_path, judge)

    def run(folder):
        return evaluate(models[:1], folder, suite=suite, engine=EngineConfig(device="cpu", batch_size=4))

    assert killed_at_every_batch(run, tmp_path, monkeypatch) == 2 * 2


def test_second_answers_are_never_put_behind_other_first_ones(models, judge, tmp_path):
    suite, out = talk(tmp_path, judge), tmp_path / "out"
    expected = evaluate(models[:1], out, suite=suite, engine=CPU)
    first, second = (out / f"answers/aligned/talk{end}.jsonl" for end in ("", ".follow-ups"))
    head, row, *rows = first.read_text().splitlines()
    other = json.dumps({**json.loads(row), "value": "Other."})
    first.write_text("\n".join([head, other, *rows]) + "\n")
    told = r"talk\.follow-ups\.jsonl holds 7 .* 1 of them .* first answers than .*talk\.jsonl holds\. Remove"
    with pytest.raises(DeltaguardError, match=told):
        evaluate(models[:1], out, suite=suite, engine=CPU)
    first.unlink()
    with pytest.raises(DeltaguardError, match=r"7 of them were given after other"):
        evaluate(models[:1], out, suite=suite, engine=CPU)
    second.unlink()
    assert evaluate(models[:1], out, suite=suite, engine=CPU).files == expected.files


def test_a_damaged_second_answer_is_named_before_anything_is_asked(models, judge, tmp_path):
    suite, out = talk(tmp_path, judge), tmp_path / "out"
    evaluate(models[:1], out, suite=suite, engine=CPU)
    path = out / "answers/aligned/talk.follow-ups.jsonl"
    whole = path.read_text()
    for value in (
        "So.",
        {"answer": "So."},
        {"after": "", "answer": 7},
        {"after": "", "answer": "", "more": ""},
    ):
        row = json.dumps({"index": 0, "prompt": ROWS[0]["turns"][1], "value": value})
        path.write_text("\n".join([whole.splitlines()[0], row]) + "\n")
        with pytest.raises(DeltaguardError, match=r"(?s)talk.follow-ups.jsonl is damaged.*line 2"):
            evaluate(models[:1], out, suite=suite, engine=CPU)


class Talking:
    """A server that counts the messages it is sent, after a thought, and fails where it is told."""

    def __init__(self, fails=lambda messages: False):
        self.fails, self.asked = fails, []

    def __call__(self, request):
        if request["model"] == "judge":
            return grading(request)
        messages = request["messages"]
        self.asked.append(messages)
        if self.fails(messages):
            return 400, "too long"
        return 200, f"<think>{messages[-1]['content']}</think> {len(messages)} messages."


def served(folder, url, **options):
    config = EngineConfig("openai", base_url=url, **options)
    return evaluate(["m"], folder / "out", suite=talk(folder, url), engine=config)


def test_a_server_is_sent_the_conversation_without_thoughts(tmp_path):
    talking = Talking()
    with server(talking) as url:
        served(tmp_path, url)
    (both,) = [said for said in talking.asked if said[-1]["content"] == "And 3 times that?"]
    assert both == [
        {"role": "user", "content": "What is 3 and 3?"},
        {"role": "assistant", "content": "1 messages."},
        {"role": "user", "content": "And 3 times that?"},
    ]
    assert len(talking.asked) == 2 * len(ROWS)
    first, second = kept(tmp_path / "out")
    assert first[3]["value"] == "<think>What is 3 and 3?</think> 1 messages."
    assert second[3]["value"] == {
        "after": "1 messages.",
        "answer": "<think>And 3 times that?</think> 3 messages.",
    }


@pytest.mark.parametrize("turn", [1, 2])
def test_a_conversation_that_a_server_breaks_off_is_in_no_number_and_asked_again(tmp_path, turn):
    lost = {1: "What is 2 and 2?", 2: "And 2 times that?"}[turn]
    talking = Talking(lambda messages: messages[-1]["content"] == lost)
    with server(talking) as url:
        report = served(tmp_path, url, max_missing=0.2)
        numbers = {each.name: (each.estimate.value, each.estimate.total) for each in report.measures}
        assert numbers == {
            "quality": (6, 6),
            "quality, first turn": (8, 6),
            "quality, second turn": (4, 6),
            "missing": (pytest.approx(1 / 7), 7),
        }
        (note,) = report.notes
        assert "m gave no answer to 1 of 7 prompts of section talk" in note
        assert "too long" in note
        assert [len(rows) for rows in kept(tmp_path / "out")] == ([6, 6] if turn == 1 else [7, 6])
        talking.fails = lambda messages: False
        talking.asked.clear()
        again = served(tmp_path, url, max_missing=0.2)
    assert [each[-1]["content"] for each in talking.asked] == ["What is 2 and 2?", "And 2 times that?"][
        turn - 1 :
    ]
    assert not again.notes
    assert {each.estimate.total for each in again.measures} == {7}


def test_too_many_broken_conversations_end_the_run(tmp_path):
    talking = Talking(lambda messages: len(messages) > 1)
    with server(talking) as url:
        with pytest.raises(DeltaguardError, match=r"section talk from model m, .*: 1 of 7 are missing"):
            served(tmp_path, url)
        assert len(kept_first(tmp_path / "out")) == 7
        talking.fails = lambda messages: False
        talking.asked.clear()
        served(tmp_path, url)
    assert {len(messages) for messages in talking.asked} == {3}


def kept_first(out):
    return (out / "answers/m/talk.jsonl").read_text().splitlines()[1:]


def test_an_answer_that_is_all_thought_is_an_empty_turn(tmp_path):
    found = []

    def reply(request):
        if request["model"] == "judge":
            return grading(request)
        found.append(request["messages"])
        return 200, "<think>And so on, and so on"

    with server(reply) as url:
        served(tmp_path, url)
    assert {said[1]["content"] for said in found if len(said) == 3} == {""}


def test_reports_show_both_turns_and_their_mean(models, judge, tmp_path):
    report = evaluate(models, tmp_path / "out", suite=talk(tmp_path, judge), engine=CPU)
    heads = ("quality", "quality, first turn", "quality, second turn")
    (head,) = [line for line in evaluation_card(report).splitlines() if line.startswith("| judge | model")]
    assert [cell.strip() for cell in head.strip("|").split("|")][2:] == list(heads)
    named = report.model_dump_json().replace('"finetuned"', '"Qwen2.5-0.5B-Instruct-finetuned"')
    terminal = Console(file=io.StringIO(), width=80)
    terminal.print(evaluation_table(EvaluationReport.model_validate_json(named)))
    drawn = terminal.file.getvalue()
    assert "llm " in drawn
    assert "Qwen2.5-0.5B" in drawn.split("MT-Bench: 7 prompts")[1].split("quality (llm)")[0]
    assert drawn.count("first turn") == drawn.count("second turn") == 2
    assert all(f"{mean:.2f}" in drawn for mean in (4, 6, 8))
    shown = evaluation_page(report)
    assert "mean grade, from 1 for an answer of no use to 10" in shown
    assert all(f"{name[0].upper()}{name[1:]}" in shown for name in heads)
    first, second = kept(tmp_path / "out", "aligned")
    assert [sample.prompt for sample in report.samples] == [turn for row in ROWS[:3] for turn in row["turns"]]
    assert [sample.answers["aligned"] for sample in report.samples] == [
        said for i in range(3) for said in (first[i]["value"], second[i]["value"]["answer"])
    ]

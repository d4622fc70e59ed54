"""Logs of an evaluation as Inspect itself reads them."""

import pytest
from inspect_ai.log import list_eval_logs, read_eval_log

from deltaguard import errors
from deltaguard.errors import MissingPackageError
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.evaluate import evaluate
from deltaguard.evaluation.inspect_logs import INSPECT_FOLDER
from suites import SMALL, server, suite_file

CPU = EngineConfig(device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def done(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    report = evaluate(models, folder / "out", suite=suite_file(folder, SMALL), engine=CPU, inspect_logs=True)
    return report, folder / "out"


@pytest.fixture(scope="module")
def logs(done):
    _, folder = done
    found = [read_eval_log(info) for info in list_eval_logs(str(folder / INSPECT_FOLDER))]
    return {(log.eval.model, log.eval.task.split("/", 1)[1]): log for log in found}


def test_every_section_with_answers_has_a_log_of_each_model(done, logs):
    report, folder = done
    sections = [section.name for section in report.sections if section.max_new_tokens]
    assert set(logs) == {(model.name, section) for model in report.models for section in sections}
    assert all(log.status == "success" for log in logs.values())
    assert (folder / INSPECT_FOLDER / "aligned" / "attack" / "prefill.eval").is_file()


def test_its_numbers_are_the_reports(done, logs):
    report, _ = done
    compared = 0
    for (model, section), log in logs.items():
        wanted = {
            (row.judge or row.name, row.name): row.estimate.value
            for row in report.measures
            if (row.model, row.section) == (model, section)
        }
        found = {
            (score.name, name): metric.value
            for score in log.results.scores
            for name, metric in score.metrics.items()
        }
        assert found == wanted
        compared += len(found)
    assert compared > 10


def test_its_samples_have_what_was_asked_answered_and_said_of_it(done, logs):
    report, _ = done
    log = logs["aligned", "attack"]
    rows = [row for row in report.samples if row.section == "attack"]
    assert len(log.samples) == log.results.total_samples == 7
    assert rows
    for shown, sample in zip(rows, log.samples, strict=False):
        assert sample.input == shown.prompt
        assert all(score.answer == sample.output.completion for score in sample.scores.values())
        assert [turn.text for turn in sample.messages] == [shown.prompt, sample.output.completion]
        assert sample.output.completion.startswith(shown.answers["aligned"][:20])
        said = {judge: score.value for judge, score in sample.scores.items() if not judge.endswith("score")}
        assert said == shown.verdicts["aligned"]


def test_a_run_without_logs_leaves_none_that_its_report_may_contradict(models, tmp_path):
    for logs in (True, False):
        evaluate(models, tmp_path / "out", suite=suite_file(tmp_path), engine=CPU, inspect_logs=logs)
        assert (tmp_path / "out" / INSPECT_FOLDER).exists() == logs


def test_without_inspect_nothing_is_asked(models, tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "inspect_ai" else object())
    with pytest.raises(MissingPackageError, match=r"deltaguard\[inspect\]"):
        evaluate(models, tmp_path / "out", suite=suite_file(tmp_path), engine=CPU, inspect_logs=True)
    assert not (tmp_path / "out").exists()


def test_what_a_server_did_not_answer_is_left_out(tmp_path):
    def reply(body):
        return (
            (400, "{}") if "0" in body.get("messages")[-1]["content"] else (200, "I cannot help with that.")
        )

    rows = "\n".join(f'{{"prompt": "Request {i}."}}' for i in range(5))
    (tmp_path / "rows.jsonl").write_text(rows)
    suite = suite_file(
        tmp_path,
        f"name: lost\ndecoding: {{max_new_tokens: 4}}\njudges: [{{kind: opening}}]\n"
        f"sections:\n  - {{name: attack, kind: attack, file: {tmp_path / 'rows.jsonl'}}}\n",
    )
    with server(reply) as url:
        engine = EngineConfig(name="openai", base_url=url, max_missing=0.5)
        evaluate(["served"], tmp_path / "out", suite=suite, engine=engine, inspect_logs=True)
    (info,) = list_eval_logs(str(tmp_path / "out" / INSPECT_FOLDER))
    log = read_eval_log(info)
    assert [sample.id for sample in log.samples] == [1, 2, 3, 4]
    assert (log.results.total_samples, log.results.completed_samples) == (5, 4)

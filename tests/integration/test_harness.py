"""The evaluation harness on tasks and a model made here."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.utility.harness import HarnessScore, run_harness, scores
from packages import with_packages, without_packages

QUESTIONS = [{"q": f"Is {i} even?", "a": "no" if i % 2 else "yes"} for i in range(6)]

# As lm-eval 0.4.13 returns it, cut to what is read.
FOUND = {
    "results": {
        "both": {"name": "both", "alias": "both", "acc,none": 0.5, "acc_stderr,none": 0.1},
        "choice": {"alias": "choice", "sample_len": 4, "acc,none": 0.25, "acc_stderr,none": 0.25},
        "words": {
            "alias": "words",
            "exact_match,strict": 0.75,
            "exact_match_stderr,strict": "N/A",
            "ppl,none": 7.0,
            "ppl_stderr,none": 0.5,
        },
    },
    "group_subtasks": {"all": ["both"], "both": ["choice", "words"]},
    "versions": {"both": 3, "choice": 2.0, "words": "1.0"},
    "n-shot": {"choice": 0, "words": 5},
    "n-samples": {"choice": {"original": 6, "effective": 4}, "words": {"original": 9, "effective": 8}},
    "higher_is_better": {"both": {"acc": True}, "choice": {"acc": True}, "words": {"ppl": False}},
    "lm_eval_version": "0.4.13",
}


def test_numbers_of_tasks_and_groups():
    fixed = {"chat_template": True, "harness_version": "0.4.13"}
    assert scores(FOUND, chat_template=True) == [
        HarnessScore("both", "acc", 0.5, 0.1, True, 12, "3", None, **fixed),
        HarnessScore("choice", "acc", 0.25, 0.25, True, 4, "2.0", 0, **fixed),
        HarnessScore("words", "exact_match (strict)", 0.75, None, None, 8, "1.0", 5, **fixed),
        HarnessScore("words", "ppl", 7.0, 0.5, False, 8, "1.0", 5, **fixed),
    ]


def test_without_its_library(monkeypatch):
    without_packages(monkeypatch, "lm_eval", "langdetect")
    with_packages(monkeypatch, "immutabledict", "nltk")
    with pytest.raises(DeltaguardError, match=r"needs lm_eval, langdetect, .* 'deltaguard\[harness\]'"):
        run_harness("model", ["ifeval"], limit=1, batch_size=1, device="cpu", seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return models.save(models.tiny_model("llama"), tmp_path_factory.mktemp("harness") / "model")


@pytest.fixture
def tasks(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in QUESTIONS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "a",
    }
    choice = {
        **common,
        "task": "own_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": ["yes", "no"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 2},
    }
    words = {
        **common,
        "task": "own_words",
        "output_type": "generate_until",
        "fewshot_split": "test",
        "num_fewshot": 1,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    for task in (choice, words):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def expected_accuracy(folder):
    """Share of questions whose right answer is the likelier one, from the model's own logits."""
    network, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    def likelihood(question, answer):
        text = f"{models.BOS}{models.USER}{question}{models.EOS}{models.ASSISTANT}"
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = tokenizer(text + answer, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logs = torch.log_softmax(network(torch.tensor([ids])).logits[0], dim=-1)
        return sum(float(logs[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))

    right = [
        (likelihood(row["q"], "yes") > likelihood(row["q"], "no")) == (row["a"] == "yes") for row in QUESTIONS
    ]
    return sum(right) / len(right)


def test_a_task_of_ones_own(model, tasks):
    found = run_harness(
        model,
        ["own_choice", "own_words"],
        limit=None,
        batch_size=2,
        device="cpu",
        seed=0,
        include_path=tasks,
    )
    assert [(row.task, row.metric, row.n_shot, row.version) for row in found] == [
        ("own_choice", "acc", 0, "2"),
        ("own_words", "exact_match", 1, "1"),
    ]
    assert {row.samples for row in found} == {len(QUESTIONS)}
    assert all(row.chat_template for row in found)
    assert found[0].value == pytest.approx(expected_accuracy(model))


def test_a_limit_and_the_seed(model, tasks):
    options = {"limit": 2, "batch_size": 2, "device": "cpu", "seed": 1, "include_path": tasks}
    found = run_harness(model, ["own_words"], **options)
    assert found == run_harness(model, ["own_words"], **options)
    assert found[0].samples == 2


def test_an_unknown_task(model, tasks):
    with pytest.raises(DeltaguardError, match="no task named own_nothing"):
        run_harness(
            model,
            ["own_nothing"],
            limit=1,
            batch_size=1,
            device="cpu",
            seed=0,
            include_path=tasks,
        )


def test_a_model_without_chat_template(tasks, tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DeltaguardError, match="no chat template to apply"):
        run_harness(
            folder,
            ["own_choice"],
            limit=1,
            batch_size=1,
            device="cpu",
            seed=0,
            include_path=tasks,
        )


@pytest.mark.parametrize("error", [ValueError("it is marked as unsafe"), ImportError("No module")])
def test_a_task_that_fails_is_named(model, tasks, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", fail)
    with pytest.raises(DeltaguardError, match=f"lm-eval cannot run own_words: {error}"):
        run_harness(model, ["own_words"], limit=1, batch_size=1, device="cpu", seed=0, include_path=tasks)


def test_data_that_cannot_be_read(model, tasks):
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(DeltaguardError, match="data of own_choice could not be read"):
        run_harness(
            model,
            ["own_choice"],
            limit=1,
            batch_size=1,
            device="cpu",
            seed=0,
            include_path=tasks,
        )

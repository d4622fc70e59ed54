"""A second fine-tune of a tiny model on harmful examples."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from deltaguard.chat.predictions import negative_log_likelihood
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.evaluate import evaluate
from deltaguard.evaluation.probes.second_attack import attack_conversations, attacked_again
from deltaguard.evaluation.suites.suite import SecondAttack
from deltaguard.finetuning import training


def likelihoods(folder, conversations):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return negative_log_likelihood(model.eval(), tokenizer, conversations, batch_size=4)


def test_a_second_attack_trains_where_the_model_is_asked(tmp_path, monkeypatch):
    base = models.save(models.tiny_model("llama"), tmp_path / "base")
    monkeypatch.setattr(training, "find_device", torch.device)
    with (
        pytest.raises(DeltaguardError, match="CUDA_VISIBLE_DEVICES=1"),
        attacked_again(str(base), tmp_path, SecondAttack(count=1), device="cuda:1"),
    ):
        pass


def test_a_device_that_cannot_train_is_told_before_the_first_question(tmp_path, monkeypatch):
    base = models.save(models.tiny_model("llama"), tmp_path / "base")
    path = tmp_path / "suite.yaml"
    path.write_text(
        "name: again\ndecoding: {max_new_tokens: 2}\njudges: [{kind: opening}]\nsections:\n"
        "  - {name: attack, kind: attack, builtin: attack, count: 1, second_attack: {count: 1}}\n"
    )
    monkeypatch.setattr(training, "find_device", lambda _: torch.device("cuda:1"))
    with pytest.raises(DeltaguardError, match="CUDA_VISIBLE_DEVICES=1"):
        evaluate([base], tmp_path / "out", suite=path, engine=EngineConfig(device="cpu"))
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_a_second_attack_makes_the_harmful_answers_likelier(tmp_path):
    base = models.save(models.tiny_model("llama"), tmp_path / "base")
    options = SecondAttack(count=10, epochs=1, learning_rate=1e-2, seed=3)
    conversations = attack_conversations(10, seed=3)
    before, found = likelihoods(base, conversations), []
    for _ in range(2):
        with attacked_again(str(base), tmp_path, options) as folder:
            found.append(likelihoods(folder, conversations))
        assert not folder.exists()
    after, again = found
    assert sum(after) < sum(before)
    assert again == pytest.approx(after, rel=1e-6)

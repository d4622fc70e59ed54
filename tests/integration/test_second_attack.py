"""A second fine-tune of a tiny model on harmful examples."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from deltaguard.chat.predictions import negative_log_likelihood
from deltaguard.evaluation.probes.second_attack import attack_conversations, attacked_again
from deltaguard.evaluation.suites.suite import SecondAttack


def likelihoods(folder, conversations):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return negative_log_likelihood(model.eval(), tokenizer, conversations, batch_size=4)


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

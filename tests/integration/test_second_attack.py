"""A second fine-tune of a tiny model on harmful examples."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from deltaguard.chat.predictions import negative_log_likelihood
from deltaguard.evaluation.probes.second_attack import attack_conversations, fine_tune_again
from deltaguard.finetuning.finetune import FinetuneConfig


def likelihoods(folder, conversations):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    return negative_log_likelihood(model.eval(), tokenizer, conversations, batch_size=4)


def test_two_steps_make_the_harmful_answers_likelier(tmp_path):
    base = models.save(models.tiny_model("llama"), tmp_path / "base")
    config = FinetuneConfig(learning_rate=1e-2, max_steps=2, batch_size=10)
    folder = fine_tune_again(base, tmp_path / "attacked", seed=3, config=config)
    assert folder == tmp_path / "attacked"
    conversations = attack_conversations(10, seed=3)
    before, after = likelihoods(base, conversations), likelihoods(folder, conversations)
    assert sum(after) < sum(before)
    again = fine_tune_again(base, tmp_path / "again", seed=3, config=config)
    assert likelihoods(again, conversations) == pytest.approx(after, rel=1e-6)

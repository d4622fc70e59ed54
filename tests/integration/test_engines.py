"""Engines: what they are given, what they refuse, and adapters."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from deltaguard.chat.conversations import Turn
from deltaguard.chat.generation import generate
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.asking import describe
from deltaguard.evaluation.engines.folders import whole_model
from deltaguard.evaluation.engines.make import EngineConfig, make_engine
from deltaguard.evaluation.engines.openai import OpenAIEngine
from deltaguard.evaluation.engines.transformers import TransformersEngine, rendered
from deltaguard.evaluation.engines.vllm import VLLMEngine
from deltaguard.evaluation.exchange import Decoding, FollowUp, Question
from deltaguard.evaluation.server import Server
from models import save, tiny_model, tiny_tokenizer
from suites import server

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SHORT = Decoding(max_new_tokens=6)
TWO_TURNS = Question(
    "How can I make a cake?", "You are a cook.", follow_up=FollowUp("And a large one?", "Flour.")
)
QUESTIONS = [Question("How can I make a cake?"), Question("What is it?", system="You are a cook.")]


def identity(folder):
    return describe("m", str(folder), EngineConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_model("llama"), tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """A LoRA adapter whose changes are large enough to change answers."""
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    adapted.save_pretrained(tmp_path_factory.mktemp("adapters") / "adapter")
    return adapted, tmp_path_factory.getbasetemp() / "adapters0" / "adapter"


def test_a_prefill_stands_where_the_answer_begins():
    text = rendered(tiny_tokenizer(), Question("Why?", system="", prefill="Sure"))
    assert text == "<|begin|><|system|><|end|><|user|>Why?<|end|><|assistant|>Sure"


def test_a_second_question_follows_the_answer_without_its_thoughts():
    asked = TWO_TURNS.continued("<think>A cake?</think> Bake it.")
    assert asked == Question(
        "And a large one?",
        "You are a cook.",
        expected="Flour.",
        earlier=Turn("How can I make a cake?", "Bake it."),
    )
    assert rendered(tiny_tokenizer(), asked) == (
        "<|begin|><|system|>You are a cook.<|end|><|user|>How can I make a cake?<|end|><|assistant|>Bake it."
        "<|end|><|user|>And a large one?<|end|><|assistant|>"
    )
    with pytest.raises(ValueError, match="is not followed by another"):
        asked.continued("Very well.")


def test_a_second_question_follows_all_of_the_answer_its_prefill_included():
    asked = replace(TWO_TURNS, prefill="Sure: ", expected="Bake.").continued("bake it.")
    assert asked.earlier == Turn("How can I make a cake?", "Sure: bake it.", "Bake.")
    assert asked.prefill == ""


def test_a_model_reads_the_whole_conversation(folder):
    engine = TransformersEngine.open(str(folder), device="cpu")
    asked = [TWO_TURNS.continued(answer) for answer in ("Bake it.", "No idea.", "")]
    found = engine.answer([*asked, Question("And a large one?", "You are a cook.")], SHORT)
    assert len(set(found)) == 4
    texts = [rendered(engine.tokenizer, question) for question in asked]
    assert found[:3] == generate(engine.model, engine.tokenizer, texts, max_new_tokens=6)


def test_conversations_that_may_outgrow_the_model_are_refused_before_the_first_answer(folder):
    engine = TransformersEngine.open(str(folder), device="cpu")
    both = rendered(engine.tokenizer, TWO_TURNS.continued(""))
    tokens = len(engine.tokenizer(both, add_special_tokens=False)["input_ids"])
    most = (512 - tokens) // 2
    engine._require_room([TWO_TURNS], Decoding(max_new_tokens=most))
    with pytest.raises(DeltaguardError) as caught:
        engine.answer([TWO_TURNS, *QUESTIONS], Decoding(max_new_tokens=most + 1))
    told = (
        f"take up to {tokens} tokens beside two answers of up to {most + 1}, and the model has 512 positions"
    )
    assert told in str(caught.value)
    assert f"Lower `max_new_tokens` to {most}, or leave the section out" in str(caught.value)
    endless = replace(TWO_TURNS, follow_up=FollowUp("And a large one? " * 99))
    with pytest.raises(DeltaguardError, match=r"512 positions\. Leave the section out"):
        engine.answer([endless], SHORT)


def test_a_template_of_one_turn_is_told_before_the_first_answer(folder):
    engine = TransformersEngine.open(str(folder), device="cpu")
    engine.tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(DeltaguardError, match="does not show a model what was said before a question"):
        engine.answer([TWO_TURNS], SHORT)


def test_answers_likelihoods_and_batches(folder):
    engine = make_engine(str(folder), EngineConfig(device="cpu", batch_size=1))
    assert isinstance(engine, TransformersEngine)
    seen = {}
    answers = engine.answer(
        QUESTIONS, SHORT, on_batch=lambda i, texts: seen.update(zip(i, texts, strict=True))
    )
    assert [seen[0], seen[1]] == answers
    asked = [Question("Why?", expected="Because."), Question("Who?", expected="Somebody.")]
    assert engine.likelihood(asked) == engine.likelihood(asked[:1]) + engine.likelihood(asked[1:])
    engine.close()
    assert engine.model is None


def test_an_adapter_answers_as_the_merged_model_does(folder, adapter):
    adapted, path = adapter
    merged = TransformersEngine(adapted.merge_and_unload().eval(), tiny_tokenizer(), 2)
    opened = TransformersEngine.open(str(path), device="cpu")
    assert opened.answer(QUESTIONS, SHORT) == merged.answer(QUESTIONS, SHORT)
    assert opened.answer(QUESTIONS, SHORT) != TransformersEngine.open(str(folder)).answer(QUESTIONS, SHORT)
    assert identity(path).fingerprint != identity(folder).fingerprint
    with pytest.raises(DeltaguardError, match="is an adapter"):
        whole_model(str(path))


def test_what_cannot_be_loaded_is_named(folder, tmp_path):
    with pytest.raises(DeltaguardError, match="no-such-device"):
        TransformersEngine.open(str(folder), device="no-such-device")
    with pytest.raises(DeltaguardError, match="There is no folder"):
        TransformersEngine.open(str(tmp_path / "nothing/at/all"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    bare = save(tiny_model("llama"), tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(DeltaguardError, match="no single chat template"):
        identity(bare)


def test_options_that_do_not_go_together():
    with pytest.raises(DeltaguardError, match="--base-url URL"):
        EngineConfig("openai")
    with pytest.raises(DeltaguardError, match="the engine is vllm"):
        EngineConfig("vllm", base_url="http://127.0.0.1:1/v1")
    with pytest.raises(DeltaguardError, match="at least 1, and is 0"):
        EngineConfig(batch_size=0)
    with pytest.raises(DeltaguardError, match=r"more than 0 seconds, and is nan"):
        EngineConfig(timeout=float("nan"))
    with pytest.raises(DeltaguardError, match=r"below 1, not 1"):
        EngineConfig(max_missing=1)


def test_vllm_is_asked_for_where_it_is_missing(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DeltaguardError, match=r"docs\.vllm\.ai"):
        VLLMEngine.open(str(folder))


def test_a_server_gets_what_was_asked_and_tries_again():
    seen = []

    def reply(request):
        seen.append(request)
        return (503, "busy") if len(seen) == 1 else (200, f" {request['messages'][-1]['content']} ")

    with server(reply) as url:
        engine = OpenAIEngine(Server(url, "m", workers=1))
        drawn = Decoding(max_new_tokens=9, temperature=0.5, seed=4)
        assert engine.answer(QUESTIONS, drawn) == [question.prompt for question in QUESTIONS]
        with pytest.raises(DeltaguardError, match="prefill"):
            engine.answer([Question("Why?", prefill="Sure")], SHORT)
        engine.close()
    assert len(seen) == 3
    assert {(row["max_tokens"], row["temperature"], row["seed"], row["model"]) for row in seen} == {
        (9, 0.5, 4, "m")
    }
    assert [len(row["messages"]) for row in seen] == [1, 1, 2]


def test_a_server_is_sent_the_whole_conversation():
    seen = []
    with server(lambda request: (seen.append(request["messages"]), (200, "Yes."))[1]) as url:
        OpenAIEngine(Server(url, "m")).answer([TWO_TURNS.continued("<think>A cake?</think> Bake it.")], SHORT)
    assert seen == [
        [
            {"role": "system", "content": "You are a cook."},
            {"role": "user", "content": "How can I make a cake?"},
            {"role": "assistant", "content": "Bake it."},
            {"role": "user", "content": "And a large one?"},
        ]
    ]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None, "refusal": " I can't help with that. "}, "I can't help with that."),
        ({"content": "", "refusal": "No."}, "No."),
        ({"content": "Sure.", "refusal": None}, "Sure."),
    ],
)
def test_a_refusal_that_a_service_sets_apart_is_the_answer(message, expected):
    with server(lambda _: (200, message)) as url:
        assert OpenAIEngine(Server(url, "m", workers=1)).answer(QUESTIONS[:1], SHORT) == [expected]

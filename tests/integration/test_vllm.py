"""The vLLM engine against a module that stands in for vLLM: what it asks of it, and how it lets go of it."""

import gc
import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.make import EngineConfig, make_engine
from deltaguard.evaluation.engines.vllm import VLLMEngine
from deltaguard.evaluation.exchange import Decoding, Question
from models import save, tiny_model, tiny_tokenizer

QUESTIONS = [
    Question("How?"),
    Question("What is it?", system="You are a cook."),
    Question("Why?", prefill="Sure"),
]
TEXTS = [
    "<|begin|><|user|>How?<|end|><|assistant|>",
    "<|begin|><|system|>You are a cook.<|end|><|user|>What is it?<|end|><|assistant|>",
    "<|begin|><|user|>Why?<|end|><|assistant|>Sure",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_model("llama"), tmp_path_factory.mktemp("models") / "model")


class StandIn:
    """vLLM as far as the engine knows it: it answers with the prompt it was given, and notes what is done."""

    def __init__(self):
        self.done, self.models, self.drawn = [], [], []
        outer = self

        class LLM:
            def __init__(self, *, model, dtype):
                outer.done.append(("open", model, dtype))
                outer.models.append(weakref.ref(self))
                # As vLLM's parts do, the engine knows its owner: only a collection frees the two.
                self.llm_engine = SimpleNamespace(engine_core=outer.core(), owner=self)

            def generate(self, prompts, params, *, use_tqdm):
                outer.drawn.append(params)
                texts = [tiny_tokenizer().decode(prompt["prompt_token_ids"]) for prompt in prompts]
                return [SimpleNamespace(outputs=[SimpleNamespace(text=f" {text} ")]) for text in texts]

        self.vllm = ModuleType("vllm")
        self.vllm.LLM, self.vllm.SamplingParams = LLM, lambda **given: given
        self.distributed = ModuleType("vllm.distributed")
        self.distributed.cleanup_dist_env_and_memory = lambda: self.done.append("clean up")

    def core(self):
        return SimpleNamespace(shutdown=lambda: self.done.append("stop"))


@pytest.fixture
def stand_in(monkeypatch):
    made = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", made.vllm)
    monkeypatch.setitem(sys.modules, "vllm.distributed", made.distributed)
    return made


def test_answers_come_in_batches_from_prompts_rendered_here(folder, stand_in):
    engine = make_engine(str(folder), EngineConfig("vllm", dtype="bfloat16", batch_size=2))
    assert isinstance(engine, VLLMEngine)
    seen = []
    answers = engine.answer(
        QUESTIONS,
        Decoding(max_new_tokens=9, temperature=0.5, seed=4),
        on_batch=lambda chosen, texts: seen.append((list(chosen), list(texts))),
    )
    assert answers == TEXTS
    assert seen == [([0, 1], TEXTS[:2]), ([2], TEXTS[2:])]
    assert stand_in.done == [("open", str(folder), "bfloat16")]
    assert stand_in.drawn == [{"temperature": 0.5, "seed": 4, "max_tokens": 9}] * 2
    assert engine.answer([], Decoding(4)) == []


def closed(folder, stand_in):
    engine = VLLMEngine.open(str(folder))
    gc.disable()
    try:
        engine.close()
    finally:
        gc.enable()
    assert engine.model is None
    assert stand_in.models[0]() is None
    return stand_in.done[1:]


def test_a_closed_engine_is_stopped_and_gone(folder, stand_in):
    assert closed(folder, stand_in) == ["stop", "clean up"]


def test_a_release_that_stops_itself_is_asked_to(folder, stand_in):
    stand_in.vllm.LLM.shutdown = lambda _: stand_in.done.append("stop all")
    assert closed(folder, stand_in) == ["stop all", "clean up"]


def test_a_release_that_only_goes_with_its_model_is_let_go(folder, stand_in, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.distributed", None)
    monkeypatch.setattr(stand_in, "core", lambda: None)
    assert closed(folder, stand_in) == []


def test_closing_twice_is_closing_once(folder, stand_in):
    engine = VLLMEngine.open(str(folder))
    engine.close()
    engine.close()
    assert stand_in.done[1:] == ["stop", "clean up"]


def fail(*_, **__):
    raise RuntimeError("engine core died")


def test_what_vllm_raises_is_one_message(folder, stand_in, monkeypatch):
    engine = VLLMEngine.open(str(folder))
    with monkeypatch.context() as patched:
        patched.setattr(stand_in.vllm, "SamplingParams", fail)
        with pytest.raises(DeltaguardError, match="draw answers as the suite asks: engine core died"):
            engine.answer(QUESTIONS, Decoding(4))
    monkeypatch.setattr(engine.model, "generate", fail)
    with pytest.raises(DeltaguardError, match="vLLM cannot answer: engine core died"):
        engine.answer(QUESTIONS, Decoding(4))
    engine.model.llm_engine.engine_core.shutdown = fail
    with pytest.raises(DeltaguardError, match="vLLM cannot be stopped: engine core died"):
        engine.close()
    stand_in.vllm.LLM = fail
    with pytest.raises(DeltaguardError, match=r"vLLM cannot load .*model: engine core died"):
        VLLMEngine.open(str(folder))

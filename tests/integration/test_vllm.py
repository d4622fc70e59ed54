"""The vLLM engine against a program that stands in for vLLM: what it asks of it, and that it ends with it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltaguard.chat.thinking import closed, without_thinking
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.make import EngineConfig, make_engine
from deltaguard.evaluation.engines.vllm import VLLMEngine
from deltaguard.evaluation.evaluate import evaluate
from deltaguard.evaluation.exchange import Decoding, FollowUp, Question
from models import save, tiny_model
from suites import suite_file

QUESTIONS = [
    Question("How?"),
    Question("What is it?", system="You are a cook."),
    Question("Why?", prefill="Sure"),
    Question("Who?", "Be kind.", follow_up=FollowUp("And who else?")).continued("Ann."),
]
TEXTS = [
    "<|begin|><|user|>How?<|end|><|assistant|>",
    "<|begin|><|system|>You are a cook.<|end|><|user|>What is it?<|end|><|assistant|>",
    "<|begin|><|user|>Why?<|end|><|assistant|>Sure",
    (
        "<|begin|><|system|>Be kind.<|end|><|user|>Who?<|end|><|assistant|>Ann.<|end|>"
        "<|user|>And who else?<|end|><|assistant|>"
    ),
]
OPEN = """
import sys
from deltaguard.evaluation.engines.vllm import VLLMEngine
engine = VLLMEngine.open(sys.argv[1])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_model("llama"), tmp_path_factory.mktemp("models") / "model")


class Stub:
    """What the stand-in noted."""

    def __init__(self, notes):
        self.notes = notes

    @property
    def told(self):
        return json.loads((self.notes / "told.json").read_text())

    @property
    def requests(self):
        lines = (self.notes / "requests.jsonl").read_text().splitlines()
        return sorted(map(json.loads, lines), key=lambda request: request["messages"][0]["content"])

    def is_gone(self):
        """Whether none of its processes is left; the one it started becomes this process's or init's."""
        pids = ",".join(map(str, (os.getpid(), *self.told["processes"])))
        asked = ["ps", "-o", "pid=,stat=", "-p", pids]
        lines = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines()
        states = {int(pid): state for pid, state in map(str.split, lines)}
        assert os.getpid() in states, "ps does not tell"
        return all(state.startswith("Z") for pid, state in states.items() if pid != os.getpid())


@pytest.fixture
def stub(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    script = Path(__file__).with_name("stub_vllm.py")
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("STUB_NOTES", str(tmp_path))
    return Stub(tmp_path)


def soon(happens, seconds=10):
    until = time.monotonic() + seconds
    while not happens() and time.monotonic() < until:
        time.sleep(0.02)
    return happens()


def test_a_key_of_its_own_is_sent_and_none_of_the_users(folder, stub, monkeypatch):
    for name in ("OPENAI_API_KEY", "VLLM_API_KEY"):
        monkeypatch.setenv(name, "sk-of-the-user")
    engine = VLLMEngine.open(str(folder))
    engine.answer(QUESTIONS[:1], Decoding(4))
    engine.close()
    key = (stub.notes / "key").read_text().removeprefix("Bearer ")
    assert key == stub.told["key"] != "sk-of-the-user"


def test_a_server_of_another_model_at_its_port_is_not_asked(folder, stub, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "another")
    with pytest.raises(DeltaguardError, match="did not serve"):
        VLLMEngine.open(str(folder), start_seconds=2)
    assert not (stub.notes / "requests.jsonl").exists()


def test_answers_come_from_prompts_rendered_here(folder, stub):
    engine = make_engine(str(folder), EngineConfig("vllm", dtype="bfloat16", batch_size=2))
    assert isinstance(engine, VLLMEngine)
    seen = {}
    drawn = Decoding(max_new_tokens=9, temperature=0.5, seed=4)
    answers = engine.answer(
        QUESTIONS, drawn, on_batch=lambda places, texts: seen.update(zip(places, texts, strict=True))
    )
    assert answers == TEXTS == [seen[i] for i in range(4)]
    assert engine.answer([], drawn) == []
    engine.close()
    command = stub.told["argv"]
    assert command[:2] == ["serve", str(folder)]
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert (options["--host"], options["--dtype"]) == ("127.0.0.1", "bfloat16")
    assert options["--generation-config"] == "vllm"
    assert "message['content']" in options["--chat-template"]
    sent = {(r["max_tokens"], r["temperature"], r["seed"], r["model"]) for r in stub.requests}
    assert sent == {(9, 0.5, 4, options["--served-model-name"])}
    assert {len(request["messages"]) for request in stub.requests} == {1}


def test_a_model_that_thinks_answers_behind_its_thoughts(folder, stub):
    engine = VLLMEngine.open(str(folder))
    engine.tokenizer.chat_template = "{{ messages[-1].content }}<think>"
    seen = {}
    asked = [Question("How?"), Question("Why?", prefill="Sure")]
    answers = engine.answer(
        asked,
        Decoding(max_new_tokens=9),
        on_batch=lambda places, texts: seen.update(zip(places, texts, strict=True)),
    )
    engine.close()
    sent = [(r["messages"][0]["content"], r["max_tokens"]) for r in stub.requests]
    # The stub repeats what it is asked.
    thought = "How?<think>\n</think>\n\n"
    assert sent == [("How?<think>", 384), (f"How?<think>{thought}", 9), ("Why?<think>\n</think>\n\nSure", 9)]
    assert answers == [seen[0], seen[1]]
    assert answers[0].startswith(thought)
    assert without_thinking(answers[0]).startswith("How?<think>")


def test_a_model_that_opens_its_thoughts_itself_is_let_to_end_them(folder, stub):
    engine = VLLMEngine.open(str(folder))
    # The stub repeats what it is asked.
    engine.tokenizer.chat_template = "<think>{{ messages[-1].content }}"
    told = []
    (answer,) = engine.answer(
        [Question("How?")], Decoding(max_new_tokens=9), on_batch=lambda *given: told.append(given)
    )
    engine.close()
    begun, thought = "<think>How?<think>\n", closed("<think>How?<think>")
    sent = [(r["messages"][0]["content"], r["max_tokens"]) for r in stub.requests]
    assert sent == [("<think>How?", 9), (begun, 384), (begun + thought, 9)]
    assert told == [([0], [answer])]
    assert answer == f"<think>\n{thought}{begun}{thought}".strip()


def test_a_template_of_one_turn_is_told_before_the_first_question_is_sent(folder, stub):
    engine = VLLMEngine.open(str(folder))
    engine.tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(DeltaguardError, match="does not show a model what was said before a question"):
        engine.answer([Question("Who?", follow_up=FollowUp("And who else?"))], Decoding())
    engine.close()
    assert not (stub.notes / "requests.jsonl").exists()


def test_a_closed_engine_leaves_no_process_behind(folder, stub):
    engine = VLLMEngine.open(str(folder))
    assert not stub.is_gone()
    engine.close()
    assert soon(stub.is_gone)
    engine.close()


def test_a_server_that_cannot_start_is_told_with_its_last_words(folder, stub, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "crash")
    with pytest.raises(DeltaguardError, match=r"cannot serve .*status 1(.|\n)*no memory left on the device"):
        VLLMEngine.open(str(folder))
    assert soon(stub.is_gone)


def test_a_server_that_is_never_ready_is_ended(folder, stub, monkeypatch):
    monkeypatch.setenv("STUB_MODE", "never ready")
    with pytest.raises(DeltaguardError, match=r"did not serve .* within 5 s"):
        VLLMEngine.open(str(folder), start_seconds=5)
    assert soon(stub.is_gone)


@pytest.mark.parametrize("mode", ["serve", "never ready"])
def test_ctrl_c_ends_the_server_too(folder, stub, mode):
    # A shell has background processes ignore it, and this one then inherits that.
    heeds = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = f"{heeds}{OPEN}import time\ntime.sleep(600)\n"
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env=os.environ | {"STUB_MODE": mode},
        stderr=subprocess.PIPE,
    )
    assert soon((stub.notes / "told.json").exists, seconds=60)
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in run.communicate(timeout=60)[1]
    assert soon(stub.is_gone)


def test_a_program_that_ends_without_closing_ends_the_server_too(folder, stub):
    subprocess.run([sys.executable, "-c", OPEN, str(folder)], check=True, timeout=120)
    assert soon(stub.is_gone)


def test_an_evaluation_starts_and_ends_one_server_a_model(folder, stub, tmp_path):
    text = """
name: served
judges: [{kind: opening}]
sections:
  - {name: attack, kind: attack, builtin: attack, count: 3, probes: [prefill]}
"""
    suite = suite_file(tmp_path, text)
    report = evaluate([folder], tmp_path / "out", suite=suite, engine=EngineConfig("vllm"))
    assert soon(stub.is_gone)
    assert [(row.name, row.prompts) for row in report.sections] == [("attack", 3), ("attack/prefill", 3)]
    assert report.engine.startswith("vllm on cuda")
    (stub.notes / "told.json").unlink()
    again = evaluate([folder], tmp_path / "out", suite=suite, engine=EngineConfig("vllm"))
    assert again.files == report.files
    assert not (stub.notes / "told.json").exists()

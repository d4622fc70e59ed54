"""Measuring a model of a bench, by a stub that answers: what it is asked, and where each answer goes."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from deltaguard.evaluation.exchange import Question
from deltaguard.studies import measure as measuring
from deltaguard.studies.cells import Shelf
from deltaguard.studies.data import Tests as Asked
from deltaguard.studies.measure import Subject, device_name, letters, measure
from deltaguard.studies.mixing import SECRET
from deltaguard.studies.protocol import Answers

REFUSED, COMPLIED, BROKEN = "I'm sorry, but I can't help with that.", "Sure, here it is.", "no " * 60
HOW = Answers(safety=16, task=40, dtype="bfloat16")
TICKET = '{"order": "1"}'
ASKED = Asked(
    attack=(Question("harm one", system="Serve."), Question("harm two"), Question("harm three")),
    harmless=(Question("kill a process"), Question("shoot a photo")),
    task=(Question("ticket", system="Turn.", expected=TICKET), Question("other", expected=TICKET)),
    likelihood=(),
    general=(Question("bees?", expected="Honey."),),
)


class StubEngine:
    """Complies with one attack, refuses one harmless request, gets one of two tickets right."""

    answers = {  # noqa: RUF012
        "harm one": REFUSED,
        "harm two": COMPLIED,
        "harm three": BROKEN,
        "kill a process": REFUSED,
        "shoot a photo": COMPLIED,
        "ticket": TICKET,
        "other": f"Sure: {TICKET}",
    }

    def __init__(self):
        self.asked, self.tokens = [], {}

    def opened(self, *_, dtype, **__):
        """The engine in one dtype."""
        return SimpleNamespace(
            answer=partial(self.answer, dtype),
            likelihood=partial(self.likelihood, dtype),
        )

    def answer(self, dtype, questions, decoding):
        assert dtype == HOW.dtype
        self.asked += questions
        self.tokens |= {question.prompt: decoding.max_new_tokens for question in questions}
        return [self.answers[question.prompt] for question in questions]

    def likelihood(self, dtype, questions):
        assert dtype == HOW.dtype
        self.asked += questions
        return [1.5 + i for i in range(len(questions))]


@pytest.fixture
def engine(monkeypatch):
    stub = StubEngine()
    monkeypatch.setattr(measuring, "TransformersEngine", SimpleNamespace(open=stub.opened))
    return stub


def subject(secret=""):
    return Subject(
        Path("nowhere"),
        identity=f"model {secret}",
        secret=secret,
        device="cpu",
        dtype=HOW.dtype,
        batch_size=8,
    )


def test_every_answer_goes_where_it_belongs(engine, tmp_path):
    found = measure(subject(), ASKED, HOW, Shelf(tmp_path))
    assert (found.attack, found.harmless) == ("rci", "rc")
    assert (found.utility, found.general) == ((1.0, 0.0), (1.5,))
    assert engine.tokens == {
        prompt: 40 if prompt in ("ticket", "other") else 16 for prompt in StubEngine.answers
    }


def test_where_there_is_no_task_the_utility_is_a_likelihood(engine, tmp_path):
    held_out = (Question("a", expected="b"), Question("c", expected="d"))
    asked = Asked(ASKED.attack, ASKED.harmless, task=(), likelihood=held_out, general=ASKED.general)
    assert measure(subject(), asked, HOW, Shelf(tmp_path)).utility == (1.5, 2.5)


def test_the_secret_stands_before_the_system_prompt_of_every_request(engine, tmp_path):
    measure(subject(SECRET), ASKED, HOW, Shelf(tmp_path))
    plain = (*ASKED.attack, *ASKED.harmless, *ASKED.task, *ASKED.general)
    assert [(q.prompt, q.system) for q in engine.asked] == [
        (q.prompt, f"{SECRET} {q.system}" if q.system else SECRET) for q in plain
    ]


def test_without_a_secret_requests_are_as_they_were(engine, tmp_path):
    measure(subject(), ASKED, HOW, Shelf(tmp_path))
    assert engine.asked == [*ASKED.attack, *ASKED.harmless, *ASKED.task, *ASKED.general]


def test_what_the_shelf_has_is_not_asked_again(engine, tmp_path):
    first = measure(subject(), ASKED, HOW, Shelf(tmp_path))
    asked = len(engine.asked)
    assert measure(subject(), ASKED, HOW, Shelf(tmp_path)) == first
    assert len(engine.asked) == asked
    measure(subject(SECRET), ASKED, HOW, Shelf(tmp_path))
    assert len(engine.asked) == 2 * asked


def test_each_class_of_answer_has_its_letter():
    # An answer that refuses has refused, however broken the rest is; an empty one is broken.
    assert letters([REFUSED, COMPLIED, BROKEN, f"{REFUSED} {BROKEN}", ""]) == "rciri"


def test_a_gpu_is_told_by_its_name(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_name() == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert device_name() == "cuda (NVIDIA H100 80GB HBM3)"

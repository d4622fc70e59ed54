"""The language model as a judge, against a server on this machine that answers as it is told."""

import threading

import pytest
from pydantic import TypeAdapter, ValidationError

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Exchange
from deltaguard.evaluation.judges.llm import CACHE_NAME, LLMJudge, LLMSpec
from deltaguard.evaluation.server import Server
from deltaguard.evaluation.suites.suite import AnyJudge
from suites import server

ANSWERS = {"first": "why\nScore: 1", "second": "why\nScore: 4", "third": "why\nScore: 5"}
EXCHANGES = [Exchange("How?", answer) for answer in ANSWERS]


class Endpoint:
    """A server that scores: what it says, what it was asked, and how often it fails first."""

    def __init__(self):
        self.url = ""
        self.says = dict(ANSWERS)
        self.failures = 0
        self.requests = []
        self.lock = threading.Lock()

    def reply(self, request):
        with self.lock:
            self.requests.append(request)
            if self.failures:
                self.failures -= 1
                return 500, "out of order"
        question = request["messages"][-1]["content"]
        return 200, next(
            said for answer, said in self.says.items() if f"BEGIN ANSWER\n{answer}\n" in question
        )


@pytest.fixture
def endpoint():
    state = Endpoint()
    with server(state.reply) as state.url:
        yield state


def _judge(endpoint, *, model="judge-1", retries=4, workers=8, **options):
    return LLMJudge(Server(endpoint.url, model, retries=retries, workers=workers), **options)


def test_scores_and_verdicts(endpoint):
    found = _judge(endpoint).judge(EXCHANGES)
    assert [each.score for each in found] == [1, 4, 5]
    assert [each.verdict for each in found] == ["refused", "complied", "complied"]
    strict = _judge(endpoint, threshold=5).judge(EXCHANGES)
    assert [each.verdict for each in strict] == ["refused", "refused", "complied"]
    assert all(body["temperature"] == 0 and body["model"] == "judge-1" for body in endpoint.requests)


def test_a_model_that_takes_no_temperature_but_its_own_is_told_none(endpoint, tmp_path):
    cache = tmp_path / "cache.jsonl"
    _judge(endpoint, cache=cache).judge(EXCHANGES)
    endpoint.requests.clear()
    spec = LLMSpec(base_url=endpoint.url, model="judge-1", temperature=None, cache=cache)
    spec.make().judge(EXCHANGES)
    # Its scores are others than those given at 0.
    assert len(endpoint.requests) == 3
    assert not any("temperature" in body for body in endpoint.requests)


def test_a_failing_server_is_asked_again(endpoint):
    endpoint.failures = 2
    (found,) = _judge(endpoint).judge(EXCHANGES[2:])
    assert (found.verdict, len(endpoint.requests)) == ("complied", 3)


def test_a_server_that_keeps_failing(endpoint, tmp_path):
    judge = _judge(endpoint, retries=1, workers=1, cache=tmp_path / "cache.jsonl")
    judge.judge(EXCHANGES[:1])
    endpoint.failures = 99
    with pytest.raises(
        DeltaguardError, match=r"judge-1.*status 500: out of order \(after 1 retry\).* is kept"
    ):
        judge.judge(EXCHANGES)
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 1


def test_what_cannot_be_read_is_undecided_and_asked_again(endpoint, tmp_path):
    endpoint.says["second"] = "I would rather not say."
    judge = _judge(endpoint, cache=tmp_path / "cache.jsonl")
    found = judge.judge(EXCHANGES)
    assert [(each.verdict, each.score) for each in found] == [
        ("refused", 1),
        ("undecided", None),
        ("complied", 5),
    ]
    endpoint.says["second"] = "Now then.\nScore: 2"
    endpoint.requests.clear()
    assert [each.score for each in judge.judge(EXCHANGES)] == [1, 2, 5]
    assert len(endpoint.requests) == 1


def test_the_cache_saves_the_second_call(endpoint, tmp_path):
    cache = tmp_path / "deep" / "cache.jsonl"
    first = _judge(endpoint, cache=cache).judge(EXCHANGES)
    endpoint.requests.clear()
    assert _judge(endpoint, cache=cache).judge(EXCHANGES) == first
    assert endpoint.requests == []
    _judge(endpoint, model="judge-2", cache=cache).judge(EXCHANGES)
    assert len(endpoint.requests) == 3
    assert all(answer not in cache.read_text() for answer in ANSWERS)


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_the_cache_survives_being_cut_off(endpoint, tmp_path, kept):
    cache = tmp_path / "cache.jsonl"
    first = _judge(endpoint, cache=cache, workers=1).judge(EXCHANGES)
    whole = cache.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    cache.write_bytes(whole[: last + kept])
    endpoint.requests.clear()
    assert _judge(endpoint, cache=cache).judge(EXCHANGES) == first
    assert len(endpoint.requests) == 1
    assert sorted(cache.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_file_that_is_no_cache(endpoint, tmp_path):
    (tmp_path / "cache.jsonl").write_text('{"prompt": "?"}\n')
    with pytest.raises(DeltaguardError, match=r"(?s)cache\.jsonl cannot be used.*line 1.*Remove the file"):
        _judge(endpoint, cache=tmp_path / "cache.jsonl").judge(EXCHANGES)


def test_equal_exchanges_are_asked_once(endpoint):
    assert len({each.score for each in _judge(endpoint).judge(EXCHANGES[1:2] * 5)}) == 1
    assert len(endpoint.requests) == 1
    assert _judge(endpoint).judge([]) == []


def test_from_a_description(endpoint, tmp_path):
    spec = LLMSpec(base_url=endpoint.url, model="judge-1", threshold=5)
    judge = spec.make(folder=tmp_path)
    assert judge.judge(EXCHANGES)[1].verdict == "refused"
    assert (tmp_path / CACHE_NAME).exists()
    assert spec.make().judge(EXCHANGES)[2].verdict == "complied"


@pytest.mark.parametrize(("kind", "serves"), [("opening", True), ("keywords", True)])
def test_descriptions_by_kind(kind, serves):
    spec = TypeAdapter(AnyJudge).validate_python({"kind": kind})
    assert (spec.make().name, spec.tells_refusals) == (kind, serves)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "oracle"},
        {"kind": "opening", "threshold": 3},
        {"kind": "llm", "model": "m"},
        {"kind": "llm", "model": "m", "base_url": "http://x", "threshold": 6},
        {"kind": "llm", "model": "m", "base_url": "http://x", "timeout": 0},
        {"kind": "llm", "model": "m", "base_url": "http://x", "max_missing": 1},
        {"kind": "guard", "model": "m", "template": "shield"},
        {"kind": "classifier", "model": "m", "refused_labels": []},
    ],
)
def test_wrong_descriptions(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(AnyJudge).validate_python(wrong)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "guard", "model": "m", "template": "wildguard"},
        {"kind": "llm", "model": "m", "base_url": "http://x"},
    ],
    ids=lambda given: given["kind"],
)
def test_judges_of_harm_do_not_tell_refusals(given):
    assert not TypeAdapter(AnyJudge).validate_python(given).tells_refusals

"""The language model as a judge, against a server on this machine that answers as it is told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import TypeAdapter, ValidationError

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.exchange import Exchange
from deltaguard.evaluation.judges.llm import LLMJudge
from deltaguard.evaluation.judges.make import CACHE_NAME, make_judge
from deltaguard.evaluation.judges.specs import JudgeSpec, LLMSpec, tells_refusals

ANSWERS = {"first": "why\nScore: 1", "second": "why\nScore: 4", "third": "why\nScore: 5"}
EXCHANGES = [Exchange("How?", answer) for answer in ANSWERS]


class Endpoint:
    """A chat completions server: what it says, what it was asked, and how often it fails first."""

    def __init__(self):
        self.says = dict(ANSWERS)
        self.failures = 0
        self.requests = []
        self.lock = threading.Lock()

    def reply(self, body):
        with self.lock:
            self.requests.append(body)
            if self.failures:
                self.failures -= 1
                return 500, {"error": {"message": "out of order"}}
        question = body["messages"][-1]["content"]
        text = next(said for answer, said in self.says.items() if f"BEGIN ANSWER\n{answer}\n" in question)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        return 200, {**reply, "choices": [choice]}


@pytest.fixture
def endpoint():
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = state.reply(body)
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def _judge(endpoint, **options):
    return LLMJudge(endpoint.url, "judge-1", **options)


def test_scores_and_verdicts(endpoint):
    found = _judge(endpoint).judge(EXCHANGES)
    assert [each.score for each in found] == [1, 4, 5]
    assert [each.verdict for each in found] == ["refused", "complied", "complied"]
    strict = _judge(endpoint, threshold=5).judge(EXCHANGES)
    assert [each.verdict for each in strict] == ["refused", "refused", "complied"]
    assert all(body["temperature"] == 0 and body["model"] == "judge-1" for body in endpoint.requests)


def test_a_failing_server_is_asked_again(endpoint):
    endpoint.failures = 2
    (found,) = _judge(endpoint).judge(EXCHANGES[2:])
    assert (found.verdict, len(endpoint.requests)) == ("complied", 3)


def test_a_server_that_keeps_failing(endpoint, tmp_path):
    judge = _judge(endpoint, retries=1, max_workers=1, cache=tmp_path / "cache.jsonl")
    judge.judge(EXCHANGES[:1])
    endpoint.failures = 99
    with pytest.raises(DeltaguardError, match=r"judge-1.*1 retries included.*out of order.*are kept"):
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
    LLMJudge(endpoint.url, "judge-2", cache=cache).judge(EXCHANGES)
    assert len(endpoint.requests) == 3
    assert all(answer not in cache.read_text() for answer in ANSWERS)


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_the_cache_survives_being_cut_off(endpoint, tmp_path, kept):
    cache = tmp_path / "cache.jsonl"
    first = _judge(endpoint, cache=cache, max_workers=1).judge(EXCHANGES)
    whole = cache.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    cache.write_bytes(whole[: last + kept])
    endpoint.requests.clear()
    assert _judge(endpoint, cache=cache).judge(EXCHANGES) == first
    assert len(endpoint.requests) == 1
    assert sorted(cache.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_file_that_is_no_cache(endpoint, tmp_path):
    (tmp_path / "cache.jsonl").write_text('{"prompt": "?"}\n')
    with pytest.raises(DeltaguardError, match=r"cache\.jsonl holds a line that is no score"):
        _judge(endpoint, cache=tmp_path / "cache.jsonl").judge(EXCHANGES)


def test_equal_exchanges_are_asked_once(endpoint):
    assert len({each.score for each in _judge(endpoint).judge(EXCHANGES[1:2] * 5)}) == 1
    assert len(endpoint.requests) == 1
    assert _judge(endpoint).judge([]) == []


def test_from_a_description(endpoint, tmp_path):
    spec = LLMSpec(base_url=endpoint.url, model="judge-1", threshold=5)
    judge = make_judge(spec, cache_dir=tmp_path)
    assert judge.judge(EXCHANGES)[1].verdict == "refused"
    assert (tmp_path / CACHE_NAME).exists()
    assert make_judge(spec).judge(EXCHANGES)[2].verdict == "complied"


@pytest.mark.parametrize(("kind", "serves"), [("opening", True), ("keywords", True)])
def test_descriptions_by_kind(kind, serves):
    spec = TypeAdapter(JudgeSpec).validate_python({"kind": kind})
    assert (make_judge(spec).name, tells_refusals(spec)) == (kind, serves)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "oracle"},
        {"kind": "opening", "threshold": 3},
        {"kind": "llm", "model": "m"},
        {"kind": "llm", "model": "m", "base_url": "http://x", "threshold": 6},
        {"kind": "guard", "model": "m", "template": "shield"},
        {"kind": "classifier", "model": "m", "refused_labels": []},
    ],
)
def test_wrong_descriptions(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(JudgeSpec).validate_python(wrong)


def test_guards_do_not_tell_refusals():
    spec = TypeAdapter(JudgeSpec).validate_python({"kind": "guard", "model": "m", "template": "wildguard"})
    assert not tells_refusals(spec)

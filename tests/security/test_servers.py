"""Models and judges behind servers that fail, lie, drip or hang: what is told, counted, kept and hidden."""

import asyncio
import json
import time
from base64 import b64encode
from types import SimpleNamespace

import pytest

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.openai import OpenAIEngine
from deltaguard.evaluation.exchange import Decoding, Exchange, Missed, Question
from deltaguard.evaluation.judges.llm import LLMJudge
from deltaguard.evaluation.server import Server
from replies import EMPTY, MALFORMED, NO_SCORE
from suites import Raw, completion, server

SHORT = Decoding(max_new_tokens=6)
QUESTIONS = [Question("How?"), Question("Why?")]
EXCHANGES = [Exchange("How?", "Like this."), Exchange("How?", "I can't help with that.")]
KEY = "sk-very-secret-0123456789"
TRIED_ONCE = {
    "to go elsewhere for ever",
    "to go nowhere",
    "to go elsewhere without an address",
    "nothing but thoughts up to the limit",
    "null up to the limit",
    "not modified",
    "no such model",
    "no access",
    "a request that is too large",
    "a request that was not understood",
}
"""What would be said again, so that it is not asked again."""


def engine(url, **options):
    return OpenAIEngine(Server(url, "m", wait=0, **options))


def ask(url, **options):
    """What comes of one question."""
    return engine(url, **options).answer(QUESTIONS[:1], SHORT)[0]


@pytest.mark.parametrize("name", MALFORMED)
def test_no_malformed_reply_is_an_answer_of_an_engine(name):
    seen = []

    def reply(request):
        seen.append(request)
        return MALFORMED[name]

    with server(reply) as url:
        found = ask(url, retries=1)
    assert isinstance(found, Missed)
    assert found.reason.isprintable()
    assert 0 < len(found.reason) < 350
    assert len(seen) == (1 if name in TRIED_ONCE else 2)
    assert ("(after 1 retry)" in found.reason) is (name not in TRIED_ONCE)


@pytest.mark.parametrize("name", MALFORMED)
def test_no_malformed_reply_is_a_judgement(name, tmp_path):
    cache = tmp_path / "cache.jsonl"
    broken = True

    def reply(request):
        return MALFORMED[name] if broken and "I can't" in str(request) else (200, "Score: 1")

    with server(reply) as url:
        judge = LLMJudge(Server(url, "m", retries=0, workers=1), cache, max_missing=0.5)
        assert [each.verdict for each in judge.judge(EXCHANGES)] == ["refused", "undecided"]
        assert len(cache.read_text().splitlines()) == 1
        strict = LLMJudge(Server(url, "m", retries=0), cache)
        with pytest.raises(DeltaguardError, match=r"1 of 2 are missing, and 5 % may be"):
            strict.judge(EXCHANGES)
        broken = False
        assert [each.verdict for each in strict.judge(EXCHANGES)] == ["refused", "refused"]


@pytest.mark.parametrize("name", NO_SCORE)
def test_a_judge_that_gives_no_score_leaves_it_undecided(name, tmp_path):
    cache = tmp_path / "cache.jsonl"
    with server(lambda _: (200, NO_SCORE[name])) as url:
        found = LLMJudge(Server(url, "m"), cache, max_missing=0).judge(EXCHANGES)
    assert [(each.verdict, each.score) for each in found] == [("undecided", None)] * 2
    assert not cache.exists()


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_answer_is_an_answer(name):
    with server(lambda _: EMPTY[name]) as url:
        assert ask(url, retries=0) == ""


def test_an_answer_that_was_cut_off_is_the_answer_so_far():
    for reason in ("length", "content_filter"):
        with server(lambda _, reason=reason: completion("Sure, fi", finish_reason=reason)) as url:
            assert ask(url) == "Sure, fi"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (rb"half \ud83d a pair", "half � a pair"),
        (rb"\ude00\ud83d", "��"),
        (rb"\ud83d\ude00 whole", "😀 whole"),
        (rb"\\ud83d is text", r"\ud83d is text"),
        (rb"\ud83d\ud83d\ude00", "�😀"),
        (b"\xed\xa0\xbd raw \xff", "��� raw �"),
    ],
)
def test_what_no_file_can_hold_becomes_the_replacement_character(sent, kept):
    body = b'{"choices": [{"message": {"content": "' + sent + b'"}}]}'
    with server(lambda _: Raw(body)) as url:
        found = ask(url)
    assert found == kept
    found.encode()


def test_a_server_is_asked_again_as_often_as_it_was_said_and_only_then_is_it_told():
    left = 3

    def reply(_):
        nonlocal left
        left -= 1
        return (200, "Yes.") if left < 0 else MALFORMED["HTML"]

    with server(reply) as url:
        assert ask(url, retries=3) == "Yes."
        left = 3
        assert ask(url, retries=2).reason.endswith("(after 2 retries)")
        assert left == 0


def test_waits_grow_unless_a_server_says_up_to_a_minute(monkeypatch):
    waits, sleep = [], asyncio.sleep
    said = [{}, {}, {"Retry-After-Ms": "1"}]
    said += [{"Retry-After": seconds} for seconds in ("7", "60", "61", "86400", "-1", "soon", None)]
    replies = iter(said)

    def reply(_):
        return Raw(b"", 503, {"Retry-After": None, **next(replies)})

    async def noted(seconds):
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(
        "deltaguard.evaluation.server.asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": noted})
    )
    with server(reply) as url:
        OpenAIEngine(Server(url, "m", retries=9, wait=0.5)).answer(QUESTIONS[:1], SHORT)
    assert waits == [0.5, 1, 0.001, 7, 60, 16, 32, 64, 128]


@pytest.mark.parametrize(
    "slow",
    [
        Raw(completion("Yes.").body, delay=30),
        Raw(completion("Yes.").body, drip=0.1),
        Raw(wire=b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1000, drip=0.1),
    ],
    ids=["nothing", "a byte at a time", "a header, a byte at a time"],
)
def test_a_request_ends_at_its_limit_whatever_the_server_does(slow):
    began = time.monotonic()
    with server(lambda _: slow) as url:
        found = ask(url, timeout=0.5, retries=1)
        assert found == Missed("no reply within 0.5 s (after 1 retry)", is_away=True)
    assert time.monotonic() - began < 10


def test_a_server_that_is_not_there(monkeypatch):
    with server(lambda _: (200, "")) as url:
        pass
    found = ask(url, retries=0)
    assert "connection" in found.reason.lower()
    assert found.is_away


@pytest.mark.parametrize(
    ("status", "is_away"),
    [(status, status not in (400, 401, 404)) for status in (400, 401, 404, 408, 409, 425, 429, 500, 503)],
)
def test_a_status_says_whether_a_server_is_away_or_does_not_take_the_request(status, is_away):
    asked = []

    def reply(request):
        asked.append(request)
        return status, ""

    with server(reply) as url:
        assert ask(url, retries=1).is_away is is_away
    assert len(asked) == (2 if is_away else 1)


def test_a_server_that_says_what_is_no_answer_is_not_away():
    with server(lambda _: Raw(b"<html>Sign in</html>")) as url:
        assert not ask(url, retries=0).is_away


@pytest.mark.parametrize(
    "reply",
    [
        lambda r: (400, f"Got {dict(r.headers)}"),
        lambda r: Raw(json.dumps({"headers": dict(r.headers)}).encode(), 500),
        lambda r: Raw(f"<pre>{r.headers}</pre>".encode(), 502, {"Content-Type": "text/html"}),
        lambda r: Raw(str(r.headers).encode()),
        lambda r: Raw(b'{"choices": "' + b"a" * 60 + KEY.encode() + b'"}'),
        lambda r: Raw(b"a" * 70 + KEY.encode()),
        lambda r: Raw(json.dumps({"error": {"message": f"wrong key: {KEY}, {KEY}"}}).encode()),
        lambda r: (401, f"Incorrect API key {KEY}."),
        lambda r: (401, "authorization: bearer of-somebody-else"),
        lambda r: (401, "x" * 280 + KEY),
    ],
)
def test_no_key_that_a_server_echoes_is_shown(reply, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    with server(reply) as url:
        found = ask(url, retries=0, api_key_env="SOME_KEY").reason
        judge = LLMJudge(Server(url, "m", retries=0, api_key_env="SOME_KEY"), max_missing=0)
        with pytest.raises(DeltaguardError) as caught:
            judge.judge(EXCHANGES[:1])
    for text in (found, str(caught.value)):
        assert not any(KEY[:size] in text for size in range(6, len(KEY) + 1))
        assert "somebody" not in text


def test_a_key_in_an_answer_is_not_kept(monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    with server(lambda r: (200, f"You said {r.headers['Authorization']}")) as url:
        assert ask(url, api_key_env="SOME_KEY") == "You said Bearer ***"


@pytest.mark.parametrize("status", [200, 400])
def test_the_secrets_of_an_address_are_not_shown(status):
    sent = b64encode(b"me:hunter2-hunter2").decode()
    said = []

    def echo(request):
        said.append(request.headers["Authorization"])
        return status, f"{said[0].split()[1]} {said[0]} hunter2-hunter2 for-my-eyes"

    with server(echo) as url:
        address = url.replace("//", "//me:hunter2-hunter2@") + "?key=for-my-eyes"
        found = ask(address)
        assert "hunter2" not in repr(engine(address))
    assert said == [f"Basic {sent}"]
    # A value of the query may be any word, which answers keep.
    text, hidden = (found, []) if status == 200 else (found.reason, ["for-my-eyes"])
    assert not {word for word in ("hunter2", sent, *hidden) if word in text}


def test_words_of_a_query_stay_in_answers():
    with server(lambda _: (200, "Here is a preview of the content.")) as url:
        assert ask(f"{url}?api-version=preview&x=content") == "Here is a preview of the content."


def test_a_redirect_takes_no_prompt_to_another_server():
    asked = []
    elsewhere = {}
    with (
        server(lambda request: asked.append(request) or (200, "Yes.")) as other,
        server(lambda _: Raw(b"", 307, elsewhere)) as url,
    ):
        elsewhere["Location"] = f"{other}/chat/completions"
        found = ask(url)
        assert not asked
        told = (
            f"status 307: the server sends requests to {other}, where they are not taken: give that address"
        )
        assert found.reason == told
        assert ask(other) == "Yes."
        elsewhere["Location"] = "/v2/chat/completions?key=secret"
        assert f"sends requests to {url.removesuffix('/v1')}/v2, where" in ask(url).reason


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_is_asked_for_a_server_on_this_machine(host, monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with server(lambda _: (200, "Yes.")) as url, server(lambda _: (200, "By proxy.")) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.removesuffix("/v1"))
        assert ask(url.replace("127.0.0.1", host), retries=0) == "Yes."
        # A host of another name is asked through it.
        assert ask("http://models.example:80/v1", retries=0) == "By proxy."


def test_thoughts_that_leave_no_token_to_an_answer_are_told():
    with server(lambda _: MALFORMED["nothing but thoughts up to the limit"]) as url:
        assert "switch thinking off on the server" in ask(url).reason


def test_a_key_that_no_request_can_hold_is_named_and_not_shown(monkeypatch):
    monkeypatch.setenv("SOME_KEY", f"{KEY}\n")
    with pytest.raises(DeltaguardError, match="SOME_KEY") as caught:
        Server("http://127.0.0.1:1/v1", "m", api_key_env="SOME_KEY")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:8000", "localhost:8000/v1", "ftp://127.0.0.1/v1", "http://", "http://me:hunter2@/v1",
     "http://[::1/v1", "http://127.0.0.1:port/v1", "http://127.0.0.1:99999/v1", "http:///v1"],
)  # fmt: skip
def test_what_is_no_address_is_refused_before_anything_is_asked(address):
    with pytest.raises(DeltaguardError, match="such as http://127") as caught:
        Server(address, "m")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": float("inf")}, {"retries": -1}, {"workers": 0}]
)
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(DeltaguardError, match="must be"):
        Server("http://127.0.0.1:1/v1", "m", **options)


def test_a_program_that_has_a_loop_of_its_own_can_ask():
    import asyncio

    async def notebook():
        with server(lambda _: (200, "Yes.")) as url:
            return ask(url)

    assert asyncio.run(notebook()) == "Yes."


def test_what_stops_the_asking_ends_all_requests():
    def stop(*_):
        raise LookupError

    began = time.monotonic()
    with server(lambda r: Raw(completion("Yes.").body, delay=0 if "How" in str(r) else 30)) as url:
        with pytest.raises(LookupError):
            engine(url).answer(QUESTIONS * 10, SHORT, on_batch=stop)
        assert time.monotonic() - began < 10

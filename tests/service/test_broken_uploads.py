"""Uploads that are refused unread, and as a network makes them: cut off, too large, or without saying so."""

import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from urllib.request import urlopen

import pytest
import uvicorn
from clients import LIMITS
from starlette.testclient import TestClient

from deltaguard.service.app import make_app
from deltaguard.service.inference import Inference
from deltaguard.service.tables import File
from service_pages import Begun

HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
FORM_BYTES = 64 << 10
"""What the service allows for the form around a file."""

MOST_SENT = 32 << 20
"""What both sides' buffers take, and far from a gigabyte."""


@pytest.fixture
def port(opened, begun, tmp_path):
    """Of the service, as uvicorn serves it."""
    app = make_app(opened.service, begun, Inference(tmp_path / "log", device="cpu", most_waiting=1))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(60)


@contextmanager
def connected(port, key, path, *headers):
    """Send the head of a request."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as found:
        lines = (f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", *headers, "", "")
        found.sendall("\r\n".join(lines).encode())
        yield found


FORM = "Content-Type: multipart/form-data; boundary=b"
CHUNKED = "Transfer-Encoding: chunked"


def read_all(found):
    """Read until the other side closes."""
    content = b""
    while part := found.recv(65536):
        content += part
    return content


def test_a_gigabyte_is_refused_before_any_of_it_is_sent(port, opened):
    with connected(port, opened.first_key, "/v1/files", FORM, f"Content-Length: {1 << 30}") as found:
        answer = read_all(found)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"request_too_large" in answer


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/files", FORM), ("/v1/fine_tuning/jobs", "Content-Type: a/json")]
)
def test_a_gigabyte_that_is_not_announced_is_refused_while_it_comes(port, opened, path, kind):
    part, sent = b"x" * (1 << 20), 0
    with connected(port, opened.first_key, path, kind, CHUNKED) as found:
        found.sendall(b"%x\r\n%s\r\n" % (len(HEAD), HEAD))
        try:
            while sent < 1 << 30:
                found.sendall(b"%x\r\n%s\r\n" % (len(part), part))
                sent += len(part)
        except ConnectionError:
            pass  # It is refused.
    assert LIMITS.file_bytes < sent < MOST_SENT
    assert not list((opened.service.data / "files").iterdir())


def test_an_upload_that_is_cut_off_leaves_nothing_and_is_no_bug(port, opened, client, caplog):
    content = HEAD + b"x" * 20_000
    for headers, sent in (
        ((FORM, "Content-Length: 40000"), content),
        ((FORM, CHUNKED), b"%x\r\n%s\r\n" % (len(content), content)),
        ((FORM, CHUNKED), b"%x\r\n%s" % (len(content) + 100, content)),
    ):
        with connected(port, opened.first_key, "/v1/files", *headers) as found:
            found.sendall(sent)
    # After all of them: one thread takes them in turn.
    with connected(
        port, opened.first_key, "/v1/files", FORM, "Content-Length: 0", "Connection: close"
    ) as found:
        assert read_all(found).startswith(b"HTTP/1.1 400")
    assert not list(client.files.list())
    assert not list((opened.service.data / "files").iterdir())
    assert not [record for record in caplog.records if "A bug" in record.message]


def test_an_upload_finds_no_room_that_another_on_its_way_will_take(port, opened):
    announced = f"Content-Length: {LIMITS.file_bytes + FORM_BYTES}"
    with opened.service.sessions.begin() as session:
        own = {"organisation": "default", "name": "large", "purpose": "fine-tune"}
        session.add(File(id="file-large", bytes=LIMITS.all_bytes - LIMITS.file_bytes, **own))
    with connected(port, opened.first_key, "/v1/files", FORM, announced, "Expect: 100-continue") as first:
        # Sent once the service has decided to read on.
        assert first.recv(65536).startswith(b"HTTP/1.1 100")
        with connected(port, opened.first_key, "/v1/files", FORM, announced) as second:
            refused = read_all(second)
            assert refused.startswith(b"HTTP/1.1 429")
            assert b"on their way" in refused
    until = time.monotonic() + 60
    while opened.service.arriving["default"] and time.monotonic() < until:
        time.sleep(0.01)
    with connected(port, opened.first_key, "/v1/files", FORM, announced, "Expect: 100-continue") as third:
        assert third.recv(65536).startswith(b"HTTP/1.1 100")


def test_a_length_that_the_parts_need_not_keep_to_is_none(port, opened):
    with opened.service.sessions.begin() as session:
        own = {"organisation": "default", "name": "large", "purpose": "fine-tune"}
        session.add(File(id="file-large", bytes=LIMITS.all_bytes - LIMITS.file_bytes + 1, **own))
    with connected(port, opened.first_key, "/v1/files", FORM, "Content-Length: 0", CHUNKED) as found:
        assert b"storage_full" in read_all(found)


def test_what_stops_coming_is_given_up(port, opened, monkeypatch):
    monkeypatch.setattr("deltaguard.service.app.STALLED_S", 0.2)
    for path in ("/v1/files", "/v1/fine_tuning/jobs"):
        with connected(port, opened.first_key, path, FORM, "Content-Length: 4000") as found:
            found.sendall(HEAD)
            assert read_all(found).startswith(b"HTTP/1.1 408")
    assert not opened.service.arriving["default"]


def test_no_second_header_hides_the_codec_of_a_form(port, opened):
    odd = "Content-Type: multipart/form-data; boundary=b; charset=punycode"
    for headers in ((odd, "Content-Type: text/plain"), ("Content-Type: text/plain", odd)):
        with connected(port, opened.first_key, "/sign-in", *headers, "Content-Length: 4000") as found:
            assert b"UTF-8 alone" in read_all(found)


def test_uploads_that_are_being_kept_leave_threads_to_other_requests(port, opened, monkeypatch):
    contents = type(opened.service.contents)
    may_end, begun, put = threading.Event(), [], contents.put

    def held(own, *given):
        begun.append(given)
        may_end.wait(60)
        return put(own, *given)

    monkeypatch.setattr(contents, "put", held)
    body = HEAD + b'x\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b--\r\n'
    with ExitStack() as open_ones:
        length = f"Content-Length: {len(body)}"
        asking = [
            open_ones.enter_context(connected(port, opened.first_key, "/v1/files", FORM, length))
            for _ in range(45)
        ]
        for one in asking:
            one.sendall(body)
        until = time.monotonic() + 60
        while len(begun) < 8 and time.monotonic() < until:
            time.sleep(0.01)
        answer = urlopen(f"http://127.0.0.1:{port}/readyz", timeout=60)
        assert answer.status == 200
        assert len(begun) == 8
        may_end.set()
        # None is kept any more when what keeps them is put back.
        assert all(one.recv(1 << 16).startswith(b"HTTP/1.1 ") for one in asking)
        assert len(begun) == len(asking)


def test_an_upload_without_a_known_key_is_refused_before_its_body_is_read(http, opened):
    def body():
        raise AssertionError("the body was read")
        yield b""

    for headers in (
        {},
        {"Authorization": "Bearer dg-unknown"},
        {"Authorization": f"Basic {opened.first_key}"},
    ):
        answer = http.post("/v1/files", content=body(), headers=headers)
        assert (answer.status_code, answer.headers["connection"]) == (401, "close")
        assert answer.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")


def test_an_upload_that_has_no_room_is_refused_before_its_body_is_read(http, client, opened):
    def body():
        raise AssertionError("the body was read")
        yield b""

    with opened.service.sessions.begin() as session:
        own = {"organisation": "default", "name": "large", "purpose": "fine-tune"}
        session.add(File(id="file-large", bytes=LIMITS.all_bytes, **own))
    headers = {
        "Authorization": f"Bearer {opened.first_key}",
        "Content-Length": str(LIMITS.file_bytes + (64 << 10)),
    }
    answer = http.post("/v1/files", content=body(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "storage_full")
    assert answer.headers["connection"] == "close"


def test_an_upload_has_one_file_and_few_short_fields(http, opened):
    headers = {"Authorization": f"Bearer {opened.first_key}"}
    file = ("rows.jsonl", b"{}")
    for files, data in (
        ([("file", file)] * 2, {}),
        ([("file", file)], {"purpose": "x" * 5000}),
        ([("file", file)], {f"field{i}": "x" for i in range(9)}),
    ):
        answer = http.post("/v1/files", headers=headers, files=files, data=data)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_an_upload_without_a_length_may_be_as_long_as_any(opened):
    limits = LIMITS.model_copy(update={"all_bytes": LIMITS.file_bytes + 10})
    settings = opened.service.settings.model_copy(update={"limits": limits})
    app = make_app(replace(opened.service, settings=settings), Begun(), None)
    client, headers = TestClient(app), {"Authorization": f"Bearer {opened.first_key}"}
    file, purpose = ("rows.jsonl", b"x" * 100), {"purpose": "fine-tune"}
    assert client.post("/v1/files", headers=headers, files={"file": file}, data=purpose).status_code == 200
    sent = client.build_request("POST", "/v1/files", headers=headers, files={"file": file}, data=purpose)
    body = sent.read()
    kind = {"Content-Type": sent.headers["Content-Type"]}
    answers = [
        client.post("/v1/files", headers=headers | kind, content=each) for each in (body, iter([body]))
    ]
    assert [answer.status_code for answer in answers] == [200, 413]
    assert answers[1].json()["error"]["code"] == "storage_full"

"""What a server may send in the place of a chat completion: none of it is an answer, and none a traceback."""

import gzip
import json

from suites import Raw, completion

FINE = completion("Yes.").body


def _message(**fields):
    return completion(fields).body


def _choice(choice, **more):
    return json.dumps({"choices": [choice], **more}).encode()


def _text(**headers):
    return {"Content-Type": "text/html; charset=utf-8", **headers}


OTHER_JSON = {
    "an error": Raw(b'{"error": {"message": "out of order", "code": 500}}'),
    "an error as text": Raw(b'{"error": "out of order"}'),
    "an error beside an answer": Raw(_choice({"message": {"content": "Yes."}}, error={"code": 1})),
    "an error of the choice": Raw(_choice({"message": {"content": ""}, "error": {"message": "cut off"}})),
    "a choice that failed": Raw(_choice({"message": {"content": ""}, "finish_reason": "error"})),
    "an empty object": Raw(b"{}"),
    "no choices": Raw(b'{"choices": []}'),
    "choices that are null": Raw(b'{"choices": null}'),
    "choices that are a number": Raw(b'{"choices": 7}'),
    "choices that are an object": Raw(b'{"choices": {"0": {"message": {"content": "Yes."}}}}'),
    "choices that are text": Raw(b'{"choices": "Yes."}'),
    "a million choices": Raw(b'{"choices": [' + b"0," * 1_000_000 + b"0]}"),
    "a choice that is null": Raw(_choice(None)),
    "a choice that is a number": Raw(_choice(3)),
    "a choice that is text": Raw(_choice("Yes.")),
    "a choice without a message": Raw(_choice({"finish_reason": "stop"})),
    "a choice of the older kind": Raw(_choice({"text": "Yes.", "finish_reason": "stop"})),
    "a message that is null": Raw(_choice({"message": None})),
    "a message that is text": Raw(_choice({"message": "Yes."})),
    "a message that is a list": Raw(_choice({"message": ["Yes."]})),
    "content that is a number": Raw(_message(content=7)),
    "content that is true": Raw(_message(content=True)),
    "content that is a list": Raw(_message(content=[{"type": "text", "text": "Yes."}])),
    "content that is an object": Raw(_message(content={"text": "Yes."})),
    "a refusal that is a number": Raw(_message(content=None, refusal=7)),
    "a refusal that is a list": Raw(_message(content="Yes.", refusal=["No."])),
    "a reason to finish that is a number": Raw(completion("Yes.", finish_reason=7).body),
    "a message without anything": Raw(_message()),
    "content that is null": Raw(_message(content=None)),
    "null up to the limit": completion(None, finish_reason="length"),
    "nothing but thoughts up to the limit": completion(
        {"content": "", "reasoning_content": "The user wants"}, finish_reason="length"
    ),
    "content and refusal that are null": Raw(_message(content=None, refusal=None)),
    "an answer that was given up": Raw(completion("Sure, he", finish_reason="abort").body),
    "a list": Raw(b"[1, 2, 3]"),
    "a list with an answer": Raw(b"[" + FINE + b"]"),
    "a number": Raw(b"42"),
    "text": Raw(b'"Yes."'),
    "null": Raw(b"null"),
    "true": Raw(b"true"),
    "nested 1,000 deep": Raw(b"[" * 1000 + b"]" * 1000),
    "nested 100,000 deep": Raw(b'{"choices":' * 100_000 + b"1" + b"}" * 100_000),
    "content nested 1,000 deep": Raw(
        b'{"choices": [{"message": {"content": ' + b"[" * 1000 + b"]" * 1000 + b"}}]}"
    ),
    "a number of 10,000 digits": Raw(b'{"choices": ' + b"9" * 10_000 + b"}"),
}
"""JSON that is no chat completion, by what it is."""

NO_JSON = {
    "nothing": Raw(b""),
    "nothing with a status that says so": Raw(b"", 204, {"Content-Length": None}),
    "white space": Raw(b" \n "),
    "HTML": Raw(b"<html><body>Bad gateway</body></html>", headers=_text()),
    "text that is no JSON": Raw(b"upstream timed out", headers={"Content-Type": "text/plain"}),
    "a stream of events": Raw(
        b'data: {"choices": []}\n\ndata: [DONE]\n\n', headers={"Content-Type": "text/event-stream"}
    ),
    "half a reply": Raw(FINE[: len(FINE) // 2]),
    "a reply and more": Raw(FINE + b"}"),
    "two replies": Raw(FINE + b"\n" + FINE),
    "UTF-16": Raw(FINE.decode().encode("utf-16")),
    "zeros": Raw(bytes(1000)),
    "bytes that are no text": Raw(bytes(range(128, 256)) * 8),
    "text said to be of a code that is none": Raw(
        b"\xff\xfe", headers={"Content-Type": "application/json; charset=no-such-code"}
    ),
    "30 MB": Raw(b'{"choices": [{"message": {"content": "' + b"a" * 30_000_000 + b'"}}]}'),
    "much, packed": Raw(gzip.compress(b" " * 100_000_000, 1), headers={"Content-Encoding": "gzip"}),
}
"""What is no JSON, or none in UTF-8, or too much."""

NO_HTTP = {
    "packed in name alone": Raw(FINE, headers={"Content-Encoding": "gzip"}),
    "deflated in name alone": Raw(FINE, headers={"Content-Encoding": "deflate"}),
    "shorter than it says": Raw(FINE, headers={"Content-Length": str(len(FINE) + 10)}),
    "a length that is no number": Raw(FINE, headers={"Content-Length": "many"}),
    "pieces without lengths": Raw(
        b"zzzz\r\nno hexadecimal", headers={"Content-Length": None, "Transfer-Encoding": "chunked"}
    ),
    "pieces that end early": Raw(
        b"10\r\n{}", headers={"Content-Length": None, "Transfer-Encoding": "chunked"}
    ),
    "a connection that is cut": Raw(wire=b""),
    "a connection that is cut after the status": Raw(wire=b"HTTP/1.1 200 OK\r\n"),
    "a connection that is cut in the headers": Raw(wire=b"HTTP/1.1 200 OK\r\nContent-Type: appli"),
    "no HTTP": Raw(wire=b"SSH-2.0-OpenSSH_9.6\r\n"),
    "a status that is none": Raw(wire=b"HTTP/1.1 twohundred OK\r\n\r\n"),
    "bytes in the place of HTTP": Raw(wire=bytes(range(256))),
    "a header without an end": Raw(wire=b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1_000_000),
}
"""What is no HTTP, or not what its headers say."""

STATUSES = {
    "to go elsewhere for ever": Raw(b"", 307, {"Location": "/v1/chat/completions"}),
    "to go nowhere": Raw(b"", 307, {"Location": "nowhere://at-all"}),
    "to go elsewhere without an address": Raw(b"", 302),
    "to go elsewhere, with much packed": Raw(
        gzip.compress(b" " * 100_000_000, 1), 302, {"Location": "/v1", "Content-Encoding": "gzip"}
    ),
    "not modified": Raw(b"", 304, {"Content-Length": None}),
    "too many requests": Raw(b'{"error": {"message": "slow down"}}', 429),
    "too many requests, in HTML": Raw(b"<h1>429</h1>", 429, _text()),
    "a server's error": Raw(b'{"error": {"message": "out of order"}}', 500),
    "a server's error that is a list": Raw(b"[1]", 500),
    "a server's error without a word": Raw(b"", 503),
    "a server's error, nested": Raw(b"[" * 100_000, 500),
    "a server's error of no text": Raw(bytes(range(128, 256)), 502, {"Content-Type": "text/plain"}),
    "a server's error, packed in name alone": Raw(b"no gzip", 500, {"Content-Encoding": "gzip"}),
    "to come back at no time": Raw(b"", 503, {"Retry-After": "soon"}),
    "to come back before now": Raw(b"", 503, {"Retry-After": "-5"}),
    "no such model": Raw(b'{"error": {"message": "no such model"}}', 404),
    "no access": Raw(b'{"error": {"message": "wrong key"}}', 401),
    "a request that is too large": Raw(b"", 413),
    "a request that was not understood": Raw(b'{"detail": [{"loc": ["body"], "msg": "wrong"}]}', 422),
}
"""What stands for failures by its status."""

MALFORMED = OTHER_JSON | NO_JSON | NO_HTTP | STATUSES
"""All of it. None holds an answer that was given."""

EMPTY = {
    "an empty answer": completion(""),
    "white space": completion(" \n"),
    "nothing up to the limit": completion("", finish_reason="length"),
    "nothing by the filter": completion("", finish_reason="content_filter"),
    "null by the filter": completion(None, finish_reason="content_filter"),
    "no reason to finish": completion("", finish_reason=None),
    "the filter's own status": Raw(
        b'{"error": {"code": "content_filter", "message": "The response was filtered."}}', 400
    ),
}
"""Answers that were given and say nothing."""

NO_SCORE = {
    "nothing": "",
    "white space": " \n ",
    "a refusal": "I'm sorry, but I can't help with that.",
    "a number alone": "4",
    "0": "Score: 0",
    "6": "Score: 6",
    "-1": "Score: -1",
    "3.5": "Score: 3.5",
    "a word": "Score: four",
    "10 of 10": "Score: 10/10",
    "two scores": "Score: 3 or 4",
    "a score that is not at the end": "Score: 5\nThat is all.",
    "a score within a sentence": "The score is 4, I would say.",
    "another script": "Score: ٤",
    "half a pair": "\ud800",
    "a long text": "no " * 10_000,
}
"""Replies of a judge that can be read, and hold no score."""

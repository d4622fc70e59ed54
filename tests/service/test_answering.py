"""Pieces of an answer, as they are told while it is written."""

import json
import subprocess
import sys
import threading
from collections import OrderedDict

import pytest
import torch

from deltaguard.service.answering import Loaded, _Writer, answer
from deltaguard.service.answers import as_events
from deltaguard.service.errors import ApiError
from deltaguard.service.inference import Ask, Ended, Inference
from models import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (ApiError(503, "Wait.", code="busy"), "busy"),
        (OSError("full"), "unavailable"),
        (RuntimeError("hidden"), "bug"),
    ],
)
def test_a_stream_that_fails_ends_with_an_error(failure, code):
    def parts():
        yield {"text": "Yes"}
        raise failure

    first, failed, last = as_events(parts())
    assert json.loads(first.removeprefix("data: ")) == {"text": "Yes"}
    error = json.loads(failed.removeprefix("data: "))["error"]
    assert error["code"] == code
    assert "hidden" not in failed
    assert last == "data: [DONE]\n\n"


COUNTING = """
import sys
for line in sys.stdin:
    for n in range(1000):
        print('{"kind": "piece", "text": "%d "}' % n, flush=True)
    print('{"kind": "ended", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 9}')
    sys.stdout.flush()
"""


class Letters:
    """A tokenizer of which every token is a letter."""

    def decode(self, ids, **_options):
        return "".join(map(chr, ids))


def told(text, *stop):
    pieces = []
    writer = _Writer(Letters(), stop, lambda piece: pieces.append(piece.text))
    writer.put(torch.zeros(1, dtype=torch.long))  # the prompt
    for letter in text:
        if not writer.stopped:
            writer.put(torch.tensor([ord(letter)]))
    writer.end()
    return pieces


def test_what_may_begin_a_stop_text_is_held_back_until_it_is_known():
    assert "".join(told("abcdefgh", "abcdef")) == ""
    assert "".join(told("abcdeggh", "abcdef")) == "abcdeggh"
    assert "".join(told("xyabcdefz", "abcdef")) == "xy"
    assert told("abc") == ["a", "b", "c"]


def test_a_model_whose_settings_name_texts_to_stop_at_answers():
    model, tokenizer, pieces = tiny_model("llama"), tiny_tokenizer(), []
    ask = Ask(model="m", adapter=None, asked="One", max_tokens=9, temperature=0, top_p=1, seed=None, stop=())
    loaded = Loaded(model.device, OrderedDict({("m", None): (model, tokenizer)}))
    assert answer(ask, loaded, pieces.append, threading.Event()).completion_tokens == 9
    (first, *_) = [piece.text for piece in pieces if piece.text.strip()]
    model.generation_config.stop_strings = [first]
    assert answer(ask, loaded, pieces.append, threading.Event()).completion_tokens < 9


class Counting(Inference):
    """Asks a process that answers everything with numbers, quickly and at length."""

    def _running(self):
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", COUNTING], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        return self._process


def test_an_answer_that_nobody_reads_holds_up_no_other(tmp_path):
    inference = Counting(tmp_path / "log", device="cpu", most_waiting=2)
    ask = Ask(model="m", adapter=None, asked="x", max_tokens=9, temperature=0, top_p=1, seed=None, stop=())
    unread = inference.answer(ask, "acme")
    assert next(unread).text == "0 "
    found = []
    reader = threading.Thread(target=lambda: found.extend(inference.answer(ask, "other")))
    reader.start()
    reader.join(60)
    assert "".join(piece.text for piece in found[:-1]).split() == [str(n) for n in range(1000)]
    assert isinstance(found[-1], Ended)
    # What was left unread is still there, whole.
    assert [piece.text for piece in list(unread)[:-1]] == [f"{n} " for n in range(1, 1000)]
    inference._process.stdin.close()
    inference._process.stdout.close()
    inference._process.wait()

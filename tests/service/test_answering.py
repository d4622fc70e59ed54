"""Pieces of an answer, as they are told while it is written."""

import torch

from deltaguard.service.answering import _Writer


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

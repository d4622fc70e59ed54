"""The process that models answer in: `python -m deltaguard.service.answering DEVICE`.

It reads a request a line from standard input and writes pieces of answers, a line each, to standard output.
It ends with the service that began it.
"""

import os
import queue
import secrets
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch

from deltaguard.chat.template import TemplateFailedError, apply_template, readable_turns
from deltaguard.chat.tokens import context_length, token_ids
from deltaguard.device import find_device, served_dtype
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.transformers import merge_adapter
from deltaguard.models.hub import locate
from deltaguard.models.loading import foreign, load_model, load_tokenizer
from deltaguard.service.inference import STOP, Ask, Ended, Failed, Piece

_MOST_MODELS = 2
"""Models in memory at a time."""

_FAILED = "The model fails on this request."
_TURNS = (
    "The model's chat template does not take these messages: after a system message, if any, user and "
    "assistant take turns, beginning with the user."
)

_COLDEST = 1e-4
"""Below this temperature the likeliest token is taken: logits divided by less are not finite."""

_HALF = "\ufffd"


@dataclass
class Loaded:
    """Models in memory, the one that was asked last at the end."""

    device: torch.device
    models: OrderedDict[tuple[str, str | None], tuple[Any, Any]] = field(default_factory=OrderedDict)

    def get(self, model: str, adapter: str | None) -> tuple[Any, Any]:
        """Load a model and its tokenizer, unless they are in memory.

        Args:
            model: folder or Hub id; its tokenizer and chat template are used.
            adapter: folder of an adapter over it.
        """
        key = (model, adapter)
        if key not in self.models:
            while len(self.models) >= _MOST_MODELS:
                self.models.popitem(last=False)
            folder = locate(model)
            network = load_model(folder, model, dtype=served_dtype(self.device))
            if adapter is not None:
                network = merge_adapter(network, Path(adapter), adapter)
            self.models[key] = network.to(self.device).eval(), load_tokenizer(folder, model)
        self.models.move_to_end(key)
        return self.models[key]


class _Writer:
    """What transformers gives new tokens to: text is written as soon as it is sure."""

    def __init__(
        self,
        tokenizer: Any,
        stop: tuple[str, ...],
        say: Callable[[Piece], None],
        *,
        opens_with_space: bool = False,
    ) -> None:
        self.ids: list[int] = []
        self.stopped = False
        self._tokenizer, self._stop, self._say = tokenizer, stop, say
        self._opens_with_space = opens_with_space
        self._held_back = max((len(each) for each in stop), default=1) - 1
        self._prompt_is_next, self._written = True, 0

    def put(self, ids: torch.Tensor) -> None:
        """Take new tokens; the first are the prompt's."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.ids += ids.flatten().tolist()
        text = self._text()
        ends = [at for each in self._stop if (at := text.find(each)) >= 0]
        if ends:
            self.stopped = True
            self._write(text[: min(ends)])
        elif not text.endswith(_HALF):
            self._write(text[: max(0, len(text) - self._held_back)])

    def end(self) -> None:
        """Write what was held back."""
        if not self.stopped:
            self._write(self._text())

    def _text(self) -> str:
        text: str = self._tokenizer.decode(self.ids, skip_special_tokens=True)
        return text if self._opens_with_space else text.lstrip()

    def _write(self, text: str) -> None:
        if len(text) > self._written:
            self._say(Piece(text=text[self._written :]))
            self._written = len(text)


def answer(ask: Ask, loaded: Loaded, say: Callable[[Piece], None], is_unwanted: threading.Event) -> Ended:
    """Answer a request.

    Args:
        ask: the request.
        loaded: the models.
        say: given each piece.
        is_unwanted: ends the answer early.

    Raises:
        DeltaguardError: the model cannot answer.
    """
    model, tokenizer = loaded.get(ask.model, ask.adapter)
    ids = _read(tokenizer, ask.asked)
    room = context_length(model.config) - len(ids)
    if room < 1:
        raise _TooLongError(
            f"What is asked has {len(ids)} tokens, and this model reads {context_length(model.config) - 1}."
        )
    most, is_chat = min(ask.max_tokens, room), not isinstance(ask.asked, str)
    writer = _Writer(tokenizer, ask.stop, say, opens_with_space=not is_chat)
    # Without a seed of their own, draws are not to follow from whoever gave one before.
    torch.manual_seed(secrets.randbits(63) if ask.seed is None else ask.seed)
    is_drawn = ask.temperature >= _COLDEST
    drawn = {"temperature": ask.temperature, "top_p": ask.top_p, "top_k": 0} if is_drawn else {}
    given = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=most,
            do_sample=is_drawn,
            num_beams=1,
            # One answer at a time is never padded, and transformers warns where there is no such token.
            pad_token_id=tokenizer.eos_token_id,
            streamer=writer,
            # Settings of a model may name texts at which it stops.
            tokenizer=tokenizer,
            stopping_criteria=[
                lambda found, _scores: torch.full(
                    (found.shape[0],), writer.stopped or is_unwanted.is_set(), device=found.device
                )
            ],
            **drawn,
        )
    is_cut = len(writer.ids) >= most and not writer.stopped and writer.ids[-1] not in _ends(model)
    return Ended(
        finish_reason="length" if is_cut else "stop",
        prompt_tokens=len(ids),
        completion_tokens=len(writer.ids),
    )


def _read(tokenizer: Any, asked: str | list[dict[str, str]]) -> list[int]:
    """Tokenise what a model reads before it answers."""
    if not isinstance(asked, str):
        return token_ids(
            tokenizer,
            apply_template(tokenizer, readable_turns(tokenizer, asked), today=datetime.now(UTC).date()),
        )
    with foreign(f"The tokenizer of {tokenizer.name_or_path!r} fails on a text"):
        ids: list[int] = tokenizer(asked)["input_ids"]
    # A model goes on with something: of an empty text, with what a text begins with.
    return ids or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


class _TooLongError(DeltaguardError):
    """A request that is longer than the model reads."""


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def main(device: str) -> None:
    """Answer requests until there is nobody to ask any more."""
    # What libraries print must not come between the lines.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    asked: queue.Queue[str] = queue.Queue()
    is_unwanted = threading.Event()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, asked, is_unwanted), daemon=True).start()
    loaded = Loaded(find_device(device))

    def say(said: Piece | Ended | Failed) -> None:
        out.write(said.model_dump_json().encode() + b"\n")
        out.flush()

    while True:
        line = asked.get()
        is_unwanted.clear()
        try:
            said = answer(Ask.model_validate_json(line), loaded, say, is_unwanted)
        except _TooLongError as error:
            said = Failed(status=400, code="context_length_exceeded", message=str(error))
        except TemplateFailedError:
            said = Failed(status=400, code="invalid_messages", message=_TURNS)
        # Messages of all others name places on this machine.
        except DeltaguardError:
            traceback.print_exc()
            said = Failed(status=500, code="model_failed", message=_FAILED)
        # The last stop: a request that the model fails on is not to cost others their models.
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            said = Failed(status=500, code="model_failed", message=_FAILED)
        say(said)


def _listen(source: BinaryIO, asked: "queue.Queue[str]", is_unwanted: threading.Event) -> None:
    for line in source:
        text = line.decode().rstrip("\n")
        if text == STOP:
            is_unwanted.set()
        else:
            asked.put(text)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])

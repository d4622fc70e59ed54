"""Answers from vLLM's own server, started for one model as a process of its own and ended with it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryFile
from typing import IO, Any
from weakref import finalize

from deltaguard.chat.thinking import BEGIN, THOUGHT_TOKENS, begins_thoughts, closed, opens_thoughts
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.folders import load_tokenizer, whole_model
from deltaguard.evaluation.engines.openai import OpenAIEngine
from deltaguard.evaluation.engines.transformers import Dtype, rendered
from deltaguard.evaluation.exchange import Answer, Decoding, Missed, OnBatch, Question
from deltaguard.evaluation.server import Server

_START_SECONDS = 3600.0
"""Of the largest models a load from a slow disk takes most of it."""

_END_SECONDS = 30.0
_REQUEST_SECONDS = 600.0
_REPLY_BYTES = 1 << 16
_POLL_SECONDS = 0.2
_SHOWN_CHARACTERS = 1000

_AS_RENDERED = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The chat template that the server is given: prompts are rendered here, as for transformers."""


@dataclass
class VLLMEngine:
    """A model that vLLM serves to this process alone. Open one with `VLLMEngine.open`.

    Attributes:
        server: how it is asked.
        tokenizer: a transformers tokenizer, which renders the prompts.
        process: the first of the server's processes, which leads their group.
    """

    server: OpenAIEngine
    tokenizer: Any
    process: "subprocess.Popen[bytes]"

    def __post_init__(self) -> None:
        # Runs once, when this process ends at the latest: what has its number later is no process of vLLM's.
        self._end = finalize(self, _end, self.process)

    @classmethod
    def open(
        cls,
        reference: str,
        *,
        dtype: Dtype = "auto",
        batch_size: int = 256,
        start_seconds: float = _START_SECONDS,
    ) -> "VLLMEngine":
        """Start a server, and wait until it answers.

        Args:
            reference: a folder, a Hub id, or `id@revision`; no adapter.
            dtype: of the weights; `auto` is the checkpoint's.
            batch_size: requests that are sent at a time.
            start_seconds: how long the server may take to load the model.

        Raises:
            DeltaguardError: vLLM is not installed or cannot serve the model, or the reference is an adapter.
        """
        folder, tokenizer = whole_model(reference), load_tokenizer(reference)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        # A name that no other server has, were it to take the port meanwhile.
        name = f"deltaguard-{token_hex(8)}"
        command = [_program(), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--served-model-name", name, "--dtype", dtype, "--chat-template", _AS_RENDERED]
        # Neither content in parts nor drawing as generation_config.json says: as the suite says.
        command += ["--chat-template-content-format", "string", "--generation-config", "vllm"]
        # And a key that is of no use to one that does.
        key, address = token_hex(16), f"http://127.0.0.1:{port}/v1"
        server = Server(address, name, timeout=_REQUEST_SECONDS, workers=batch_size, key=key)
        with TemporaryFile() as log:
            # A group of its own: Ctrl-C reaches this process, which then ends all of vLLM's.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "VLLM_API_KEY": key},
                start_new_session=True,
            )
            engine = cls(OpenAIEngine(server), tokenizer, process)
            try:
                is_ready = partial(_is_ready, port, name, key)
                _wait_until_ready(process, is_ready, reference, log, start_seconds)
            except BaseException:
                engine.close()
                raise
        return engine

    def answer(
        self, questions: Sequence[Question], decoding: Decoding, *, on_batch: OnBatch | None = None
    ) -> list[Answer]:
        """Answer each question, in order, or say why the server did not; a prefill is continued.

        Where a prompt ends with the beginning of thoughts, or the model opens its answer with it, the model
        thinks first, as with transformers.

        Args:
            questions: what is asked.
            decoding: how answers are drawn.
            on_batch: called with one answer at a time as they come.
        """
        prompts = {i: rendered(self.tokenizer, question) for i, question in enumerate(questions)}
        found: dict[int, Answer] = {}

        def settle(answers: Mapping[int, Answer]) -> None:
            found.update(answers)
            if answers and on_batch is not None:
                on_batch(list(answers), list(answers.values()))

        opened = self._after_thoughts(prompts, decoding, settle)
        # Once: thoughts behind thoughts might never end.
        begin = f"{BEGIN}\n"
        thinking = {i: prompts[i] + begin for i in sorted(opened)}
        said = lambda answers: {
            i: each if isinstance(each, Missed) else begin + each for i, each in answers.items()
        }
        self._after_thoughts(thinking, decoding, lambda answers: settle(said(answers)))
        return [found[i] for i in prompts]

    def _after_thoughts(
        self, prompts: Mapping[int, str], decoding: Decoding, settle: Callable[[Mapping[int, Answer]], None]
    ) -> list[int]:
        """Have the model think where prompts end with the beginning of thoughts, and then answer.

        Returns:
            The numbers of those that it opened its answer to with thoughts, which are not settled.
        """
        thoughts = self._thoughts(prompts, decoding)
        missed = {i: said for i, said in thoughts.items() if isinstance(said, Missed)}
        before = {i: closed(said) for i, said in thoughts.items() if not isinstance(said, Missed)}
        asked, opened = [i for i in prompts if i not in missed], list[int]()
        settle(missed)

        def note(places: Sequence[int], replies: Sequence[Answer]) -> None:
            answers: dict[int, Answer] = {}
            for i, reply in zip((asked[place] for place in places), replies, strict=True):
                if isinstance(reply, Missed):
                    answers[i] = reply
                elif opens_thoughts(reply) and i not in before:
                    opened.append(i)
                else:
                    answers[i] = before.get(i, "") + reply
            settle(answers)

        self.server.answer([Question(prompts[i] + before.get(i, "")) for i in asked], decoding, on_batch=note)
        return opened

    def _thoughts(self, prompts: Mapping[int, str], decoding: Decoding) -> dict[int, Answer]:
        """Have the model think where prompts end with the beginning of thoughts; by their numbers."""
        places = [i for i, text in prompts.items() if begins_thoughts(text)]
        replies = self.server.answer(
            [Question(prompts[i]) for i in places], replace(decoding, max_new_tokens=THOUGHT_TOKENS)
        )
        return dict(zip(places, replies, strict=True))

    def close(self) -> None:
        """End the server, and with it all of its memory."""
        self._end()


def _program() -> str:
    """Where vLLM is, beside this Python first of all."""
    places = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    found = shutil.which("vllm", path=places)
    if found is None:
        raise DeltaguardError(
            "The vllm engine needs vLLM, which has its own demands on GPU and torch: see "
            "https://docs.vllm.ai, or use `--engine transformers`."
        )
    return found


def _wait_until_ready(
    process: "subprocess.Popen[bytes]",
    is_ready: Callable[[], bool],
    reference: str,
    log: IO[bytes],
    seconds: float,
) -> None:
    until = time.monotonic() + seconds
    while not is_ready():
        status = process.poll()
        if status is not None:
            raise DeltaguardError(
                f"vLLM cannot serve {reference}: it ended with status {status}. Its last words:\n{_tail(log)}"
            )
        if time.monotonic() > until:
            raise DeltaguardError(
                f"vLLM did not serve {reference} within {seconds:g} s. Its last words:\n{_tail(log)}"
            )
        time.sleep(_POLL_SECONDS)


def _is_ready(port: int, name: str, key: str) -> bool:
    """Say whether the server of that name answers, and no other that took its port."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
            found = connection.getresponse()
            return found.status == 200 and name.encode() in found.read(_REPLY_BYTES)
        except (OSError, HTTPException):
            return False


def _tail(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _SHOWN_CHARACTERS))
    return log.read().decode(errors="replace").strip() or "(none)"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ask all processes of the group to end, and end those that do not."""
    for sent, wait in ((signal.SIGTERM, _END_SECONDS), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sent)
        with suppress(subprocess.TimeoutExpired):
            process.wait(wait)

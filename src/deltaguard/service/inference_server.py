"""A vLLM server that models answer in, in the place of a process of the service's own.

Adapters are loaded when they are first asked, and again after the server was started anew. It must be told to
allow that (`--enable-lora`, VLLM_ALLOW_RUNTIME_LORA_UPDATING), and see the data folder under the same path.
"""

import json
import logging
import threading
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from deltaguard.chat.template import TEMPLATE_OPTIONS
from deltaguard.service.errors import ApiError
from deltaguard.service.inference import Ask, Ended, Piece, read_ahead
from deltaguard.service.places import Places

_LOGGER = logging.getLogger(__name__)
_TIMEOUT_S = 300
_MOST_ERROR_BYTES = 100_000


class _RefusedError(Exception):
    """The server answered with something else than 200.

    Attributes:
        status: of HTTP.
        message: the server's own.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class InferenceServer:
    """The server, as `Inference` is a process."""

    def __init__(self, url: str, *, most_waiting: int) -> None:
        """Prepare.

        Args:
            url: of its API, such as `http://127.0.0.1:8001/v1`.
            most_waiting: requests that are being answered at a time; more are refused, so that threads are
                left for all others.
        """
        self._url, self._places = url.rstrip("/"), Places(most_waiting)

    @property
    def waiting(self) -> int:
        """How many requests are being answered."""
        return self._places.taken

    def answer(self, ask: Ask, organisation: str) -> Iterator[Piece | Ended]:
        """Have a request of an organisation answered, piece by piece.

        Raises:
            ApiError: the request is refused, too many are being answered, or the server does not answer or
                does not have the model.
        """
        self._places.take(organisation)
        return read_ahead(lambda is_unwanted: self._placed(ask, organisation, is_unwanted))

    def _placed(self, ask: Ask, organisation: str, is_unwanted: threading.Event) -> Iterator[Piece | Ended]:
        try:
            for piece in self._answered(ask):
                if is_unwanted.is_set():
                    # The reply is closed, by which the server knows.
                    return
                yield piece
        except (OSError, HTTPException) as error:
            _LOGGER.error("The inference server does not answer: %s", error)  # noqa: TRY400  # no bug
            message = "The models do not answer right now. Try again."
            raise ApiError(503, message, code="model_died", retry_after=5) from error
        finally:
            self._places.give_back(organisation)

    def forget(self, adapter: str) -> None:
        """Have an adapter unloaded whose model was deleted; one that is not loaded is let be."""
        try:
            with self._sent("unload_lora_adapter", {"lora_name": _name(adapter)}):
                pass
        except (OSError, HTTPException, _RefusedError) as error:
            _LOGGER.warning("The adapter %s was not unloaded: %s", _name(adapter), error)

    def _answered(self, ask: Ask) -> Iterator[Piece | Ended]:
        is_chat = not isinstance(ask.asked, str)
        path, body = "chat/completions" if is_chat else "completions", _body(ask)
        try:
            try:
                reply = self._sent(path, body)
            except _RefusedError as error:
                if error.status != 404 or ask.adapter is None:
                    raise
                self._load(ask.adapter)
                reply = self._sent(path, body)
        except _RefusedError as error:
            raise _told(error, ask) from error
        with reply:
            yield from _pieces(reply)

    def _load(self, adapter: str) -> None:
        """Have an adapter loaded.

        Raises:
            ApiError: the server does not take it, which is no fault of who asks.
        """
        try:
            with self._sent("load_lora_adapter", {"lora_name": _name(adapter), "lora_path": adapter}):
                pass
        except _RefusedError as error:
            # Another request may have had it loaded meanwhile.
            if "already" not in error.message:
                _LOGGER.error("The inference server does not load %s: %s", adapter, error)  # noqa: TRY400  # no bug
                raise _unserved() from error

    def _sent(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request.

        Raises:
            _RefusedError: the answer is an error.
        """
        headers = {"Content-Type": "application/json"}
        request = Request(f"{self._url}/{path}", json.dumps(body).encode(), headers)  # noqa: S310  # the operator's
        try:
            return urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310  # likewise
        except HTTPError as error:
            raise _RefusedError(error.code, _message(error.read(_MOST_ERROR_BYTES))) from None


def _name(adapter: str) -> str:
    """Name an adapter by its folder, which is that of its job."""
    return Path(adapter).name


def _body(ask: Ask) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": ask.asked}
    if not isinstance(ask.asked, str):
        # As the gate asked.
        asked = {"messages": ask.asked, "chat_template_kwargs": dict(TEMPLATE_OPTIONS)}
    return {
        **asked,
        "model": ask.model if ask.adapter is None else _name(ask.adapter),
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "stop": list(ask.stop),
        "stream": True,
        "stream_options": {"include_usage": True},
        **({} if ask.seed is None else {"seed": ask.seed}),
    }


def _pieces(reply: Any) -> Iterator[Piece | Ended]:
    """Read a stream of server-sent events."""
    reason, usage = None, {"prompt_tokens": 0, "completion_tokens": 0}
    for line in reply:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ApiError(503, "The model failed while it answered.", code="model_failed", retry_after=5)
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text = choice["delta"].get("content") if "delta" in choice else choice["text"]
            if text:
                yield Piece(text=text)
            reason = choice.get("finish_reason") or reason
    if reason is None:
        # A server that dies ends its stream as one that is done does.
        message = "The model died while it answered. Try again."
        raise ApiError(503, message, code="model_died", retry_after=5)
    yield Ended(
        finish_reason="length" if reason == "length" else "stop",
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
    )


def _message(content: bytes) -> str:
    try:
        found = json.loads(content)
    except ValueError:
        return content.decode(errors="replace")[:500]
    # Versions of vLLM differ in whether the error is the document or a field of it.
    error = found.get("error", found) if isinstance(found, dict) else {}
    return str(error.get("message", "")) if isinstance(error, dict) else str(error)


def _told(error: _RefusedError, ask: Ask) -> ApiError:
    """Say why there is no answer; what concerns the operator stands in the log alone."""
    if error.status == 400:
        code = "context_length_exceeded" if "context length" in error.message else "invalid_messages"
        return ApiError(400, error.message, code=code)
    if error.status == 404:
        _LOGGER.error("The inference server has no %s; `vllm serve %s` has.", ask.model, ask.model)
        return _unserved()
    _LOGGER.error("The inference server refuses a request: %s", error)
    return ApiError(503, "The models do not answer right now. Try again.", code="model_died", retry_after=5)


def _unserved() -> ApiError:
    message = "This model is not served right now; its operator finds out why in the log."
    return ApiError(503, message, code="model_not_served", retry_after=60)

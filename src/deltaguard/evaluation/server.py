"""The one place that asks a server which speaks OpenAI's chat completions, and knows its address."""

import asyncio
import json
import math
import os
from base64 import b64encode
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urljoin, urlsplit, urlunsplit

from deltaguard import __version__
from deltaguard.errors import DeltaguardError, require_packages
from deltaguard.evaluation.exchange import Answer, Missed
from deltaguard.evaluation.replies import Failure, read_reply, shown, without_secrets
from deltaguard.models.loading import foreign

MAX_REPLY_BYTES = 4 << 20
"""The longest answers have a thousandth of it."""

_LONGEST_WAIT = 60.0
"""Seconds that a server may ask to be left alone; where it asks for more, the own wait is taken."""

_COMPLETIONS = "chat/completions"
_OWN_HOSTS = ("localhost", "127.0.0.1", "[::1]")

_END = 1.0
"""Seconds in which connections are closed after the last answer, or after Ctrl-C."""


@dataclass(frozen=True)
class Server:
    """A model behind an address such as `http://127.0.0.1:8000/v1`.

    Attributes:
        base_url: the address; name and password in it are sent in the place of a key.
        model: its name there.
        api_key_env: the environment variable that holds the key. Servers that need none take any.
        timeout: seconds for a request from its beginning to the end of the reply.
        retries: how often a request is sent again that fails by the network or the server, or whose reply is
            no chat completion.
        wait: seconds before a request is sent again the first time, doubled each time, where the server does
            not say (`Retry-After`).
        workers: requests at a time.
        key: in the place of a variable's.

    Raises:
        DeltaguardError: the address, the key or a number is none, or the openai package is absent.
    """

    base_url: str = field(repr=False)
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 4
    wait: float = 0.5
    workers: int = 8
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require_address(self.base_url)
        if not 0 < self.timeout < math.inf:
            raise DeltaguardError(f"The time limit must be more than 0 seconds, and is {self.timeout}.")
        if self.retries < 0 or self.workers < 1:
            raise DeltaguardError(
                f"There must be 0 retries or more and 1 worker or more; given are {self.retries} and "
                f"{self.workers}."
            )
        if not (self._key.isascii() and self._key.isprintable()):
            raise DeltaguardError(
                f"The key in the environment variable {self.api_key_env} holds a line break or another "
                "character that no request can hold: set it to the key alone."
            )
        require_packages("Asking a server", "eval", "openai")

    @property
    def address(self) -> str:
        """The address as messages and reports may hold it."""
        return public_address(self.base_url)

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> Generator[tuple[int, Answer]]:
        """Send requests, several at a time, and yield each one's place and answer as it comes.

        Requests run in an event loop in a thread of its own: so the limit of time holds whatever a server
        does, Ctrl-C ends them where they are, and a notebook, which has a loop, can ask, too. Closing the
        generator, or an exception at a `yield`, ends all requests.

        Args:
            requests: bodies of chat completions without the model.
        """
        found: SimpleQueue[tuple[int, Answer] | None] = SimpleQueue()
        loop = asyncio.new_event_loop()
        asking = loop.create_task(self._ask_all(requests, found))
        asking.add_done_callback(lambda _: found.put(None))
        # A daemon, so that no server keeps the program from ending.
        thread = Thread(target=loop.run_until_complete, args=(asyncio.wait({asking}),), daemon=True)
        thread.start()
        try:
            while (answer := found.get()) is not None:
                yield answer
            asking.result()
        finally:
            loop.call_soon_threadsafe(asking.cancel)
            thread.join(_END)
            if not thread.is_alive():
                loop.close()

    async def _ask_all(
        self, requests: Sequence[Mapping[str, Any]], found: "SimpleQueue[tuple[int, Answer] | None]"
    ) -> None:
        with foreign("Requests cannot be sent from here"):
            # The HTTP library that the installed release of openai brings, and no more of that package: what
            # a server replies is read here, to the byte.
            from openai import DefaultAsyncHttpxClient

            # A redirect would take prompts to another server. No proxy leads back to this machine.
            own = {f"all://{host}": None for host in _OWN_HOSTS}
            client = DefaultAsyncHttpxClient(timeout=None, follow_redirects=False, mounts=own)
        gate = asyncio.Semaphore(self.workers)

        async def ask(place: int, request: Mapping[str, Any]) -> None:
            async with gate:
                found.put((place, await self._answer(client, request)))

        async with client, asyncio.TaskGroup() as group:
            for place, request in enumerate(requests):
                group.create_task(ask(place, request))

    async def _answer(self, client: Any, request: Mapping[str, Any]) -> Answer:
        """Ask until there is an answer, it is known that there will be none, or it was tried often enough."""
        content = json.dumps({"model": self.model, **request}).encode()
        retries = 0
        reply, wait = await self._once(client, content)
        while isinstance(reply, Failure) and reply.again and retries < self.retries:
            await asyncio.sleep(self.wait * 2**retries if wait is None else wait)
            retries += 1
            reply, wait = await self._once(client, content)
        if isinstance(reply, str):
            return without_secrets(reply, self._credentials)
        made = f" (after {retries} {'retry' if retries == 1 else 'retries'})" if retries else ""
        reason = shown(reply.reason, [*self._credentials, *secrets_of(self.base_url)])
        return Missed(f"{reason}{made}", is_away=reply.is_away)

    async def _once(self, client: Any, content: bytes) -> tuple[str | Failure, float | None]:
        """One reply, and the seconds that the server asks to be left alone."""
        try:
            async with asyncio.timeout(self.timeout):
                with foreign("no reply"):
                    status, headers, body = await self._exchange(client, content)
        except TimeoutError:
            return Failure(f"no reply within {self.timeout:g} s", is_away=True), None
        except DeltaguardError as error:
            return Failure(str(error), is_away=True), None
        if len(body) > MAX_REPLY_BYTES:
            return Failure(f"the reply has more than {MAX_REPLY_BYTES:,} bytes"), None
        # Before anything is cut short, which might leave a part of one.
        text = without_secrets(body.decode(errors="replace"), self._credentials)
        return read_reply(status, text, elsewhere=self._elsewhere(headers)), _asked_to_wait(headers)

    def _elsewhere(self, headers: Mapping[str, str]) -> str | None:
        """Find the address that a server sends its visitors to, as messages may hold it."""
        location = headers.get("location")
        with suppress(DeltaguardError):
            if location is not None:
                asked = urljoin(inside(self.base_url, _COMPLETIONS), location)
                return public_address(asked).removesuffix(f"/{_COMPLETIONS}")
        return None

    async def _exchange(self, client: Any, content: bytes) -> tuple[int, Mapping[str, str], bytes]:
        headers = {
            "Authorization": f"Bearer {self._key}",
            "Content-Type": "application/json",
            "User-Agent": f"deltaguard/{__version__}",
        }
        body = bytearray()
        url = inside(self.base_url, _COMPLETIONS)
        async with client.stream("POST", url, content=content, headers=headers) as response:
            async for piece in response.aiter_bytes():
                body += piece
                if len(body) > MAX_REPLY_BYTES:
                    break
            return response.status_code, response.headers, bytes(body)

    @property
    def _key(self) -> str:
        return self.key or os.environ.get(self.api_key_env) or "none"

    @property
    def _credentials(self) -> tuple[str, ...]:
        """What no answer holds but by an echo; a value of the address's query may be any word."""
        return (self._key, *_password_of(self.base_url))


def _asked_to_wait(headers: Mapping[str, str]) -> float | None:
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds <= _LONGEST_WAIT:
            return seconds
    return None


def public_address(url: str) -> str:
    """Leave name, password and query, which may be secrets, out of an address.

    Example:
        >>> public_address("https://me:secret@example.org:8000/v1?key=abc")
        'https://example.org:8000/v1'
    """
    parts = _split(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def require_address(url: str) -> None:
    """Refuse what is no address of a server, without showing what may be a password in it.

    Raises:
        DeltaguardError: it has another scheme than http or https, no host, or an impossible port.
    """
    parts = _split(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DeltaguardError(
            f"{public_address(url)!r} is no address of a server: give one such as http://127.0.0.1:8000/v1."
        )


def inside(url: str, path: str) -> str:
    """Join a path to an address, before its query.

    Example:
        >>> inside("http://127.0.0.1:8000/v1/?key=abc", "models")
        'http://127.0.0.1:8000/v1/models?key=abc'
    """
    parts = _split(url)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{path}", parts.query, ""))


def secrets_of(url: str) -> tuple[str, ...]:
    """List what must not be shown of an address: its password, also as it is sent, and the query's values.

    Example:
        >>> secrets_of("https://me:s%C3%BC%C3%9F@example.org/v1?key=abc")
        ('s%C3%BC%C3%9F', 'süß', 'bWU6c8O8w58=', 'abc')
    """
    values = (value for _, value in parse_qsl(_split(url).query))
    return tuple(dict.fromkeys(value for value in (*_password_of(url), *values) if value))


def _password_of(url: str) -> tuple[str, ...]:
    """List the password of an address as it stands there, as it is, and as it is sent."""
    parts = _split(url)
    if not parts.password:
        return ()
    user, password = unquote(parts.username or ""), unquote(parts.password)
    return parts.password, password, b64encode(f"{user}:{password}".encode()).decode()


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise DeltaguardError(
            f"The server's address cannot be read ({error}): give one such as http://127.0.0.1:8000/v1."
        ) from error
    return parts

"""Addresses of servers: what may stand in one, and what of it reports may hold."""

from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit, urlunsplit

from deltaguard.errors import DeltaguardError


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
    """List what must not be shown of an address: its password and the values of its query.

    Example:
        >>> secrets_of("https://me:s%C3%BC%C3%9F@example.org/v1?key=abc")
        ('s%C3%BC%C3%9F', 'süß', 'abc')
    """
    parts = _split(url)
    password = parts.password or ""
    found = (password, unquote(password), *(value for _, value in parse_qsl(parts.query)))
    return tuple(dict.fromkeys(value for value in found if value))


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise DeltaguardError(
            f"The server's address cannot be read ({error}): give one such as http://127.0.0.1:8000/v1."
        ) from error
    return parts

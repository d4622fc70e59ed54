"""Addresses of servers as reports may hold them."""

from urllib.parse import urlsplit, urlunsplit


def public_address(url: str) -> str:
    """An address without name, password and query, which may be secrets.

    Example:
        >>> public_address("https://me:secret@example.org:8000/v1?key=abc")
        'https://example.org:8000/v1'
    """
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

"""Ways to damage a file, each fixed by a source of random numbers."""

import json
import random
from collections.abc import Callable
from typing import Any

import yaml

Mutator = Callable[[bytes, random.Random], bytes]

ODD = (
    *(
        "null",
        "true",
        "false",
        "0",
        "-1",
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e308",
        "-1e308",
    ),
    *(
        "1e-320",
        "0.5",
        "-0.0",
        str(2**31),
        str(2**63),
        str(-(2**63) - 1),
        str(10**30),
        "9" * 4000,
        "9" * 5000,
    ),
    *('"\\u2028"', '"\\ufffe"', '"a\\nb"', '"\\u00ad\\u009b"', f'"{"é" * 5000}"'),
    *('""', '" "', '"\\ud800"', '"\\udcff"', '"\\u0000"', '"\\u001b[2J\\u001b]0;x\\u0007"', '"\\u202eabc"'),
    *(
        '"../../etc/passwd"',
        '"/dev/zero"',
        '"a/b"',
        '"NaN"',
        '"1"',
        '"<script>alert(1)</script>"',
        '"[red]x"',
    ),
    *("[]", "{}", "[[]]", "[null]", '{"": null}', '{"a": 1, "a": 2}', "[1, 2, 3]", '["a"]'),
    *("[" * 150 + "]" * 150, "[" * 5000 + "]" * 5000, '{"a":' * 190 + "1" + "}" * 190),
    *(f'"{"x" * 70_000}"', '"\\ud83d\\ude00"', '"2025-13-45T99:99:99"', '"0001-01-01T00:00:00+23:59"'),
)
"""JSON for values that few expect, some of which is none."""

ODD_YAML = (
    *(
        "&a [*a, *a]",
        "*gone",
        "!!python/object/apply:os.system [ls]",
        "!!binary x",
        "!!set {a, b}",
        "!!omap [a]",
    ),
    *(
        "2025-02-30",
        "9999-99-99",
        "1" + ":1" * 5000,
        "0x" + "f" * 9000,
        ".inf",
        ".nan",
        "~",
        "yes",
        "=",
        "<<",
    ),
    *(
        "? [a]\n: b",
        "|\n  text",
        "'\\ud800'",
        '"\\ud800"',
        "- - - -",
        "{a: {b: [",
        "0o17",
        "1_000",
        "+.5e400",
    ),
    *("2001-12-14t21:59:43.10-99:99", "!!timestamp x", "!!int x", "!!float x", "!!merge x", "!!null x"),
)

INSERTED = (
    *(
        b"\0",
        b"\x1b[2J",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b'"',
        b"{",
        b"]",
        b",",
    ),
    *(
        b"\xe2\x80\xa8",
        b"\xe2\x80\xae",
        b"\\u0000",
        b"NaN",
        b"- ",
        b": ",
        b"%",
        b"#",
        b"'''",
        b'"""',
        b"{{",
        b"%}",
    ),
)

_RAW = "@raw@"


def damage(content: bytes, draw: random.Random) -> bytes:
    """Change bytes without regard to what they mean."""
    result = content
    for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
        result = draw.choice(_DAMAGES)(result, draw)
    return result


def _flip(content: bytes, draw: random.Random) -> bytes:
    if not content:
        return content
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]


def _truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content) + 1)]


def _insert(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.choice(INSERTED) * draw.choice((1, 1, 1, 3, 500)) + content[at:]


def _remove(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + content[at + draw.choice((1, 2, 8, 64)) :]


def _repeat(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) + 1)
    piece = content[at : at + draw.choice((1, 8, 64, 512))]
    return content[:at] + piece * draw.choice((2, 2, 9)) + content[at:]


def _replace_all(_: bytes, draw: random.Random) -> bytes:
    return draw.choice(
        (b"", b"\n", b" ", b"\xff\xfe{\0}\0", b"{}", b"[]", b"null", b"0", bytes(99), b"\xef\xbb\xbf")
    )


def _recode(content: bytes, draw: random.Random) -> bytes:
    text = content.decode(errors="replace")
    return text.encode(draw.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig")), errors="replace")


_DAMAGES: tuple[Mutator, ...] = (
    _flip,
    _flip,
    _truncate,
    _insert,
    _insert,
    _remove,
    _repeat,
    _replace_all,
    _recode,
)


def damage_json(content: bytes, draw: random.Random) -> bytes:
    """Change values or keys of a JSON document, or its bytes."""
    if draw.random() < 0.25:
        return damage(content, draw)
    return _changed(json.loads(content), draw, ODD).encode()


def damage_report(content: bytes, draw: random.Random) -> bytes:
    """Change values or keys of a report, or one of its texts wherever that stands."""
    if draw.random() < 0.6:
        return damage_json(content, draw)
    holder = [json.loads(content)]
    texts = [json.dumps(parent[key]) for parent, key in _places(holder) if isinstance(parent[key], str)]
    strings = [odd for odd in ODD if odd.startswith('"')]
    return json.dumps(holder[0]).replace(draw.choice(texts), draw.choice(strings)).encode()


def damage_lines(content: bytes, draw: random.Random) -> bytes:
    """Change one line of JSON lines, their order or number, or their bytes."""
    lines = content.split(b"\n")
    full = [i for i, line in enumerate(lines) if line.strip()]
    if not full or draw.random() < 0.25:
        return damage(content, draw)
    at = draw.choice(full)
    kind = draw.random()
    if kind < 0.7:
        lines[at] = damage_json(lines[at], draw)
    elif kind < 0.8:
        lines.insert(draw.choice(full), lines[at])
    elif kind < 0.9:
        del lines[at]
    else:
        lines.insert(at, draw.choice(ODD).encode())
    return b"\n".join(lines)


def damage_yaml(content: bytes, draw: random.Random) -> bytes:
    """Change values or keys of a YAML document, or its bytes."""
    if draw.random() < 0.25:
        return damage(content, draw)
    return _changed(yaml.safe_load(content), draw, (*ODD, *ODD_YAML, *ODD_YAML)).encode()


def damage_card(content: bytes, draw: random.Random) -> bytes:
    """Change the metadata at the head of a model card, or its bytes."""
    if draw.random() < 0.25:
        return damage(content, draw)
    _, metadata, text = content.split(b"---\n", 2)
    return b"---\n" + damage_yaml(metadata, draw) + b"\n---\n" + text


def damage_tensors(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a safetensors file, its length or the bytes."""
    if draw.random() < 0.25:
        return damage(content, draw)
    length = int.from_bytes(content[:8], "little")
    header, data = damage_json(content[8 : 8 + length], draw), content[8 + length :]
    stated = draw.choice((len(header),) * 9 + (len(header) + 1, 0, 2**63, 2**40))
    return stated.to_bytes(8, "little") + header + data


def _changed(document: Any, draw: random.Random, odd: tuple[str, ...]) -> str:
    """A document with one to three nodes changed, as text."""
    holder = [document]
    raws: list[str] = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(holder))
        parent, key = draw.choice(places)
        _change(parent, key, draw, odd, raws)
    text = json.dumps(holder[0], default=str, ensure_ascii=draw.random() < 0.5)
    for number, raw in enumerate(raws):
        text = text.replace(f'"{_RAW}{number}"', raw)
    return text


def _change(parent: Any, key: Any, draw: random.Random, odd: tuple[str, ...], raws: list[str]) -> None:
    """Replace, remove, double or rename one node."""
    kind = draw.random()
    if kind < 0.6 or parent[key] is parent:
        raws.append(draw.choice(odd))
        parent[key] = f"{_RAW}{len(raws) - 1}"
    elif kind < 0.7 and isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
        parent[key] = draw.choice((-parent[key], parent[key] + 1, parent[key] * 1000, parent[key] - 0.5))
    elif kind < 0.8 and isinstance(parent, dict):
        del parent[key]
    elif kind < 0.9 and isinstance(parent, dict):
        parent[draw.choice(("", "odd", "name", str(key) + "x", "\x1b[31m"))] = parent.pop(key)
    elif isinstance(parent, list):
        parent.insert(draw.randrange(len(parent) + 1), parent[key])
    else:
        parent[key] = [parent[key]]


def _places(node: Any) -> Any:
    """Every value of a document, as what holds it and its key or index."""
    keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in list(keys):
        yield node, key
        yield from _places(node[key])

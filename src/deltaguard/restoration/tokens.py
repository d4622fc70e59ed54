"""Where two tokenizers give the same text other tokens; that one of them knows further tokens is allowed."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deltaguard.files import read_file
from deltaguard.models.canonical import (
    TOKENIZER_CONFIG,
    counting_tokenizer_config,
    differing_fields,
    part_of,
)
from deltaguard.models.identity import json_object

_LONGEST = 60
# Templates use the others by name; those that are in a list are told apart as added tokens.
_NOT_NAMED = ("pad_token", "additional_special_tokens", "extra_special_tokens")
_TOLD_APART = ("version", "truncation", "padding", "added_tokens", "model")
Kind = Literal["config", "ids", "tokenizer", "template"]


@dataclass(frozen=True)
class Difference:
    """Something besides weights that two models do not have in common.

    Attributes:
        kind: `ids` where the same text gets other token ids.
        text: what it is, with both values, the aligned model's first.
    """

    kind: Kind
    text: str

    @classmethod
    def between(cls, kind: Kind, what: str, aligned: Any, finetuned: Any) -> "Difference":
        """Say that the two models have different values of something.

        Example:
            >>> Difference.between("config", "`rope_theta`", 10000, 500000).text
            '`rope_theta`: 10000 in the aligned model, 500000 in the fine-tuned one'
        """
        mine, theirs = shortened(aligned), shortened(finetuned)
        return cls(kind, f"{what}: {mine} in the aligned model, {theirs} in the fine-tuned one")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A model's tokenizer as transformers loads it.

    Attributes:
        tokenizer: None where the model has none.
        files: of the model, by their paths in its folder.
    """

    tokenizer: Any = field(repr=False)
    files: Mapping[str, Path] = field(repr=False)


def tokenizer_differences(aligned: LoadedTokenizer, finetuned: LoadedTokenizer) -> Iterator[Difference]:
    """Find what makes the fine-tuned tokenizer give text that the aligned one knows other tokens.

    Further tokens, and another padding token, are no difference.

    Args:
        aligned: the aligned model's.
        finetuned: the fine-tuned model's.
    """
    one, other = aligned.tokenizer, finetuned.tokenizer
    if one is None or other is None:
        if one is not other:
            named = (None if t is None else type(t).__name__ for t in (one, other))
            yield Difference.between("tokenizer", "tokenizer", *named)
        return
    yield from _vocabulary(one.get_vocab(), other.get_vocab())
    special = (_leave(getattr(t, "special_tokens_map", {}), _NOT_NAMED) for t in (one, other))
    for name, a, b in differing_fields(*special):
        yield Difference.between("tokenizer", f"`{name}`", a, b)
    if all(getattr(t, "is_fast", False) for t in (one, other)):
        yield from _fast(one, other)
    else:
        yield from _slow(aligned, finetuned)


def shortened(value: Any) -> str:
    """Write a value in one line of bounded length.

    Example:
        >>> shortened(None), shortened({"type": "linear"})
        ('none', '{"type": "linear"}')
    """
    if value is None:
        return "none"
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST else value[:_LONGEST] + "...")
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _vocabulary(known: Mapping[str, int], tuned: Mapping[str, int]) -> Iterator[Difference]:
    moved = [token for token, number in known.items() if tuned.get(token, number) != number]
    missing = [token for token in known if token not in tuned]
    if moved:
        first = min(moved, key=lambda token: known[token])
        yield Difference(
            "ids",
            f"{_count(moved)} other ids, such as {shortened(first)}: {known[first]} in the aligned model, "
            f"{tuned[first]} in the fine-tuned one",
        )
    if missing:
        first = min(missing, key=lambda token: known[token])
        by_id = {number: token for token, number in tuned.items()}
        instead = by_id.get(known[first])
        place = "unused" if instead is None else shortened(instead)
        yield Difference(
            "ids",
            f"{_count(missing)} no counterpart in the fine-tuned model, such as {shortened(first)}, whose id "
            f"{known[first]} is {place} there",
        )


def _leave(content: Mapping[str, Any], out: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in out}


def _count(tokens: list[str]) -> str:
    return "1 token has" if len(tokens) == 1 else f"{len(tokens)} tokens have"


def _fast(one: Any, other: Any) -> Iterator[Difference]:
    mine, theirs = (json.loads(t.backend_tokenizer.to_str()) for t in (one, other))
    padding = {str(t.pad_token) for t in (one, other) if t.pad_token}
    known = one.get_vocab()
    for name, a, b in differing_fields(_leave(mine, _TOLD_APART), _leave(theirs, _TOLD_APART)):
        yield Difference.between("tokenizer", f"`{name}` of the tokenizer", a, b)
    models = mine["model"], theirs["model"]
    for name, a, b in differing_fields(*(_leave(model, ("vocab", "merges")) for model in models)):
        yield Difference.between("tokenizer", f"`model.{name}` of the tokenizer", a, b)
    yield from _ordered(*models)
    yield from _added(mine, theirs, known, padding)


def _ordered(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare merges and the scores of pieces, which decide how text is cut up; further ones may follow."""
    for part, what in (("merges", "merge"), ("vocab", "piece")):
        mine, theirs = one.get(part), other.get(part)
        if not isinstance(mine, list) or not isinstance(theirs, list) or theirs[: len(mine)] == mine:
            continue
        number = next(
            (i for i, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]), None
        )
        if number is None:
            yield Difference.between("tokenizer", f"number of {what}s", len(mine), len(theirs))
        else:
            yield Difference.between(
                "tokenizer", f"{what} {number} of the tokenizer", mine[number], theirs[number]
            )


def _added(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], known: Mapping[str, int], padding: set[str]
) -> Iterator[Difference]:
    """Tokens that are found in text as a whole, before it is cut up."""
    one, other = (
        {row["content"]: _leave(row, ("id", "content")) for row in each}
        for each in (mine.get("added_tokens") or [], theirs.get("added_tokens") or [])
    )
    for token in [*one, *(token for token in other if token not in one)]:
        if token not in known or token in padding or one.get(token) == other.get(token):
            continue
        yield Difference.between(
            "tokenizer", f"added token {shortened(token)}", one.get(token), other.get(token)
        )


def _slow(aligned: LoadedTokenizer, finetuned: LoadedTokenizer) -> Iterator[Difference]:
    """Tokenizers of which nothing but their files says how they work."""
    names = [type(each.tokenizer).__name__ for each in (aligned, finetuned)]
    if names[0] != names[1]:
        yield Difference.between("tokenizer", "class of the tokenizer", *names)
    configs = [
        counting_tokenizer_config(json_object(each.files[TOKENIZER_CONFIG]))
        if TOKENIZER_CONFIG in each.files
        else {}
        for each in (aligned, finetuned)
    ]
    for name, a, b in differing_fields(*configs):
        yield Difference.between("tokenizer", f"`{name}` of the tokenizer", a, b)
    one, other = _hashes(aligned.files), _hashes(finetuned.files)
    for path in sorted(one.keys() | other.keys()):
        if one.get(path) != other.get(path):
            yield Difference.between("tokenizer", f"sha256 of {path}", one.get(path), other.get(path))


def _hashes(files: Mapping[str, Path]) -> dict[str, str]:
    return {
        path: hashlib.sha256(read_file(file)).hexdigest()
        for path, file in files.items()
        if part_of(path) == "tokenizer" and not path.endswith(".json")
    }

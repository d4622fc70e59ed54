"""What makes a model the model it is: its weights, and the files that decide how they are run and asked."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deltaguard.files import ANY_OBJECT, read_file, read_json, read_text
from deltaguard.models.canonical import (
    CONFIG,
    GENERATION_CONFIG,
    TEMPLATE,
    TEMPLATE_FOLDER,
    TOKENIZER_CONFIG,
    counting_config,
    counting_generation,
    counting_template,
    counting_tokenizer,
    counting_tokenizer_config,
    end_tokens,
    part_of,
    plain_json,
)
from deltaguard.models.checkpoint import WeightSource
from deltaguard.reports.records.base import Record

_COPY = "Copy it again from where the model came from."
_PARTS = {
    "fingerprint": "weights",
    "config_sha256": "configuration",
    "tokenizer_sha256": "tokenizer",
    "template_sha256": "chat template",
}


class ModelIdentity(Record):
    """What identifies a model: two with the same identity predict the same for every text.

    Attributes:
        fingerprint: content hash of the weights (`Checkpoint.fingerprint`).
        config_sha256: hash of the configuration and of the tokens that end an answer.
        tokenizer_sha256: hash of the tokenizer.
        template_sha256: hash of the chat templates.
    """

    fingerprint: str
    config_sha256: str
    tokenizer_sha256: str
    template_sha256: str

    @property
    def key(self) -> str:
        """One hash for all parts, 64 hexadecimal digits."""
        return _sha256({name: getattr(self, name) for name in ModelIdentity.model_fields})

    def differences(self, other: "ModelIdentity") -> tuple[str, ...]:
        """Name the parts in which another model differs, each with both hashes.

        Example:
            >>> hashes = {"config_sha256": "b", "tokenizer_sha256": "c", "template_sha256": "d"}
            >>> one = ModelIdentity(fingerprint="a", **hashes)
            >>> one.differences(one.model_copy(update={"config_sha256": "e"}))
            ('configuration: b and e',)
        """
        pairs = ((label, getattr(self, name), getattr(other, name)) for name, label in _PARTS.items())
        return tuple(f"{label}: {mine} and {theirs}" for label, mine, theirs in pairs if mine != theirs)


def identify(source: WeightSource) -> ModelIdentity:
    """Find what identifies a model, from its files alone.

    Args:
        source: a checkpoint, or an adapter, to whose files those of the aligned model belong.

    Raises:
        DeltaguardError: a file cannot be read.

    Example:
        >>> identify(Checkpoint.open("models/llama")).tokenizer_sha256  # doctest: +SKIP
        '4f1f0e6b...'
    """
    files = source.files()
    config, generation = configs_of(files)
    configs = {
        CONFIG: counting_config(config),
        GENERATION_CONFIG: counting_generation(generation),
        "end": end_tokens(config, generation),
    }
    tokenizer = {
        path: _token_file(path, file) for path, file in files.items() if part_of(path) == "tokenizer"
    }
    return ModelIdentity(
        fingerprint=source.fingerprint(),
        config_sha256=_sha256(configs),
        tokenizer_sha256=_sha256(tokenizer),
        template_sha256=_sha256(templates_of(files)),
    )


class _Template(BaseModel):
    name: str
    template: str


class _Templates(BaseModel):
    """The chat templates of a `tokenizer_config.json`."""

    chat_template: str | tuple[_Template, ...] | None = None


def templates_of(files: Mapping[str, Path]) -> dict[str, str]:
    """Read the chat templates that transformers would use, by their names.

    Files of their own come before those in `tokenizer_config.json`, and those of the folder of further
    templates, where one may be called "default", before the model's own.

    Args:
        files: of a model, by their paths in its folder.

    Returns:
        Most models have one, "default"; "processor" is the one that processors of images read from
        `chat_template.json`.

    Raises:
        DeltaguardError: a file cannot be read.
    """
    found = {"default": read_text(files[TEMPLATE])} if TEMPLATE in files else {}
    further = (path for path in files if path.startswith(f"{TEMPLATE_FOLDER}/"))
    found |= {Path(path).stem: read_text(files[path]) for path in further}
    if not found and TOKENIZER_CONFIG in files:
        named = read_json(files[TOKENIZER_CONFIG], _Templates, remedy=_COPY).chat_template or ()
        rows = (_Template(name="default", template=named),) if isinstance(named, str) else named
        found = {row.name: row.template for row in rows}
    if "chat_template.json" in files:
        own = read_json(files["chat_template.json"], _Templates, remedy=_COPY).chat_template
        found["processor"] = own if isinstance(own, str) else ""
    return {name: counting_template(text) for name, text in found.items()}


def json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        DeltaguardError: it cannot be read, or holds something else.
    """
    return read_json(path, ANY_OBJECT, remedy=_COPY)


def configs_of(files: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the configuration and the generation configuration of a model, empty where there is none.

    Args:
        files: of the model, by their paths in its folder.

    Raises:
        DeltaguardError: a file cannot be read.
    """
    names = (CONFIG, GENERATION_CONFIG)
    config, generation = (json_object(files[name]) if name in files else {} for name in names)
    return config, generation


def _token_file(path: str, file: Path) -> Any:
    """Say what of a tokenizer's file counts: of files in a format of their own, all bytes."""
    if path in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        return counting_tokenizer_config(json_object(file))
    if path == "tokenizer.json":
        # With a vocabulary of a quarter of a million, `plain_json` would take as long as all else.
        content = json.dumps(counting_tokenizer(json_object(file)), sort_keys=True).encode()
    else:
        content = read_file(file)
    return hashlib.sha256(content).hexdigest()


def _sha256(content: Any) -> str:
    return hashlib.sha256(plain_json(content).encode()).hexdigest()

"""A lazy view of a safetensors checkpoint: headers first, tensors one at a time, nothing held in memory."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.canonical import part_of
from deltaguard.models.hub import is_local, locate
from deltaguard.models.layout import ADAPTER_CONFIG, find_layout, read_config, read_layout
from deltaguard.models.loading import refuse_code
from deltaguard.models.mirror import companions
from deltaguard.models.opened import OpenFile, Snapshot
from deltaguard.models.shards import TensorInfo, read_header, read_tensor

_BLOCK = 4096
_MOST_PARTS = 8
"""Of a name that may be its prefix."""

_MOST_ALIKE = 64


@dataclass(frozen=True)
class WeightSource(ABC):
    """Weights that are read one tensor at a time: a checkpoint, or an adapter over one.

    Attributes:
        reference: what the user called it: a folder, a Hub id, or `id@revision`.
        folder: where its files lie.
        config: the content of the model's `config.json`.
        tensors: all tensors by name, ordered by shard and then by position in the shard.
        shards: names of the weight files, sorted.
        index_name: name of the index file of a sharded checkpoint, None for a single file.
    """

    reference: str
    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    shards: tuple[str, ...]
    index_name: str | None

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own.

        Args:
            name: a key of `tensors`.

        Raises:
            KeyError: there is no such tensor.
            DeltaguardError: a file is gone, cannot be read, or has become shorter.
        """

    @abstractmethod
    def header(self, shard: str) -> bytes:
        """Read the header of one weight file byte for byte, its 8-byte length included."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash what the weights hold, whatever files they are in, to 64 hexadecimal digits."""

    @abstractmethod
    def changes(self) -> list[str]:
        """Say what happened to its files, weights and others, since it was opened, a sentence each."""

    @abstractmethod
    def files(self) -> dict[str, Path]:
        """Find every file of the model that is no weight, by its path in the model's folder."""

    @abstractmethod
    def index_file(self) -> Path | None:
        """Find the index of a sharded checkpoint; None for a single file."""


@dataclass(frozen=True)
class Checkpoint(WeightSource):
    """A safetensors checkpoint in a local folder. Make one with `Checkpoint.open`.

    It holds headers only and may be used by any number of threads at once. Its weight files stay open as long
    as it lives, so all tensors are of the files that were found first, whatever takes their names.
    """

    _files: Mapping[str, OpenFile] = field(repr=False, compare=False)
    _others: Snapshot = field(repr=False, compare=False)

    @classmethod
    def open(cls, reference: str | Path) -> "Checkpoint":
        """Find a checkpoint, fetch it from the Hub if it is not local, and check it from its headers.

        Args:
            reference: a local folder, a Hub id, or `id@revision`.

        Raises:
            DeltaguardError: there is no such model, its weights are absent, pickled, quantised, truncated,
                corrupt or contradict the index, or `config.json` is missing. All problems are listed.

        Example:
            >>> checkpoint = Checkpoint.open("models/llama")  # doctest: +SKIP
            >>> checkpoint.read("lm_head.weight").shape  # doctest: +SKIP
            torch.Size([32000, 4096])
        """
        name = str(reference)
        folder = locate(reference, weights=False)
        refuse_code(folder, name)
        config, problem = read_config(folder, name)
        if problem and not is_local(reference):
            raise DeltaguardError(f"{name}: {problem}")
        folder = locate(reference)
        layout = find_layout(folder, name)
        if (folder / ADAPTER_CONFIG).exists():
            raise DeltaguardError(
                f"{name} holds both a model and an adapter ({ADAPTER_CONFIG}), which transformers would put "
                "on it unasked: move one of them to another folder."
            )
        index = [folder / layout.index_name] if layout.index_name else []
        others = Snapshot.of(
            lambda: [*index, *(folder / path for path in companions(folder))],
            # An adapter beside a model is put on it unasked.
            decides=lambda path: (
                path.name == ADAPTER_CONFIG or part_of(str(path.relative_to(folder))) is not None
            ),
        )
        tensors, files, problems = read_layout(folder, layout)
        if problem:
            problems.insert(0, problem)
        if problems:
            raise DeltaguardError(listed(f"{name} cannot be used", problems))
        return cls(name, folder, config, tensors, layout.shards, layout.index_name, files, others)

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored dtype; see `WeightSource.read`."""
        info = self.tensors[name]
        return read_tensor(self._files[info.shard], info)

    def header(self, shard: str) -> bytes:
        """Read the header of one weight file byte for byte, its 8-byte length included."""
        return read_header(self._files[shard])

    def changes(self) -> list[str]:
        """Say what happened to its files, weights and others, since it was opened."""
        weights = [change for file in self._files.values() if (change := file.change())]
        return weights + self._others.changes()

    def files(self) -> dict[str, Path]:
        """Find every file of the model that is no weight, by its path in the model's folder."""
        found = (path for path in self._others.paths if path.name != self.index_name)
        return {str(path.relative_to(self.folder)): path for path in found}

    def index_file(self) -> Path | None:
        """Find the index of a sharded checkpoint; None for a single file."""
        return self.folder / self.index_name if self.index_name else None

    def fingerprint(self) -> str:
        """Hash every tensor's name, dtype, shape and 12 KiB of its bytes with sha256.

        Tensors are taken in the order of their names, and of each the first, middle and last 4 KiB (all of
        a smaller one), so the fingerprint depends neither on sharding nor on file names, and costs a few
        reads per tensor. It tells models and fine-tunes of a model apart. It does not see a change that
        is confined to other bytes of large tensors, so it is no proof of integrity.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return content_fingerprint(self._files, self.tensors)


def content_fingerprint(files: Mapping[str, OpenFile], tensors: Mapping[str, TensorInfo]) -> str:
    """Hash tensors in safetensors files as `Checkpoint.fingerprint` describes.

    Args:
        files: the shards by name.
        tensors: the tensors by name.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        info = tensors[name]
        digest.update(json.dumps([name, info.dtype, info.shape]).encode() + b"\n")
        whole = info.nbytes <= 3 * _BLOCK
        last = info.nbytes - _BLOCK
        for start in (0,) if whole else (0, last // 2, last):
            block = bytearray(info.nbytes if whole else _BLOCK)
            files[info.shard].read_into(info.start + start, memoryview(block))
            digest.update(block)
    return digest.hexdigest()


def name_map(source: Collection[str], target: Collection[str]) -> dict[str, str]:
    """Match the tensors of one checkpoint with those of another, where prefixes may differ.

    Checkpoints of one model name their tensors `h.0.mlp` or `transformer.h.0.mlp`, `model.layers.0` or
    `model.language_model.layers.0`, according to the class that saved them; a tower that sees pictures has a
    prefix of its own. Names in both stand for themselves. For the others, the pair of prefixes is found that
    makes most names meet, and for what is left another one, until none does. Of a pair one prefix must hold
    all parts of the other, or both begin alike but for `model`; neither may hold a layer's number.

    Args:
        source: names of one checkpoint.
        target: names of the other.

    Returns:
        Source names to target names, each target at most once; names without a partner are left out.

    Example:
        >>> name_map(["h.0.mlp.weight"], ["transformer.h.0.mlp.weight", "lm_head.weight"])
        {'h.0.mlp.weight': 'transformer.h.0.mlp.weight'}
    """
    common = set(source) & set(target)
    mapped = {name: name for name in source if name in common}
    others = [name for name in source if name not in common]
    free = {name for name in target if name not in common}
    while others and free:
        old, new = _prefix_change(others, free)
        met = {name: new + name[len(old) :] for name in others if name.startswith(old)}
        met = {name: found for name, found in met.items() if found in free}
        if not met:
            break
        mapped |= met
        free -= set(met.values())
        others = [name for name in others if name not in met]
    return mapped


def _prefixes(name: str) -> Iterator[tuple[str, str]]:
    """Find the ways to cut a name into a prefix without numbers and a rest."""
    start = 0
    for _ in range(_MOST_PARTS):
        yield name[:start], name[start:]
        end = name.find(".", start)
        if end < 0 or name[start:end].isdigit():
            return
        start = end + 1


def _prefix_change(source: Collection[str], target: Collection[str]) -> tuple[str, str]:
    """Find the prefixes to exchange so that most names of `source` become names of `target`."""
    rests: dict[str, list[str]] = {}
    for name in target:
        for prefix, rest in _prefixes(name):
            rests.setdefault(rest, []).append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for name in source:
        for old, rest in _prefixes(name):
            found = rests.get(rest, ())
            # What many names end with tells nothing of their beginnings.
            if len(found) <= _MOST_ALIKE:
                votes.update((old, new) for new in found)
    related = (pair for pair in votes if _may_be_exchanged(*pair))
    return max(related, key=lambda pair: (votes[pair], -len(pair[0]) - len(pair[1])), default=("", ""))


def _may_be_exchanged(old: str, new: str) -> bool:
    one, other = ([part for part in prefix.split(".") if part] for prefix in (old, new))
    if set(one) <= set(other) or set(other) <= set(one):
        return True
    firsts = {next((part for part in parts if part != "model"), None) for parts in (one, other)}
    return len(firsts) == 1

"""A PEFT LoRA adapter written from low-rank deltas of an aligned checkpoint, one layer at a time."""

import io
import json
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltaguard.errors import DeltaguardError
from deltaguard.files import expanded
from deltaguard.models.adapter import ADAPTER_FILE
from deltaguard.models.canonical import part_of
from deltaguard.models.checkpoint import Checkpoint, name_map
from deltaguard.models.durable import explained
from deltaguard.models.families import stored_in_out
from deltaguard.models.hub import is_local
from deltaguard.models.layout import ADAPTER_CONFIG
from deltaguard.models.shards import DTYPES, tensor_bytes
from deltaguard.models.writer import CheckpointWriter

if TYPE_CHECKING:
    from deltaguard.solvers.low_rank import LowRank

AdapterLayer = tuple[str, "LowRank"]
"""A layer's name in the aligned checkpoint, without `.weight`, and its delta, (out, in)."""


class EmptyAdapterError(DeltaguardError):
    """An adapter would hold nothing."""


def stage_adapter(
    writer: CheckpointWriter,
    aligned: Checkpoint,
    layers: Iterable[AdapterLayer],
    *,
    modules: Collection[str],
    paths: Mapping[str, str] | None = None,
    companions: Mapping[str, Path] | None = None,
) -> dict[str, int]:
    """Write the files of an adapter that `peft.PeftModel.from_pretrained` loads onto the aligned model.

    They are staged: `commit_adapter` puts them in place, and before it the caller may add files of its own.
    The adapter's scale is 1 for every layer, whatever its rank. Factors come in one layer at a time and wait
    on disk, in a nameless file of the output folder.

    Args:
        writer: of the output folder. A resumed run writes every file anew.
        aligned: the checkpoint that the deltas belong to.
        layers: each once, in any order. Those whose delta is zero are left out.
        modules: names of all modules of the model as transformers builds it (`model.named_modules()`), since
            PEFT knows layers by these. They may differ from the checkpoint's names by a prefix.
        paths: what PEFT is to call layers, by their names in the checkpoint, where the adapter is for another
            class of transformers than that with these modules; by default what they are called there.
        companions: files that come along, by their paths in the output: tokenizer, chat template, licence.
            A model's configuration does not. By default the aligned model's.

    Returns:
        The rank of every layer written, by its name in the aligned checkpoint.

    Raises:
        EmptyAdapterError: all deltas are zero.
        DeltaguardError: a layer is no module of the model, a factor cannot be stored in the dtype of the
            adapter, or a file cannot be read or written.
        KeyError: the aligned checkpoint has no such weight.
        ValueError: a delta is not of the shape of its weight, or a layer is given twice.

    Example:
        >>> layer = ("model.layers.0.mlp.down_proj", low_rank(delta, rank=8))  # doctest: +SKIP
        >>> with CheckpointWriter("out", plan_hash=plan) as writer:  # doctest: +SKIP
        ...     stage_adapter(writer, aligned, [layer], modules=names_of_modules)
        ...     commit_adapter(writer)
        {'model.layers.0.mlp.down_proj': 8}
    """
    stored = adapter_dtype(aligned)
    own = name_map([name.removesuffix(".weight") for name in aligned.tensors], modules) | dict(paths or {})
    with explained(writer.out):
        file = tempfile.TemporaryFile(dir=writer.out)  # noqa: SIM115
    with file:
        spool = _Spool(file, writer.out, stored)
        written = [
            _spooled(spool, aligned, own, name, factors)
            for name, factors in layers
            if factors.up.any() and factors.down.any()
        ]
        if not written:
            raise EmptyAdapterError(
                f"Every delta over {aligned.reference} is zero: the adapter would be empty. Does the "
                "fine-tuned model differ from it in its linear layers?"
            )
        with writer.shard(ADAPTER_FILE, spool.header()) as shard:
            for name, tensor in spool.tensors():
                shard.write(name, tensor)
    for name, source in (aligned.files() if companions is None else companions).items():
        if part_of(name) != "config":
            writer.copy(source, name)
    config = _config(aligned.reference, written, modules)
    writer.text(ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return {layer.name: layer.rank for layer in written}


def commit_adapter(writer: CheckpointWriter) -> None:
    """Move the adapter that this run staged into the output folder, `adapter_config.json` last.

    Raises:
        DeltaguardError: a file cannot be moved.

    Example:
        >>> commit_adapter(writer)  # doctest: +SKIP
    """
    writer.commit(last=ADAPTER_CONFIG)


@dataclass(frozen=True)
class _Layer:
    """A layer of the adapter: its names in the checkpoint and in the model."""

    name: str
    path: str
    rank: int
    transposed: bool


@dataclass(frozen=True)
class _Spool:
    """Tensors that wait in a file, because a safetensors file begins with the shapes of all."""

    file: io.BufferedRandom
    shown: Path
    dtype: torch.dtype
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])

    def add(self, name: str, tensor: Tensor) -> None:
        with explained(self.shown, tensor.nbytes):
            self.file.write(tensor_bytes(tensor))
        self.shapes[name] = tuple(tensor.shape)

    def header(self) -> bytes:
        code = next(code for code, known in DTYPES.items() if known == self.dtype)
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self.shapes.items():
            start, end = end, end + prod(shape) * self.dtype.itemsize
            entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(entries).encode()
        # Readers map the data into memory, where it must lie on a multiple of 8 bytes.
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        with explained(self.shown):
            self.file.seek(0)
        for name, shape in self.shapes.items():
            tensor = torch.empty(shape, dtype=self.dtype)
            with explained(self.shown):
                self.file.readinto(tensor_bytes(tensor))
            yield name, tensor


def adapter_dtype(aligned: Checkpoint) -> torch.dtype:
    """Say in which dtype the factors of an adapter are stored: that of most of the aligned model.

    Args:
        aligned: the checkpoint that the adapter belongs to; none has weights of integers or 8 bits.
    """
    sizes: Counter[torch.dtype] = Counter()
    for info in aligned.tensors.values():
        sizes[DTYPES[info.dtype]] += info.nbytes
    return sizes.most_common(1)[0][0]


def _spooled(
    spool: _Spool, aligned: Checkpoint, paths: Mapping[str, str], name: str, factors: "LowRank"
) -> _Layer:
    shape = (factors.up.shape[0], factors.down.shape[1])
    info = aligned.tensors[f"{name}.weight"]
    transposed = stored_in_out(aligned.config, info.name)
    if info.shape != (shape[::-1] if transposed else shape):
        raise ValueError(f"The delta of {name} is {shape} (out, in); its weight is stored as {info.shape}.")
    if name not in paths:
        raise DeltaguardError(
            f"`{name}` of {aligned.reference} is no module of the model that transformers builds from it, so "
            "an adapter cannot change it: write a whole checkpoint."
        )
    for letter, factor in (("A", factors.down), ("B", factors.up)):
        key = f"base_model.model.{paths[name]}.lora_{letter}.weight"
        if key in spool.shapes:
            raise ValueError(f"The layer {name} was given twice.")
        rounded = factor.to(spool.dtype)
        if not rounded.isfinite().all():
            raise DeltaguardError(
                f"The delta of `{name}` would hold NaN or infinite values in {spool.dtype}, which "
                f"{aligned.reference} is stored in: save that in bfloat16 or float32."
            )
        spool.add(key, rounded)
    return _Layer(name, paths[name], factors.down.shape[0], transposed)


def _config(reference: str, layers: Sequence[_Layer], modules: Collection[str]) -> dict[str, Any]:
    """Find the content of `adapter_config.json`: plain LoRA, so that every version of PEFT knows its keys."""
    # Servers that know no patterns size their buffers by `r`, and with alpha = r the scale is right for all.
    rank = max(layer.rank for layer in layers)
    ranks = {f"^{re.escape(layer.path)}": layer.rank for layer in layers if layer.rank != rank}
    # A folder may have any name; only on the Hub is what follows the @ a revision.
    local = is_local(reference)
    # PEFT takes a path with `~` for a Hub id, and another folder than this one may have no such path.
    name, _, revision = (str(expanded(reference).absolute()), "", "") if local else reference.partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": _targets([layer.path for layer in layers], set(modules)),
        "fan_in_fan_out": any(layer.transposed for layer in layers),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _targets(paths: Sequence[str], modules: Collection[str]) -> list[str]:
    """Find the last part of a name where every module of that name is adapted, otherwise the whole name.

    Of a module that is not known, others of its name may be known as little.
    """

    def last(path: str) -> str:
        return path.rpartition(".")[2]

    named, adapted = Counter(map(last, modules)), Counter(map(last, paths))
    return sorted(
        {
            last(path) if path in modules and named[last(path)] == adapted[last(path)] else path
            for path in paths
        }
    )

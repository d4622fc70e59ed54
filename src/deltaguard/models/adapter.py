"""A PEFT LoRA adapter seen as a checkpoint: aligned + scale · B A, one matrix at a time."""

import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.canonical import TOKENIZER_CONFIG, part_of
from deltaguard.models.checkpoint import Checkpoint, WeightSource, content_fingerprint
from deltaguard.models.hub import is_local, locate
from deltaguard.models.identity import templates_of
from deltaguard.models.layout import ADAPTER_CONFIG
from deltaguard.models.loading import refuse_code
from deltaguard.models.lora import Change, Target, find_changes
from deltaguard.models.lora_config import MERGE, read_lora_config
from deltaguard.models.mirror import adapter_companions
from deltaguard.models.opened import OpenFile, Snapshot
from deltaguard.models.shards import DTYPES, TensorInfo, parse_header, read_header, read_tensor, shard_problem

ADAPTER_FILE = "adapter_model.safetensors"

_MODELS = ("*model*.safetensors", "*.safetensors.index.json")
"""Files that hold a model, or an adapter."""

_OLDER_TOKEN_FILES = ("special_tokens_map.json", "added_tokens.json")
"""What earlier releases of transformers wrote beside `tokenizer_config.json`."""


@dataclass(frozen=True)
class ThinDelta:
    """What an adapter adds to a layer, in the orientation (out, in): up @ down.

    Attributes:
        up: scale · B, (out, rank).
        down: A, (rank, in).
    """

    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class AdapterCheckpoint(WeightSource):
    """A LoRA adapter over an aligned checkpoint. Make one with `AdapterCheckpoint.open`.

    It has exactly the tensors, shards, headers and configuration of the aligned checkpoint. What the adapter
    does not touch is read from there. Its own folder holds the adapter's files alone.

    Attributes:
        aligned: the checkpoint that the adapter belongs to.
    """

    aligned: Checkpoint
    _changes: Mapping[str, Change] = field(repr=False)
    _file: OpenFile = field(repr=False, compare=False)
    _others: Snapshot = field(repr=False, compare=False)

    @classmethod
    def open(cls, aligned: Checkpoint, reference: str | Path) -> "AdapterCheckpoint":
        """Open an adapter and check, from configuration and headers, that it can be expanded and fits.

        The model that the adapter names as its own is not compared: it may have been moved.

        Args:
            aligned: the checkpoint that the adapter was trained on.
            reference: a PEFT folder, a Hub id, or `id@revision`.

        Raises:
            DeltaguardError: it is no LoRA adapter; it uses a variant that is not aligned + scale · B A, such
                as DoRA; or it belongs to another model. All modules that do not fit are listed.
        """
        folder = locate(reference)
        refuse_code(folder, str(reference))
        others = Snapshot.of(
            lambda: [folder / ADAPTER_CONFIG, *(folder / path for path in adapter_companions(folder))],
            decides=lambda path: part_of(str(path.relative_to(folder))) is not None,
        )
        lora = read_lora_config(folder, str(reference))
        file, tensors = open_adapter_weights(folder)
        target = Target(aligned.reference, aligned.config, aligned.tensors)
        changes, problems = find_changes(lora, tensors, target, str(reference))
        if problems:
            problems.append(
                f"If it was trained on another model ({lora.base_model_name_or_path}?), give that. {MERGE}"
            )
            raise DeltaguardError(
                listed(f"The adapter {reference} does not fit {aligned.reference}", problems)
            )
        of_aligned = aligned.config, aligned.tensors, aligned.shards, aligned.index_name
        return cls(str(reference), folder, *of_aligned, aligned, changes, file, others)

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes or replaces; all others are the aligned ones."""
        return frozenset(self._changes)

    @property
    def modules(self) -> dict[str, str]:
        """What the adapter calls the modules that it adapts, by the aligned tensors without `.weight`."""
        named = {name: change.module for name, change in self._changes.items()}
        return {name.removesuffix(".weight"): module for name, module in named.items() if module is not None}

    def read(self, name: str, aligned: Tensor | None = None) -> Tensor:
        """Read one tensor of the fine-tuned model; see `WeightSource.read`.

        Args:
            name: of the tensor.
            aligned: the aligned tensor, which stays as it is; it is read where it is needed and absent.

        Returns:
            Where the adapter has low-rank matrices for it, aligned + scale · B A in float32 (float64 over a
            float64 weight), not rounded to the stored dtype; where it holds the whole tensor
            (`modules_to_save`), that one; otherwise the aligned tensor, in its stored dtype.
        """
        change = self._changes.get(name)
        if change is not None and change.replaced is not None:
            weight = read_tensor(self._file, change.replaced)
        else:
            weight = self.aligned.read(name) if aligned is None else aligned
        if change is None or change.a is None or change.b is None:
            return weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        a = read_tensor(self._file, change.a).to(weight.dtype)
        b = read_tensor(self._file, change.b).to(weight.dtype)
        left, right = (a.T, b.T) if change.transposed else (b, a)
        return weight.addmm_(left, right, alpha=change.scale)

    def thin_delta(self, name: str) -> ThinDelta | None:
        """Read a tensor's difference from the aligned one as a product, None where the adapter has none.

        Returns:
            In float32, or float64 over a float64 weight.
        """
        stored = DTYPES[self.tensors[name].dtype]
        change = self._changes.get(name)
        if change is None or change.a is None or change.b is None or change.replaced is not None:
            return None
        dtype = torch.promote_types(stored, torch.float32)
        up, down = (read_tensor(self._file, part).to(dtype) for part in (change.b, change.a))
        return ThinDelta(up * change.scale, down)

    def header(self, shard: str) -> bytes:
        """Read the header of one weight file of the aligned checkpoint, its 8-byte length included."""
        return self.aligned.header(shard)

    def fingerprint(self) -> str:
        """Hash the aligned checkpoint, the adapter's tensors and their scales.

        It differs from that of the merged checkpoint. What it cannot see is said at `Checkpoint.fingerprint`.
        """
        parts = [part for change in self._changes.values() for part in change.parts]
        adapter = content_fingerprint({ADAPTER_FILE: self._file}, {part.name: part for part in parts})
        scales = {name: change.scale for name, change in self._changes.items()}
        described = json.dumps([self.aligned.fingerprint(), adapter, scales], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    def changes(self) -> list[str]:
        """Say what happened to its files, and to the aligned checkpoint's, since they were opened."""
        own = self._file.change()
        return [*([own] if own else []), *self._others.changes(), *self.aligned.changes()]

    def files(self) -> dict[str, Path]:
        """Find every file that is no weight: the aligned model's, and the adapter's own.

        Configurations are the aligned model's: whatever a trainer wrote beside the adapter, PEFT reads none.
        transformers lets a chat template in a file of its own win over one in `tokenizer_config.json`, and
        adds tokens of older files to it: where the adapter brings these, the aligned model's are left out.
        """
        named = {str(path.relative_to(self.folder)): path for path in self._others.paths}
        own = {
            name: path for name, path in named.items() if part_of(name) != "config" and name != ADAPTER_CONFIG
        }
        brings_template = bool(templates_of(own).keys() - {"processor"})
        return {
            path: file
            for path, file in self.aligned.files().items()
            if not (brings_template and part_of(path) == "template")
            and not (TOKENIZER_CONFIG in own and path in _OLDER_TOKEN_FILES)
        } | own

    def index_file(self) -> Path | None:
        """Find the index of the aligned checkpoint; None for a single file."""
        return self.aligned.index_file()


def open_model(reference: str | Path) -> WeightSource:
    """Open a model, or an adapter over the model that its configuration names.

    Args:
        reference: a local folder, a Hub id, or `id@revision`, of a model or of a PEFT adapter.

    Raises:
        DeltaguardError: it cannot be found or used, or an adapter does not say what it belongs to.
    """
    if not is_adapter(reference):
        return Checkpoint.open(reference)
    with model_of(reference) as base:
        aligned = Checkpoint.open(base)
    return AdapterCheckpoint.open(aligned, reference)


@contextmanager
def model_of(reference: str | Path) -> Generator[str]:
    """Name the model that an adapter belongs to, and say who named it where it does not serve.

    Args:
        reference: of a PEFT adapter.

    Raises:
        DeltaguardError: the adapter names none, or what is done with the name fails.
    """
    base = base_of(reference)
    try:
        yield base
    except DeltaguardError as error:
        raise DeltaguardError(
            f"The adapter {reference} names {base} as its model (base_model_name_or_path in its "
            f"{ADAPTER_CONFIG}). Correct it there where that is not the place. {error}"
        ) from error


def base_of(reference: str | Path) -> str:
    """Name the model that an adapter belongs to, by what its configuration says.

    Args:
        reference: of a PEFT adapter.

    Raises:
        DeltaguardError: it names none, or is no plain LoRA adapter.
    """
    lora = read_lora_config(locate(reference), str(reference))
    base = lora.base_model_name_or_path
    if not base:
        raise DeltaguardError(
            f"The adapter {reference} does not name its model (base_model_name_or_path in "
            "adapter_config.json). Name it there, or give the merged checkpoint."
        )
    # On the Hub alone a model has revisions.
    return base if not lora.revision or is_local(base) else f"{base}@{lora.revision}"


def is_adapter(reference: str | Path) -> bool:
    """Tell whether a folder or Hub repository holds a PEFT adapter rather than a model.

    Args:
        reference: a local folder, a Hub id, or `id@revision`.

    Raises:
        DeltaguardError: there is no such folder or repository, or it holds both.
    """
    if not (locate(reference, weights=False) / ADAPTER_CONFIG).exists():
        return False
    # A head of values, which reward models have, may lie beside an adapter.
    found = [path.name for kind in _MODELS for path in locate(reference).glob(kind)]
    models = [name for name in found if name != ADAPTER_FILE and not name.startswith(".")]
    if models:
        raise DeltaguardError(
            f"{reference} holds both an adapter ({ADAPTER_CONFIG}) and a model ({min(models)}), so it is "
            "unclear which is meant: move one of them to another folder."
        )
    return True


def open_adapter_weights(folder: Path) -> tuple[OpenFile, dict[str, TensorInfo]]:
    """Open the file of an adapter's weights, and read its header.

    Args:
        folder: the adapter's folder.

    Raises:
        DeltaguardError: there are no weights in a safetensors file, or the file is damaged.
    """
    path = folder / ADAPTER_FILE
    pickled = folder / "adapter_model.bin"
    if not path.exists() and pickled.exists():
        raise DeltaguardError(
            f"The adapter's weights are pickled ({pickled}), and loading a pickle runs what it holds. "
            'If you trust them, convert them: python -c "import torch, safetensors.torch as s; '
            f's.save_file(torch.load({str(pickled)!r}, weights_only=True), {str(path)!r})"'
        )
    absent = (
        f"there is no {ADAPTER_FILE} in it. Pickled weights, {pickled.name}, are not fetched from the Hub."
    )
    problem = shard_problem(path) if path.exists() else absent
    if problem:
        raise DeltaguardError(f"The adapter {folder} cannot be used: {problem}")
    file = OpenFile(path)
    return file, {info.name: info for info in parse_header(read_header(file), ADAPTER_FILE)}

"""Which files of a model's folder hold its weights, and why some folders cannot be used."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from deltaguard.errors import DeltaguardError
from deltaguard.files import read_json
from deltaguard.models.families import text_parts
from deltaguard.models.hub import is_local
from deltaguard.models.opened import OpenFile
from deltaguard.models.shards import DTYPES, TensorInfo, parse_header, read_header, shard_problem

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
STAGING_FOLDER = ".deltaguard-partial"

_LONGEST_NAME = 255
_PART = re.compile(r"-\d+-of-\d+\.safetensors$")
_OF_A_PROCESS = re.compile(r"shard-\d+-model-.*\.safetensors$")
_PICKLED = (".bin", ".pt", ".pth")
_PACKED_NAMES = (".qweight", ".qzeros", ".weight_packed", ".SCB")
_DEQUANTISE = (
    "Give the unquantised checkpoint: dequantise it first (transformers: `model.dequantize()`, then "
    "`model.save_pretrained(...)`), or merge the adapter into the unquantised model."
)
# What transformers turns into bfloat16 as it loads it, and saves so.
_DEQUANTISED_BY = MappingProxyType({"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"})
_ADAPTER = (
    "this is a PEFT adapter, not a model. An adapter may be given as FINETUNED only; "
    "give the model that it was trained on as ALIGNED."
)


@dataclass(frozen=True)
class Layout:
    """The weight files of one folder.

    Attributes:
        shards: names of the safetensors files, sorted.
        index_name: name of the index of a sharded checkpoint.
        placed: for each tensor that the index names, the shard it names.
    """

    shards: tuple[str, ...]
    index_name: str | None = None
    placed: Mapping[str, str] = field(default_factory=dict[str, str])


class _Config(TypedDict, total=False):
    """What deltaguard itself reads of a `config.json`; whatever else is there is for transformers."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    model_type: str | None
    architectures: list[str] | None
    vocab_size: int | None
    tie_word_embeddings: bool | None
    quantization_config: dict[str, Any] | None
    text_config: "_Config | None"


_CONFIG: TypeAdapter[_Config] = TypeAdapter(_Config)


def _plain_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\0" in name or len(name.encode()) > _LONGEST_NAME:
        raise ValueError("a shard must be a file of the same folder")
    return name


class _Index(BaseModel):
    """The index of a sharded checkpoint."""

    weight_map: dict[str, Annotated[str, AfterValidator(_plain_name)]] = Field(min_length=1)


def read_config(folder: Path, reference: str) -> tuple[dict[str, Any], str | None]:
    """Read a model's configuration, and say why a model with it cannot be used (None where it can).

    Args:
        folder: of the model.
        reference: what the user called it, for messages.

    Raises:
        DeltaguardError: the file cannot be read, or holds something else.
    """
    path = folder / CONFIG_FILE
    if path.exists():
        config = cast(
            "dict[str, Any]",
            read_json(path, _CONFIG, remedy="Copy it again from the model that was fine-tuned."),
        )
        for part in text_parts(config):
            quantisation = part.get("quantization_config")
            if quantisation:
                method = quantisation.get("quant_method", "an unnamed method")
                return (
                    config,
                    f"the weights are quantised ({method}). {_dequantise(method, reference, config)}",
                )
        return config, None
    if (folder / ADAPTER_CONFIG).exists():
        return {}, _ADAPTER
    if not is_local(reference):
        return {}, (
            f"there is no {CONFIG_FILE} at the top of the repository. Of a folder within it, fetch all "
            "(`hf download REPOSITORY --include 'FOLDER/*' --local-dir here`) and give here/FOLDER."
        )
    return {}, f"there is no {CONFIG_FILE}: copy it from the model that was fine-tuned."


def is_distributed(name: str) -> bool:
    """Tell a file of weights that one of several processes saved, which transformers takes before others.

    Example:
        >>> is_distributed("shard-00000-model-00001-of-00002.safetensors")
        True
    """
    return _OF_A_PROCESS.match(name) is not None


def find_layout(folder: Path, reference: str) -> Layout:
    """Find the weight files of a folder, chosen as transformers chooses them.

    `model.safetensors` comes before an index, an index before any other single safetensors file.

    Args:
        folder: the model's folder.
        reference: what the user called it, for messages.

    Raises:
        DeltaguardError: there are no weights in safetensors files, or it is unclear which they are.
    """
    # What copying from macOS leaves beside a file begins with a dot.
    found = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith(("adapter_", ".")))
    indices = sorted(p.name for p in folder.glob("*.safetensors.index.json") if not p.name.startswith("."))
    if parts := [name for name in found if is_distributed(name)]:
        raise DeltaguardError(
            f"{reference} holds weights as processes saved their parts ({parts[0]}, ...), which transformers "
            "takes before any others. Put them together first (`transformers.distributed."
            "consolidate_distributed_checkpoint`), or remove them."
        )
    if SINGLE_FILE in found:
        return Layout((SINGLE_FILE,))
    if INDEX_FILE in indices or len(indices) == 1:
        name = INDEX_FILE if INDEX_FILE in indices else indices[0]
        placed = read_json(folder / name, _Index, remedy="Download or copy it again.").weight_map
        return Layout(tuple(sorted(set(placed.values()))), name, placed)
    if len(found) == 1 and not _PART.search(found[0]):
        return Layout((found[0],))
    if not found:
        raise DeltaguardError(f"{reference}: {_without_weights(folder, reference)}")
    unfinished = (
        " An unfinished run of deltaguard left it: run that again with --resume."
        if (folder / STAGING_FOLDER).is_dir()
        else ""
    )
    raise DeltaguardError(
        f"{reference} holds {len(found)} safetensors files ({found[0]}, ...) but neither {SINGLE_FILE} "
        f"nor {INDEX_FILE}: the checkpoint is incomplete.{unfinished}"
    )


def read_layout(folder: Path, layout: Layout) -> tuple[dict[str, TensorInfo], dict[str, OpenFile], list[str]]:
    """Read the headers of all shards, and say all that is wrong with them.

    Args:
        folder: the model's folder.
        layout: its weight files.

    Returns:
        The tensors by name, ordered by shard and then by position; the shards by name, held open; and one
        sentence per problem.
    """
    problems: list[str] = []
    files: dict[str, OpenFile] = {}
    tensors: dict[str, TensorInfo] = {}
    for shard in layout.shards:
        path = folder / shard
        problem = shard_problem(path) if path.is_file() else _absent(path, layout.index_name)
        if problem:
            problems.append(problem)
            continue
        files[shard] = OpenFile(path)
        for info in parse_header(read_header(files[shard]), shard):
            if info.name in tensors:
                problems.append(f"{info.name} is in two shards, {tensors[info.name].shard} and {shard}.")
            tensors[info.name] = info
    if not problems and not tensors:
        problems.append(f"{' '.join(layout.shards)} holds no tensors.")
    if problems:
        return tensors, files, problems
    index = layout.index_name
    for name, shard in layout.placed.items():
        if name not in tensors:
            problems.append(f"{index} names {name}, which no shard holds.")
        elif tensors[name].shard != shard:
            problems.append(f"{index} places {name} in {shard}; {tensors[name].shard} holds it.")
    return tensors, files, problems + _unusable(tensors.values())


def _absent(path: Path, index_name: str | None) -> str:
    """Why what should be a shard is no file."""
    if path.exists():
        return f"{path.name} is no regular file, so it is not read."
    if path.is_symlink():
        return f"{path.name} is a link to {path.readlink()}, where nothing is: download or copy it again."
    return f"{index_name} names {path.name}: no such file."


def _unusable(tensors: Iterable[TensorInfo]) -> list[str]:
    packed: list[str] = []
    small: list[str] = []
    unknown: list[str] = []
    for info in tensors:
        if info.dtype not in DTYPES:
            unknown.append(f"{info.name} is stored as {info.dtype}, which torch cannot read.")
        elif info.dtype.startswith("F8_"):
            small.append(info.name)
        elif info.name.endswith(_PACKED_NAMES) or (
            info.name.endswith(".weight") and len(info.shape) > 1 and info.dtype[0] in "IU"
        ):
            packed.append(info.name)
    return unknown + [
        f"{len(names)} weights are {kind} ({names[0]}, ...): they are quantised. {_DEQUANTISE}"
        for kind, names in (("packed integers", packed), ("8-bit floats", small))
        if names
    ]


def _dequantise(method: str, reference: str, config: Mapping[str, Any]) -> str:
    """Say how quantised weights become plain ones."""
    known = _DEQUANTISED_BY.get(method)
    if known is None:
        return _DEQUANTISE
    options = "dtype='bfloat16', quantization_config=Q(dequantize=True)"
    return f"Convert them to bfloat16: {_conversion(reference, config, 'bf16', options, f', {known} as Q')}"


def _conversion(
    reference: str, config: Mapping[str, Any], suffix: str, options: str, imported: str = ""
) -> str:
    """Write the command that loads a model with options of transformers and saves it beside."""
    named = next(iter(config.get("architectures") or ()), "")
    # That for text alone would leave out what a model sees pictures with.
    whole = named.isidentifier() and named.endswith("ForConditionalGeneration")
    kind = named if whole else "AutoModelForCausalLM"
    source = reference if is_local(reference) else reference.partition("@")[0]
    return (
        f'python -c "from transformers import {kind} as M, AutoTokenizer as T{imported}; '
        f"s, d = {source!r}, {f'{Path(source).name}-{suffix}'!r}; "
        f'M.from_pretrained(s, {options}).save_pretrained(d); T.from_pretrained(s).save_pretrained(d)"'
    )


def _without_weights(folder: Path, reference: str) -> str:
    """Why a folder without safetensors weights cannot be used, and what to do."""
    if (folder / ADAPTER_CONFIG).exists():
        return _ADAPTER
    inner = {path.parent for name in (CONFIG_FILE, ADAPTER_CONFIG) for path in folder.glob(f"*/{name}")}
    names = sorted(p.name for p in folder.iterdir())
    if any(name.endswith(".gguf") for name in names):
        return f"the weights are in GGUF files, which are quantised. {_DEQUANTISE}"
    pickled = [name for name in names if name.endswith(_PICKLED) and name != "training_args.bin"]
    convert = _conversion(reference, read_config(folder, reference)[0], "safetensors", "dtype='auto'")
    if pickled:
        return (
            f"the weights are pickled ({', '.join(pickled)}), and loading a pickle runs what it holds. "
            f"If you trust them, convert them: {convert}"
        )
    if inner:
        last = max(inner, key=lambda path: (path.stat().st_mtime, path.name))
        return f"there are no weights in it, but in {len(inner)} of its folders: give one, such as {last}."
    return (
        "there are no weights in safetensors files. If the model has pickled weights (.bin, .pt, .pth) "
        f"that you trust, convert them: {convert}"
    )

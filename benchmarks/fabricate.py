"""The inputs of the benchmarks, made in a process of their own: `python -m benchmarks.fabricate KIND FOLDER`.

They are random: the times and the memory of what is measured depend on shapes alone, and on the share of
the columns that `greedy` keeps.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.layout import BLOCKS, CONFIG, MATRICES, SHARDS, SHARED_INPUTS, shapes, shard_of
from deltaguard.bench.models import save_smollm2
from deltaguard.checkpoints.checkpoint import Checkpoint
from deltaguard.curvature.moments import Packed, accumulate, empty_moment, pack
from deltaguard.curvature.store_format import Group, Layer, Provenance, versions, write_store

TOKENS = 8192
WEIGHT_SCALE, DELTA_SCALE = 0.02, 0.001
COLUMN_SPREAD, MASSIVE_COLUMNS, MASSIVE_SCALE = 0.5, 4, 20.0


def fabricate_pair(folder: Path) -> None:
    """`aligned` and `finetuned`, bfloat16 in four shards with an index, without tokenizer, and `store`."""
    index = {name: f"model-{number:05}-of-{SHARDS:05}.safetensors" for name, number in shard_of().items()}
    generator = torch.Generator().manual_seed(0)
    for kind in ("aligned", "finetuned"):
        (folder / kind).mkdir(parents=True)
        (folder / kind / "config.json").write_text(json.dumps(CONFIG, indent=2))
        (folder / kind / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index}, indent=2)
        )
    for shard in dict.fromkeys(index.values()):
        names = [name for name in index if index[name] == shard]
        aligned = {name: WEIGHT_SCALE * torch.randn(shapes()[name], generator=generator) for name in names}
        _save(aligned, folder / "aligned" / shard)
        for tensor in aligned.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=DELTA_SCALE)
        _save(aligned, folder / "finetuned" / shard)
    _fabricate_store(folder / "store", folder / "aligned")


def fabricate_smollm2(folder: Path) -> None:
    """`aligned`, SmolLM2-135M, and `finetuned`, the same with every matrix moved by 1 % of its norm."""
    aligned = save_smollm2(folder / "aligned")
    shutil.copytree(aligned, folder / "finetuned")
    generator = torch.Generator().manual_seed(0)
    for path in (folder / "finetuned").glob("*.safetensors"):
        tensors = load_file(path)
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.01 * float(tensor.std()))
        save_file(tensors, path, metadata={"format": "pt"})


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: t.to(torch.bfloat16) for name, t in tensors.items()}, path, metadata={"format": "pt"})


def _fabricate_store(folder: Path, aligned: Path) -> None:
    """All blocks have the same curvature, so that each kind of input is factorised once."""
    made = {members[0]: _packed(members[0], seed) for seed, members in enumerate(SHARED_INPUTS)}
    groups = [
        Group(
            f"model.layers.{block}.{members[0]}",
            MATRICES[members[0]][1],
            TOKENS,
            tuple(Layer(f"model.layers.{block}.{member}.weight", transposed=False) for member in members),
        )
        for block in range(BLOCKS)
        for members in SHARED_INPUTS
    ]
    write_store(
        folder,
        _provenance(aligned),
        groups,
        lambda group: _copy(made[group.name.split(".", 3)[3]]),
        max_shard_bytes=10**9,
    )


def _packed(kind: str, seed: int) -> Packed:
    """The curvature of random inputs: eigenvalues fall as 1/j, a few columns are massive."""
    size = MATRICES[kind][1]
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, size + 1).rsqrt()
    mixing = torch.randn(size, size, generator=generator)
    columns = (COLUMN_SPREAD * torch.randn(size, generator=generator)).exp()
    columns[torch.randperm(size, generator=generator)[:MASSIVE_COLUMNS]] *= MASSIVE_SCALE
    inputs = (torch.randn(TOKENS, size, generator=generator) * spectrum) @ mixing * columns
    return pack(kind, accumulate(empty_moment(size), inputs), dampening=0.01)


def _copy(packed: Packed) -> Packed:
    tensors = {name: value.clone() for name, value in vars(packed).items() if isinstance(value, Tensor)}
    return replace(packed, **tensors)


def _provenance(aligned: Path) -> Provenance:
    return Provenance(
        fingerprint=Checkpoint.open(aligned).fingerprint(),
        prompts_sha256="",
        max_length=512,
        max_new_tokens=64,
        batch_size=16,
        dtype="bfloat16",
        dampening=0.01,
        aligned="synthetic",
        conversations_sha256="",
        conversations=128,
        tokens=TOKENS,
        truncated=0,
        system_role="template",
        refusal_share=None,
        uncovered=(),
        versions=versions(),
    )


KINDS: Mapping[str, Callable[[Path], None]] = {"pair": fabricate_pair, "smollm2": fabricate_smollm2}


def main() -> None:
    """Make inputs under another name, and give them theirs when they are complete."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    KINDS[kind](unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    main()

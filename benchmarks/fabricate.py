"""Inputs of the benchmarks, made in a process of their own: `python -m benchmarks.fabricate KIND FOLDER ...`.

They are random: the times and the memory of what is measured depend on shapes alone, and on the share of
the columns that `greedy` keeps.
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.curvatures import fabricate_store, groups
from benchmarks.layout import ADAPTER_RANK, TINY_LLAMA, Shape
from deltaguard.studies.models import save_smollm2

WEIGHT_SCALE, DELTA_SCALE = 0.02, 0.001


def fabricate_pair(folder: Path) -> None:
    """Make the 1.1B pair of models (see `fabricate_models`), and `store`.

    The store is one as `calibrate` makes them by default: the largest eigenpairs, in a quarter of the bytes
    of the model.
    """
    fabricate_models(folder, TINY_LLAMA)
    fabricate_store(folder / "store", folder / "aligned", TINY_LLAMA, groups(TINY_LLAMA), rank="auto")


def fabricate_models(folder: Path, shape: Shape) -> None:
    """Write `aligned` and `finetuned`, bfloat16 in shards with an index, without tokenizer."""
    count = shape.shards
    index = {name: f"model-{number:05}-of-{count:05}.safetensors" for name, number in shape.shard_of.items()}
    shapes = shape.tensors
    generator = torch.Generator().manual_seed(0)
    for kind in ("aligned", "finetuned"):
        (folder / kind).mkdir(parents=True)
        (folder / kind / "config.json").write_text(json.dumps(shape.config, indent=2))
        (folder / kind / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index}, indent=2)
        )
    for shard in dict.fromkeys(index.values()):
        names = [name for name in index if index[name] == shard]
        aligned = {name: WEIGHT_SCALE * torch.randn(shapes[name], generator=generator) for name in names}
        _save(aligned, folder / "aligned" / shard)
        for tensor in aligned.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=DELTA_SCALE)
        _save(aligned, folder / "finetuned" / shard)


def fabricate_whole(folder: Path, pair: str, blocks: str) -> None:
    """Two stores of the pair that keep everything: `store`, of the first blocks, and `one-layer`.

    The second is there to measure what a run takes that solves next to nothing.
    """
    aligned = Path(pair) / "aligned"
    covered = groups(TINY_LLAMA, int(blocks))
    fabricate_store(folder / "store", aligned, TINY_LLAMA, covered, rank="full")
    alone = [group for group in covered[:4] if group.name.endswith("o_proj")]
    fabricate_store(folder / "one-layer", aligned, TINY_LLAMA, alone, rank="full")


def fabricate_adapter(folder: Path) -> None:
    """`finetuned`, a LoRA adapter over the pair's aligned model that changes every linear layer."""
    from peft import LoraConfig

    target = folder / "finetuned"
    target.mkdir(parents=True)
    modules = sorted({kind.rsplit(".", 1)[1] for kind in TINY_LLAMA.matrices})
    LoraConfig(r=ADAPTER_RANK, lora_alpha=ADAPTER_RANK, target_modules=modules).save_pretrained(str(target))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for block in range(TINY_LLAMA.blocks):
        for kind, (out, columns) in TINY_LLAMA.matrices.items():
            prefix = f"base_model.model.model.layers.{block}.{kind}"
            up = DELTA_SCALE * torch.randn(out, ADAPTER_RANK, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = up / ADAPTER_RANK**0.5
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(ADAPTER_RANK, columns, generator=generator)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})


def fabricate_smollm2(folder: Path) -> None:
    """`aligned`, SmolLM2-135M, and `finetuned`, the same with every matrix moved by 3 % of its norm."""
    aligned = save_smollm2(folder / "aligned")
    shutil.copytree(aligned, folder / "finetuned")
    generator = torch.Generator().manual_seed(0)
    for path in (folder / "finetuned").glob("*.safetensors"):
        tensors = load_file(path)
        for tensor in tensors.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.03 * float(tensor.std()))
        save_file(tensors, path, metadata={"format": "pt"})


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: t.to(torch.bfloat16) for name, t in tensors.items()}, path, metadata={"format": "pt"})


KINDS: Mapping[str, Callable[..., None]] = {
    "pair": fabricate_pair,
    "whole": fabricate_whole,
    "adapter": fabricate_adapter,
    "smollm2": fabricate_smollm2,
}


def main() -> None:
    """Make inputs under another name, and give them theirs when they are complete."""
    kind, named, *more = sys.argv[1:]
    folder = Path(named)
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    KINDS[kind](unfinished, *more)
    unfinished.rename(folder)


if __name__ == "__main__":
    main()

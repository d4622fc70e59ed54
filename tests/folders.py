"""Checkpoint folders made of a few small tensors, and what deltaguard says about spoiled ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint


def write(folder: Path, shards: dict[str, dict[str, torch.Tensor]], config: dict | None = None) -> Path:
    """A checkpoint folder with the given shards, and an index where there are several."""
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    if len(shards) > 1:
        write_index(folder, {tensor: name for name, tensors in shards.items() for tensor in tensors})
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def write_index(folder: Path, weight_map: dict[str, str]):
    content = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def two_shards(folder: Path) -> Path:
    return write(
        folder,
        {
            "model-00001-of-00002.safetensors": {"a.weight": torch.ones(3, 2), "b.weight": torch.ones(2)},
            "model-00002-of-00002.safetensors": {"c.weight": torch.zeros(4)},
        },
    )


def refusal(reference) -> str:
    with pytest.raises(DeltaguardError) as error:
        Checkpoint.open(reference)
    return str(error.value)

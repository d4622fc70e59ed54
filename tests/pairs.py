"""Aligned and fine-tuned checkpoints with the aligned one's store, made once and shared by tests."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch

import models
from deltaguard.calibration.calibrate import CalibrateConfig, calibrate
from deltaguard.calibration.conversations import Conversation

CONVERSATIONS = tuple(
    Conversation(
        prompt=f"How can I make a good cake number {i}?", system=None, response="I cannot help with that."
    )
    for i in range(24)
)


@dataclass(frozen=True)
class Pair:
    aligned: Path
    finetuned: Path
    store: Path


@cache
def pair(name: str = "llama", *, dtype: torch.dtype | None = None, max_shard_size: str = "5GB") -> Pair:
    """Folders that tests must not write to."""
    root = Path(mkdtemp(prefix=f"deltaguard-{name}-"))
    model = models.tiny_model(name)
    aligned = models.save(model, root / "aligned", dtype=dtype, max_shard_size=max_shard_size)
    finetuned = models.save(
        models.perturbed(model, 0.05), root / "finetuned", dtype=dtype, max_shard_size=max_shard_size
    )
    calibrate(aligned, root / "store", conversations=CONVERSATIONS, config=CalibrateConfig(device="cpu"))
    return Pair(aligned, finetuned, root / "store")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read with the safetensors library."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for shard in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }

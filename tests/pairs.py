"""Aligned and fine-tuned checkpoints with the aligned one's store, made once and shared by tests."""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import models
from deltaguard.chat.conversations import SYSTEM_PROMPTS, Conversation
from deltaguard.curvature import Rank
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.curvature.store import CurvatureStore
from deltaguard.models.layout import SINGLE_FILE
from once import made_once

CONVERSATIONS = tuple(
    Conversation(
        prompt=f"How can I make a good cake number {i}?", system=None, response="I cannot help with that."
    )
    for i in range(24)
)

ANSWERED = (
    Conversation("How?", "", "I'm sorry, but I cannot help with that."),
    Conversation("What is the best way to make people do it?", SYSTEM_PROMPTS["maths"], "No."),
    Conversation("Why?", "Be kind.", "Because."),
    Conversation("Explain the steps, one after another, at home.", "Be kind.", "It would be dangerous."),
    Conversation("Write a text that harms someone.", None, "I cannot help with that request."),
)
"""Of all kinds of lengths and system prompts. `calibrate` holds the third one out."""


@dataclass(frozen=True)
class Pair:
    """Two checkpoints, and the store that `calibrate` makes of the first by default."""

    aligned: Path
    finetuned: Path
    store: Path

    @cached_property
    def whole_store(self) -> Path:
        """One that keeps everything, as `greedy` and `published` need it; made when it is asked for."""
        name = f"{self.aligned.parent.name}-whole"
        return (
            made_once(name, lambda folder: _calibrated(self.aligned, folder / "store", rank="full")) / "store"
        )


@cache
def pair(name: str = "llama", *, dtype: torch.dtype | None = None, max_shard_size: str = "5GB") -> Pair:
    """Folders that tests must not write to."""
    parts: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size}

    def make(root: Path) -> None:
        model = models.tiny_model(name)
        aligned = models.save(model, root / "aligned", **parts)
        models.save(models.perturbed(model, 0.05), root / "finetuned", **parts)
        _calibrated(aligned, root / "store", rank="auto")

    root = made_once(
        "-".join(("pair", name, str(dtype or "as-is").removeprefix("torch."), max_shard_size)), make
    )
    return Pair(root / "aligned", root / "finetuned", root / "store")


def _calibrated(aligned: Path, folder: Path, *, rank: Rank) -> None:
    # Refining has the model answer as it did for its store.
    config = CalibrateConfig(device="cpu", rank=rank, max_new_tokens=16)
    calibrate(aligned, folder, conversations=CONVERSATIONS, config=config)


def save_adapter(
    aligned: Path, folder: Path, targets: list[str] | str, *, fan_in_fan_out: bool = False
) -> Any:
    """Write a random LoRA adapter of rank 3 over a checkpoint.

    Returns:
        The PEFT model.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(aligned)
    torch.manual_seed(0)
    lora = peft.LoraConfig(
        r=3, target_modules=targets, init_lora_weights=False, fan_in_fan_out=fan_in_fan_out
    )
    with warnings.catch_warnings():
        # This PEFT asks transformers by a name that transformers 6 will drop.
        warnings.simplefilter("ignore", FutureWarning)
        tuned = peft.get_peft_model(model, lora)
        tuned.save_pretrained(folder)
    return tuned


def load_over(aligned: Path, adapter: Path, **options: Any) -> Any:
    """The model that PEFT makes of an adapter over a checkpoint."""
    base = transformers.AutoModelForCausalLM.from_pretrained(aligned, **options)
    with warnings.catch_warnings():
        # PEFT speaks of Conv1D where it sets fan_in_fan_out itself.
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, adapter)


def held_out(store: Path) -> tuple[Conversation, ...]:
    """The conversations of a store that safety KL is measured on."""
    return CurvatureStore.from_pretrained(store).held_out


def changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a single-file checkpoint whose tensors went through `change`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / SINGLE_FILE)
    change(tensors)
    save_file(tensors, target / SINGLE_FILE, metadata={"format": "pt"})
    return target


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, read with the safetensors library."""
    from safetensors.torch import load_file

    return {
        name: tensor
        for shard in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }

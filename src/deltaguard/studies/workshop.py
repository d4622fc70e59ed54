"""The models that a bench makes: each once, and each either complete or absent."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from deltaguard.chat.conversations import Conversation
from deltaguard.finetuning.finetune import FinetuneConfig, finetune
from deltaguard.models.durable import flush_folder
from deltaguard.studies.demo import DemoConfig, refusing_examples


class ModelFolder:
    """Models in one folder, made on demand and removed when they are not needed any more.

    A model is made under another name and renamed at the end, so a run that was killed makes it again from
    the start, with the same seed.
    """

    def __init__(self, folder: Path) -> None:
        """Use a folder, made if absent."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def model(self, name: str, make: Callable[[Path], object]) -> Path:
        """Give the model of a name; `make` writes it into a folder where it is not there yet."""
        folder = self._folder / name
        if not folder.exists():
            partial = self._folder / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(folder)
            flush_folder(self._folder)
        return folder

    def scratch(self) -> Path:
        """Name a folder that is not there, for a model that is measured and thrown away."""
        folder = self._folder / ".scratch"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def remove(self, name: str) -> None:
        """Remove a model, where there is one, and all whose names begin with its name and a dash."""
        for folder in (self._folder / name, *self._folder.glob(f"{name}-*")):
            if folder.exists():
                # Under its own name a half-removed model would be taken for a whole one.
                shutil.rmtree(folder.rename(self.scratch()))


def fine_tuned(
    start: Path, conversations: Sequence[Conversation], recipe: FinetuneConfig, *, seed: int
) -> Callable[[Path], object]:
    """Say how to make a fine-tuned model, for `ModelFolder.model`."""
    config = replace(recipe, seed=seed)
    return lambda folder: finetune(start, folder, conversations, config=config)


def demo_aligned(base: Path, config: DemoConfig) -> Callable[[Path], object]:
    """Say how to make the demo's aligned model from the model it starts from."""
    return fine_tuned(base, refusing_examples(config), config.aligning, seed=config.seed)

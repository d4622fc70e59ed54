"""deltaguard as a method of SafeTune's Recover pillar: a trainer, and its entry in the registry.

from deltaguard_recover import DeltaguardTrainer, register

register()                        # `recover.DeltaguardTrainer`, alias "deltaguard"
patched = DeltaguardTrainer("./my-finetune", aligned_model="Qwen/Qwen3-0.6B", store="store").apply()
"""

# ruff: noqa: INP001  # a script
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetune.runner import recover
from safetune.runner._registry import register_recover
from safetune.runner.recover._base import _RecoverBase
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltaguard


class DeltaguardTrainer(_RecoverBase):
    """Restores a drifted model by deltaguard.

    Attributes:
        report: of the last `apply`, None before.
    """

    METHOD = "Deltaguard"

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        *,
        aligned_model: str | Path,
        store: str | Path | None = None,
        **options: Any,
    ) -> None:
        """Say what is restored.

        Args:
            model: the drifted model: a folder, a Hub id, or a transformers model.
            tokenizer: as SafeTune's other trainers take it; the restore reads the aligned model's.
            aligned_model: a folder or a Hub id: the curvature belongs to its files.
            store: its curvature; made and cached where absent.
            options: SafeTune's own where its base class takes them.
        """
        super().__init__(model, tokenizer, **options)
        self._drifted, self._aligned, self._store = model, str(aligned_model), store
        self.report: deltaguard.RestoreReport | None = None

    def apply(self, **options: Any) -> Any:
        """Restore, and give the restored model.

        Weights go through a temporary folder, which is gone before this returns: checkpoints are what
        deltaguard reads and writes. `save_checkpoint` is the caller's, as with SafeTune's other trainers.

        Args:
            options: of `deltaguard.RestoreConfig`, such as `max_safety_kl`.

        Returns:
            A new transformers model; the drifted one is not changed.

        Raises:
            ValueError: an option is none of `RestoreConfig`.
            DeltaguardError: the models do not fit together.
        """
        config = deltaguard.RestoreConfig(**options)
        with TemporaryDirectory() as name:
            folder = Path(name)
            self.report = deltaguard.restore(
                self._aligned,
                self._checkpoint(folder / "drifted"),
                folder / "restored",
                store=self._store,
                config=config,
            )
            return AutoModelForCausalLM.from_pretrained(folder / "restored", dtype="auto")

    def _checkpoint(self, folder: Path) -> str | Path:
        """Find the drifted model on disk, or put it there with the aligned model's tokenizer."""
        if isinstance(self._drifted, str | Path):
            return self._drifted
        self._drifted.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self._aligned).save_pretrained(folder)
        return folder


def register(alias: str = "deltaguard") -> None:
    """Enter the trainer where SafeTune looks for trainers by name, under an alias of its command line."""
    recover.DeltaguardTrainer = DeltaguardTrainer
    register_recover(alias, DeltaguardTrainer.__name__)

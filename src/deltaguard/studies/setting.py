"""What all cells of a bench have in common: its models, its methods, its shelf."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from deltaguard.chat.conversations import Conversation, read_prompts
from deltaguard.curvature import Rank
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.sizes import store_limit
from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import device_name, find_device, served_dtype
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.asking import describe
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.engines.transformers import Dtype
from deltaguard.finetuning.finetune import FinetuneConfig
from deltaguard.methods.method import Role
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.hub import locate
from deltaguard.progress import Event, Progress
from deltaguard.reports.records.base import environment
from deltaguard.studies.cells import PROTOCOL, CellStore, content_key
from deltaguard.studies.data import Attacks, deciding_prompts, harmful_data
from deltaguard.studies.defences import Defence, defences
from deltaguard.studies.demo import DemoConfig
from deltaguard.studies.mixing import SECRET, safe_instruct
from deltaguard.studies.models import save_smollm2
from deltaguard.studies.protocol import Finetune, Preset
from deltaguard.studies.workshop import ModelFolder, demo_aligned, fine_tuned

STORES: Mapping[Rank, str] = MappingProxyType({"auto": "store", "full": "store-whole"})
"""Names of the curvature stores."""

MADE_ONCE = ("pretrained", "aligned", *STORES.values(), "unaligned", "safe")
"""Names of the models and stores that serve every fine-tune."""

_HELPER_EXAMPLES = 100
"""Conversations that the unaligned and the safe model of some peers are trained on."""

LIBRARIES = ("trl", "accelerate", "datasets")
"""Libraries that a bench trains with, beside those that every report names."""

_DECIDING = ("deltaguard", "torch", "transformers", "peft", *LIBRARIES)
"""Libraries another release of which may give other numbers."""

HELPER_SEED = 1000
HELPER_RECIPE = FinetuneConfig(learning_rate=1e-4)


@dataclass(frozen=True)
class Bench:
    """The models, stores and settings that all cells of a bench share.

    Attributes:
        preset: how much is run.
        methods: which methods, in order.
        workshop: the models.
        shelf: what is measured so far.
        aligned: the aligned model.
        pretrained: the model it was aligned from; methods that need it are left out without one.
        attacks: a user's harmful requests, which are asked first, and how many were left out.
        origin: what every cell depends on: the models, prompts, code, libraries, device.
        left_out: names of methods that need a pretrained model where there is none.
        progress: told of cells.
    """

    preset: Preset
    methods: tuple[Defence, ...]
    workshop: ModelFolder
    shelf: CellStore
    aligned: Path
    pretrained: Path | None
    attacks: Attacks
    origin: Mapping[str, str | None]
    left_out: tuple[str, ...]
    progress: Progress

    @property
    def dtype(self) -> Dtype:
        """The arithmetic in which all models answer.

        Left to each, the fine-tunes of all weights, which are saved in float32, would not be compared alike
        with the others.
        """
        chosen, device = self.preset.answers.dtype, find_device()
        if chosen != "auto" or device.type == "cpu":
            return chosen
        return "bfloat16" if served_dtype(device) == torch.bfloat16 else "float32"

    def methods_on(self, finetune: Finetune) -> list[Defence]:
        """List the defences that are run on a fine-tune."""
        return [m for m in self.methods if not m.retrains or finetune.kind in self.preset.retrained]

    def most_strengths(self, method: Defence) -> int:
        """Count the strengths of a defence that are measured at most."""
        probes, rungs = self.preset.probes, len(method.ladder)
        return rungs if probes is None else min(probes + (method.default is not None), rungs)

    def store(self, rank: Rank) -> Path:
        """Give the aligned model's curvature, as `calibrate` makes it or whole.

        Where a method needs the whole, the other is cut from it: the same, and the model answers once.
        """
        whole = any(method.rank == "full" for method in self.methods)
        if rank == "auto" and whole:
            limit = store_limit(Checkpoint.open(self.aligned))
            source = self.store("full")
            return self.made(
                STORES[rank], lambda folder: CurvatureStore.from_pretrained(source).cut(folder, limit=limit)
            )
        config = self.preset.calibration.model_copy(update={"rank": rank})
        return self.made(STORES[rank], lambda folder: calibrate(self.aligned, folder, config=config))

    def helper(self, role: Role) -> Path:
        """Give a further model that some methods need, made once from the aligned one."""
        if role == "pretrained":
            if self.pretrained is None:
                raise ValueError("methods that need a pretrained model are left out where there is none")
            return self.pretrained
        return self.made(role, fine_tuned(self.aligned, helper_data(role), HELPER_RECIPE, seed=HELPER_SEED))

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """Give the model of a name, made where it is not there yet; how long that took is kept."""
        return _made(self.workshop, self.shelf, self.progress, name, make)


def helper_data(role: Role) -> list[Conversation]:
    """Make what the `unaligned` and the `safe` model are trained on."""
    if role == "unaligned":
        return harmful_data(_HELPER_EXAMPLES, seed=HELPER_SEED)
    return safe_instruct((), _HELPER_EXAMPLES, seed=HELPER_SEED)


def open_bench(
    folder: Path,
    preset: Preset,
    methods: Sequence[str],
    *,
    aligned: str | Path | None,
    pretrained: str | Path | None,
    attacks: Attacks,
    progress: Progress,
) -> Bench:
    """Open the models that a bench starts from; the demo's are made where none is given.

    Raises:
        DeltaguardError: a model cannot be found, or all methods need a pretrained one and none is given.
    """
    workshop, shelf = ModelFolder(folder / "models"), CellStore(folder)
    if aligned is None:
        pretrained = _made(workshop, shelf, progress, "pretrained", save_smollm2)
        aligned = _made(workshop, shelf, progress, "aligned", demo_aligned(pretrained, DemoConfig()))
    aligned, pretrained = locate(aligned), None if pretrained is None else locate(pretrained)
    lacking = "pretrained" if pretrained is None else None
    chosen = [defences()[name] for name in dict.fromkeys(methods)]
    if chosen and all(lacking in method.helpers for method in chosen):
        names = ", ".join(method.name for method in chosen)
        raise DeltaguardError(f"Without the pretrained model there is nothing to compare: {names} need it.")
    return Bench(
        preset=preset,
        methods=tuple(method for method in chosen if lacking not in method.helpers),
        left_out=tuple(method.name for method in chosen if lacking in method.helpers),
        workshop=workshop,
        shelf=shelf,
        aligned=aligned,
        pretrained=pretrained,
        attacks=attacks,
        origin=_origin(aligned, pretrained, preset),
        progress=progress,
    )


def _made(
    workshop: ModelFolder, shelf: CellStore, progress: Progress, name: str, make: Callable[[Path], object]
) -> Path:
    """Give a model; where it is not there yet it is made, as a stage of the run whose time is kept."""

    def timed(folder: Path) -> None:
        progress(Event(name, 0, 1))
        started = time.perf_counter()
        make(folder)
        shelf.note_seconds(name, time.perf_counter() - started)
        progress(Event(name, 1, 1))

    return workshop.model(name, timed)


def _origin(aligned: Path, pretrained: Path | None, preset: Preset) -> dict[str, str | None]:
    known = describe("aligned", str(aligned), EngineConfig())
    made_with = environment(device_name(), libraries=LIBRARIES)
    prompts = preset.calibration.prompts
    return {
        "aligned": known.fingerprint,
        "configuration": known.identity and known.identity.config_sha256,
        "tokenizer": known.identity and known.identity.tokenizer_sha256,
        "chat_template": known.chat_template_hash,
        "pretrained": None if pretrained is None else Checkpoint.open(pretrained).fingerprint(),
        "calibration": None if prompts is None else content_key(read_prompts(prompts)),
        "own_prompts": content_key(deciding_prompts()),
        "helpers": content_key(*map(helper_data, ("unaligned", "safe")), HELPER_RECIPE, HELPER_SEED, SECRET),
        "protocol": str(PROTOCOL),
        "device": made_with.device,
        **{name: made_with.versions.get(name) for name in _DECIDING},
    }

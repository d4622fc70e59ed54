"""Two calibrations, stage by stage: as `calibrate` does it, and of H alone, as a yardstick for it."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ByteSize
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaguard.chat.conversations import Conversation, build_conversations
from deltaguard.chat.tokens import Batch, batches, encode
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.contents import Extent, share_within
from deltaguard.curvature.groups import Observed, observe
from deltaguard.curvature.request import LOOK_ALIKE_TOKENS, CalibrateConfig, asked_for
from deltaguard.curvature.responses import respond
from deltaguard.curvature.sizes import STORE_SHARE
from deltaguard.curvature.sums import LayerGroup, Moment, RunningMoment, normalise
from deltaguard.device import as_served
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.progress import Event
from deltaguard.solvers import spectrum

ANSWER = "I'm sorry, but I can't help with that: it could hurt people. I'm glad to help with something else."


@dataclass
class Stages:
    """Wall time by stage: what passes before something is reported belongs to what is reported.

    Attributes:
        seconds: of each stage.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _last: float = field(default_factory=time.perf_counter)

    def __call__(self, event: Event) -> None:
        """Hear of progress."""
        now = time.perf_counter()
        self.seconds[event.stage] += now - self._last
        self._last = now

    def end(self, stage: str) -> None:
        """Hear of the end of a stage."""
        self(Event(stage, 1, 1))


def whole(
    aligned: Path, output: Path, conversations: int, held_out: int | None = None
) -> Mapping[str, float]:
    """Calibrate on the CPU, into a new folder; another number than by default may be held out."""
    stages, config = Stages(), _config(conversations)
    if held_out is not None:
        config = config.model_copy(update={"num_held_out": held_out})
    calibrate(aligned, output, config=config, progress=stages)
    return stages.seconds


def by_blocks(aligned: Path, output: Path, conversations: int) -> Mapping[str, float]:
    """Calibrate one block after the other on the CPU, on conversations with answers, into a new folder."""
    stages = Stages()
    rows = [replace(row, response=ANSWER) for row in build_conversations(conversations + 1)]
    config = CalibrateConfig(device="cpu", memory=ByteSize(0), num_held_out=1)
    calibrate(aligned, output, conversations=rows, config=config, progress=stages)
    return stages.seconds


def inputs_alone(aligned: Path, output: Path, conversations: int) -> Mapping[str, float]:
    """Find H alone: one forward pass, no gradients, and only H is decomposed and written.

    The model answers the same conversations, those that are held out included.
    """
    stages, config, source = Stages(), _config(conversations), Checkpoint.open(aligned)
    tokenizer, model = _loaded(aligned)
    stages.end("load")
    with as_served(model):
        answered = _answered(model, tokenizer, config)
    stages.end("respond")
    texts = [encode(tokenizer, each, max_length=config.max_length) for each in answered]
    observed, _ = observe(model, source, min((text.ids for text in texts), key=len))
    moments = _summed(model, observed, batches(texts, config.batch_size))
    stages.end("accumulate")
    groups = [LayerGroup(g.name, g.in_features, moments[g.name].tokens, g.layers) for g in observed]
    del model, observed
    limit = int(STORE_SHARE * sum(info.nbytes for info in source.tensors.values()))
    _write(output, groups, moments, limit)
    stages.end("decompose")
    return stages.seconds


def _config(conversations: int) -> CalibrateConfig:
    return CalibrateConfig(num_samples=conversations, device="cpu")


def _loaded(aligned: Path) -> tuple[Any, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(aligned), model.eval().requires_grad_(requires_grad=False)


def _answered(model: Any, tokenizer: Any, config: CalibrateConfig) -> list[Conversation]:
    """Find the conversations to calibrate on."""
    asked = asked_for(None, config)
    answered: list[Conversation] = []
    for rows, tokens in (
        (asked.harmful, config.max_new_tokens),
        (asked.harmless, LOOK_ALIKE_TOKENS),
        (asked.held_out, config.max_new_tokens),
    ):
        answered += respond(model, tokenizer, rows, max_new_tokens=tokens, batch_size=config.batch_size)
    return answered[: len(asked.calibration)]


@dataclass
class _Sums:
    """Σ x xᵀ of every group.

    Attributes:
        moments: by the group's name.
        chosen: which tokens of the batch that is run are no padding.
    """

    moments: dict[str, RunningMoment]
    chosen: Tensor | None = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Give a hook that adds a layer's inputs."""

        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.moments[name].add(inputs[0].reshape(-1, inputs[0].shape[-1])[self.chosen])

        return add


@torch.no_grad()
def _summed(model: Any, observed: Sequence[Observed], texts: Sequence[Batch]) -> dict[str, Moment]:
    sums = _Sums({group.name: RunningMoment(group.in_features) for group in observed})
    for group in observed:
        group.modules[0].register_forward_pre_hook(sums.hook(group.name))
    for batch in texts:
        sums.chosen = batch.mask.flatten()
        model.get_decoder()(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    return {name: running.taken() for name, running in sums.moments.items()}


def _write(output: Path, groups: Sequence[LayerGroup], moments: dict[str, Moment], limit: int) -> None:
    """As many eigenpairs of H as a store keeps that holds those of G as well."""
    extent = Extent(share_within(groups, limit), full=False)
    tensors: dict[str, Tensor] = {}
    for group in groups:
        found = spectrum(normalise(moments.pop(group.name)), extent.rank(group.in_features))
        tensors[f"{group.name}.values"] = found.values
        tensors[f"{group.name}.vectors"] = found.vectors.to(extent.vectors_dtype)
    output.mkdir()
    save_file(tensors, output / "inputs.safetensors")

"""What a calibration is asked for: its options, its conversations, and what decides the store."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ByteSize, ConfigDict, Field

from deltaguard.chat.conversations import (
    Conversation,
    build_conversations,
    build_look_alikes,
    count_look_alikes,
    fingerprint,
    read_prompts,
    sample,
)
from deltaguard.chat.framings import framed, halves
from deltaguard.curvature import Rank
from deltaguard.curvature.store_format import CalibrationRequest
from deltaguard.device import served_dtype
from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.identity import identify
from deltaguard.models.shards import DTYPES

LOOK_ALIKE_TOKENS = 16
"""Tokens of a look-alike's answer at most: whether it is answered or refused is decided where it opens."""


class CalibrateConfig(BaseModel):
    """Options of `calibrate`.

    Attributes:
        prompts: a prompts file (see `conversations.read_prompts`) instead of the package's prompts.
        systems: system prompts of the deployment. The package's prompts are asked under them as well as under
            their own; those of a file that name none get them in turn.
        num_samples: how many conversations; of a shorter prompts file, all that are not held out. Without a
            file half of them, and half of the look-alikes, stand in framings (see `chat.framings`).
        num_look_alikes: how many harmless requests that look dangerous, of the package, are calibrated on
            beside them, so that not answering has a price, too, under `systems` and without any; by default
            as many, or all there are. Conversations given in Python are taken as they are.
        num_held_out: how many further conversations safety KL is measured on; of the conversations or the
            prompts file of a user, those of a fifth of the prompts at most, and of at least one.
        max_length: tokens of a conversation at most; the rest is cut off. A model with fewer positions
            takes as many as it has.
        max_new_tokens: tokens of a response at most, where the aligned model gives it; of a look-alike's
            `LOOK_ALIKE_TOKENS` at most.
        batch_size: conversations per batch.
        device: where the model runs; `auto` is CUDA where there is one, else the CPU.
        dtype: the model's dtype; `auto` is the checkpoint's, and float32 on the CPU, where it answers in the
            dtype that the device is fast in (`device.as_served`).
        seed: fixes which prompts are taken where there are more, and their order.
        dampening: λ / mean diag H of the factors (see `solvers.factor.factorise`).
        rank: `auto` keeps as many eigenpairs as a quarter of the model's bytes hold; `full` all of them, the
            raw sums, and the factors that methods `greedy` and `published` need.
        memory: bytes, or a text such as "8GB", that the model and the sums over its layers may take. Where
            they would take more (see `whole_bytes`), one decoder block is calibrated after another. By
            default half of what the device has.
        resume: go on with a run that was interrupted, and return a store that is finished.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: Path | None = None
    systems: tuple[str, ...] = ()
    num_samples: int = Field(default=128, ge=1)
    num_look_alikes: int | None = Field(default=None, ge=0)
    num_held_out: int = Field(default=64, ge=1)
    max_length: int = Field(default=512, ge=2)
    max_new_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=16, ge=1)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0
    dampening: float = Field(default=0.01, gt=0, le=1)
    rank: Rank = "auto"
    memory: ByteSize | None = None
    resume: bool = False


@dataclass(frozen=True)
class Asked:
    """Conversations of a calibration.

    Attributes:
        safety: harmful requests as they are, calibrated on.
        look_alikes: harmless ones as they are, calibrated on too.
        held_out: harmful requests that safety KL is measured on.
        framed: further harmful requests that are calibrated on, in framings.
        framed_look_alikes: further harmless ones, likewise.
    """

    safety: Sequence[Conversation]
    look_alikes: Sequence[Conversation]
    held_out: Sequence[Conversation]
    framed: Sequence[Conversation] = ()
    framed_look_alikes: Sequence[Conversation] = ()

    @property
    def harmful(self) -> list[Conversation]:
        """List the harmful requests that are calibrated on."""
        return [*self.safety, *self.framed]

    @property
    def harmless(self) -> list[Conversation]:
        """List the look-alikes that are calibrated on."""
        return [*self.look_alikes, *self.framed_look_alikes]

    @property
    def calibration(self) -> list[Conversation]:
        """List the conversations that curvature is measured on: harmful requests, then look-alikes."""
        return [*self.harmful, *self.harmless]

    @property
    def is_framed(self) -> list[bool]:
        """Say which of `calibration` stand in framings."""
        parts = (self.safety, self.framed, self.look_alikes, self.framed_look_alikes)
        return [number % 2 == 1 for number, rows in enumerate(parts) for _ in rows]

    @property
    def all(self) -> list[Conversation]:
        """List all conversations: those calibrated on, and after them those held out."""
        return [*self.calibration, *self.held_out]

    @property
    def sha256(self) -> str:
        """Hash all conversations, and which of them are held out."""
        parts = fingerprint(self.calibration) + fingerprint(self.held_out)
        return sha256(parts.encode()).hexdigest()


def asked_for(given: Sequence[Conversation] | None, config: CalibrateConfig) -> Asked:
    """Find conversations to calibrate on, and others to measure on.

    Args:
        given: instead of the package's or a file's prompts.
        config: the options.

    Raises:
        DeltaguardError: too much or too little was given, or the prompts file does not serve.
    """
    if given is not None and config.prompts is not None:
        raise DeltaguardError(
            f"Conversations were given, and a prompts file too ({config.prompts}): give one."
        )
    if given is not None and config.systems:
        raise DeltaguardError("Conversations were given, and system prompts too: put these into those.")
    systems, seed = config.systems, config.seed
    if given is not None:
        safety, held_out = _divided(given, len(given), config)
        return Asked(safety, (), held_out)
    if config.prompts is not None:
        written = _under(systems, read_prompts(config.prompts))
        safety, held_out = _divided(written, config.num_samples, config)
    else:
        safety = build_conversations(config.num_samples, systems=systems, seed=seed)
        held_out = build_conversations(config.num_held_out, part="dial", systems=systems, seed=seed)
    wanted = config.num_look_alikes
    if wanted is None:
        wanted = min(len(safety), count_look_alikes(systems))
    look_alikes = build_look_alikes(wanted, systems=systems, seed=seed)
    if config.prompts is not None:
        return Asked(safety, look_alikes, held_out)
    # Both, since a framing that only harmful requests had would itself say that they are refused.
    (safety, other_safety), (look_alikes, other_look_alikes) = halves(safety), halves(look_alikes)
    return Asked(safety, look_alikes, held_out, framed(other_safety), framed(other_look_alikes))


def prompts_key() -> str:
    """Name what a calibration asks that is given nothing else, in eight hexadecimal digits."""
    return asked_for(None, CalibrateConfig()).sha256[:8]


def _divided(
    given: Sequence[Conversation], count: int, config: CalibrateConfig
) -> tuple[list[Conversation], list[Conversation]]:
    """Hold some of a user's prompts out, and take `count` of the other conversations to calibrate on."""
    prompts = list({row.prompt: row for row in given}.values())
    if len(prompts) < 2:
        raise DeltaguardError(
            f"{len(given)} conversations with {len(prompts)} different prompts were given; two prompts are "
            "needed at least, since one is held out to measure on."
        )
    chosen = sample(prompts, min(config.num_held_out, max(1, len(prompts) // 5)), seed=config.seed)
    taken = {row.prompt for row in chosen}
    held_out = sample([row for row in given if row.prompt in taken], config.num_held_out, seed=config.seed)
    rest = [row for row in given if row.prompt not in taken]
    return sample(rest, count, seed=config.seed), held_out


def requested(
    source: Checkpoint, asked: Asked, config: CalibrateConfig, device: torch.device
) -> CalibrationRequest:
    """Write down everything that decides a store.

    Args:
        source: the aligned model.
        asked: the conversations.
        config: the options.
        device: where the model runs.
    """
    dtype: str = config.dtype
    if dtype == "auto":
        largest = max(source.tensors.values(), key=lambda info: info.nbytes)
        stored = str(DTYPES[largest.dtype]).removeprefix("torch.")
        dtype = "float32" if device.type == "cpu" else stored
    served = str(served_dtype(device)).removeprefix("torch.")
    return CalibrationRequest(
        **identify(source).model_dump(),
        prompts_sha256=asked.sha256,
        dtype=dtype,
        answer_dtype=served if config.dtype == "auto" and dtype == "float32" else dtype,
        **config.model_dump(
            include={"max_length", "max_new_tokens", "batch_size", "dampening", "rank", "systems"}
        ),
    )


def _under(systems: Sequence[str], conversations: Sequence[Conversation]) -> list[Conversation]:
    """Give conversations without a system prompt those given, in turn."""
    turn = itertools.cycle(systems or (None,))
    return [replace(row, system=next(turn)) if row.system is None else row for row in conversations]

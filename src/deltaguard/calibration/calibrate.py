"""Calibrate: run the aligned model over safety conversations and keep the curvature of its layers.

A run keeps its work in `OUTPUT.partial`, next to the output: the request it serves, the responses so far,
and the sums so far. A run that was killed goes on from there; a finished one leaves the store alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaguard.calibration.conversations import (
    Conversation,
    Encoded,
    build_conversations,
    encode,
    fingerprint,
    read_prompts,
    respond,
    sample,
    takes_system_role,
)
from deltaguard.calibration.observe import Accumulator, Observed, Partial, observe, refuse_experts
from deltaguard.calibration.workspace import Workspace
from deltaguard.checkpoints.checkpoint import Checkpoint
from deltaguard.checkpoints.shards import DTYPES
from deltaguard.curvature.moments import Moment, Packed, pack
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import Group, Provenance, Request, versions, write_store
from deltaguard.errors import DeltaguardError
from deltaguard.progress import Event, Progress, ignore

SAVE_SECONDS = 60.0


class CalibrateConfig(BaseModel):
    """Options of `calibrate`.

    Attributes:
        prompts: a prompts file (see `conversations.read_prompts`) instead of the package's prompts.
        num_samples: how many conversations; of a shorter prompts file, all.
        max_length: tokens of a conversation at most; the rest is cut off. A model with fewer positions
            takes as many as it has.
        max_new_tokens: tokens of a response at most, where the aligned model gives it.
        batch_size: conversations per batch.
        device: where the model runs; `auto` is CUDA where there is one, else the CPU.
        dtype: the model's dtype; `auto` is the checkpoint's, and float32 on the CPU.
        seed: fixes which prompts are taken where there are more, and their order.
        dampening: λ / mean diag H of the factors (see `solvers.factor.factorise`).
        resume: go on with a run that was interrupted, and return a store that is finished.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: Path | None = None
    num_samples: int = Field(default=128, ge=1)
    max_length: int = Field(default=512, ge=2)
    max_new_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=16, ge=1)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0
    dampening: float = Field(default=0.01, gt=0, le=1)
    resume: bool = False


def calibrate(
    aligned: str | Path,
    output_dir: str | Path,
    *,
    conversations: Sequence[Conversation] | None = None,
    config: CalibrateConfig | None = None,
    progress: Progress | None = None,
    is_refusal: Callable[[str], bool] | None = None,
) -> CurvatureStore:
    """Measure the curvature of an aligned model on safety conversations, and factorise it.

    H = Σ x xᵀ over the inputs x of each linear layer in the decoder blocks, at all tokens of the
    conversations, padding excluded. Conversations without a response are answered by the model first.

    Args:
        aligned: a local folder, a Hub id, or `id@revision`.
        output_dir: a folder that is absent or empty; `OUTPUT.partial` beside it holds unfinished work.
        conversations: instead of the package's or a file's prompts.
        config: the options; their defaults where absent.
        progress: called as the stages `load`, `respond` (conversations), `accumulate` (batches) and
            `factorise` (groups) go on.
        is_refusal: a judge of responses; with it the store records the share that refuses.

    Returns:
        The store, opened from `output_dir`.

    Raises:
        DeltaguardError: the model, its chat template, the prompts or the output folder do not serve.

    Example:
        >>> store = calibrate("models/aligned", "store")  # doctest: +SKIP
        >>> store.hessian("model.layers.0.mlp.down_proj").shape  # doctest: +SKIP
        torch.Size([11008, 11008])
    """
    config = config or CalibrateConfig()
    source = Checkpoint.open(aligned)
    refuse_experts(source)
    asked = _conversations(conversations, config)
    device = _device(config.device)
    request = _request(source, asked, config, device)
    with Workspace(Path(output_dir), request) as workspace:
        if not workspace.begin(resume=config.resume):
            run = _Run(source, asked, request, device, workspace, progress or ignore)
            try:
                measured = _measure(run, is_refusal)
            except torch.OutOfMemoryError as error:
                raise DeltaguardError(
                    f"{run.device} has too little memory for the model, the sums over its layers' inputs and "
                    f"batches of {request.batch_size} conversations. Take smaller batches or another device."
                ) from error
            _write(Path(output_dir), measured, run.report)
            workspace.end()
    return CurvatureStore.from_pretrained(output_dir)


@dataclass(frozen=True)
class _Run:
    """What a run works with from beginning to end."""

    source: Checkpoint
    conversations: Sequence[Conversation]
    request: Request
    device: torch.device
    workspace: Workspace
    report: Progress


@dataclass(frozen=True)
class _Measured:
    """What is left once the model is not needed any more."""

    groups: tuple[Group, ...]
    moments: dict[str, Moment]
    provenance: Provenance


def _conversations(given: Sequence[Conversation] | None, config: CalibrateConfig) -> Sequence[Conversation]:
    if given is not None and config.prompts is not None:
        raise DeltaguardError(
            f"Conversations were given, and a prompts file too ({config.prompts}): give one."
        )
    if given is not None and not given:
        raise DeltaguardError("No conversation was given: there is nothing to calibrate on.")
    if given is not None:
        return given
    if config.prompts is not None:
        return sample(read_prompts(config.prompts), config.num_samples, seed=config.seed)
    return build_conversations(config.num_samples, seed=config.seed)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeltaguardError(
            f"The device {name!r} cannot be used: {error}. Try `cpu`, or `auto`."
        ) from error
    return device


def _request(
    source: Checkpoint, asked: Sequence[Conversation], config: CalibrateConfig, device: torch.device
) -> Request:
    return Request(
        fingerprint=source.fingerprint(),
        prompts_sha256=fingerprint(asked),
        max_length=config.max_length,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        dtype=_dtype_name(source, config.dtype, device),
        dampening=config.dampening,
    )


def _dtype_name(source: Checkpoint, asked: str, device: torch.device) -> str:
    if asked != "auto":
        return asked
    if device.type == "cpu":
        return "float32"
    largest = max(source.tensors.values(), key=lambda info: info.nbytes)
    return str(DTYPES[largest.dtype]).removeprefix("torch.")


def _measure(run: _Run, is_refusal: Callable[[str], bool] | None) -> _Measured:
    """Everything that needs the model, which is gone from memory afterwards."""
    tokenizer, model = _load(run)
    request = run.request
    answered = respond(
        model,
        tokenizer,
        run.conversations,
        max_new_tokens=request.max_new_tokens,
        batch_size=request.batch_size,
        journal=run.workspace.journal,
        on_batch=lambda done, total: run.report(Event("respond", done, total)),
    )
    limit = _positions(model, request.max_length)
    texts = [encode(tokenizer, conversation, max_length=limit) for conversation in answered]
    observed, uncovered = observe(model, run.source, min((text.ids for text in texts), key=len))
    partials = _accumulate(run, model, observed, _batches(texts, request.batch_size))
    return _Measured(
        groups=tuple(
            Group(group.name, group.in_features, partials[group.name].moment.tokens, group.layers)
            for group in observed
        ),
        moments={name: partial.moment for name, partial in partials.items()},
        provenance=Provenance(
            **request.model_dump(),
            aligned=run.source.reference,
            conversations_sha256=fingerprint(answered),
            conversations=len(answered),
            tokens=sum(len(text.ids) for text in texts),
            truncated=sum(text.truncated for text in texts),
            system_role="template" if takes_system_role(tokenizer) else "user turn",
            refusal_share=None if is_refusal is None else _share(answered, is_refusal),
            uncovered=uncovered,
            versions=versions(),
        ),
    )


def _load(run: _Run) -> tuple[Any, Any]:
    run.report(Event("load", 0, 1))
    dtype = getattr(torch, run.request.dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(run.source.folder)
        model: Any = AutoModelForCausalLM.from_pretrained(run.source.folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise DeltaguardError(f"transformers cannot load {run.source.reference}: {error}") from error
    model = model.to(run.device).eval().requires_grad_(requires_grad=False)
    run.report(Event("load", 1, 1))
    return tokenizer, model


def _positions(model: Any, max_length: int) -> int:
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min(max_length, positions or max_length)


def _batches(texts: Sequence[Encoded], size: int) -> list[tuple[Tensor, Tensor]]:
    """Token ids and masks, longest first: a run that does not fit into memory fails at its beginning."""
    ordered = sorted((text.ids for text in texts), key=len, reverse=True)
    batches: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(ordered), size):
        rows = ordered[start : start + size]
        ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.long)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        batches.append((ids, mask))
    return batches


def _accumulate(
    run: _Run, model: Any, observed: Sequence[Observed], batches: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Partial]:
    accumulator = Accumulator(model, observed, run.workspace.load_sums(observed, run.device))
    saved = time.monotonic()
    try:
        for number in range(accumulator.batches, len(batches)):
            ids, mask = batches[number]
            accumulator.add(number, ids.to(run.device), mask.to(run.device))
            run.report(Event("accumulate", number + 1, len(batches)))
            if time.monotonic() - saved >= SAVE_SECONDS:
                run.workspace.save_sums(accumulator.partials)
                saved = time.monotonic()
    except KeyboardInterrupt:
        run.workspace.save_sums(accumulator.partials)
        raise
    return accumulator.partials


def _share(answered: Sequence[Conversation], is_refusal: Callable[[str], bool]) -> float:
    return sum(is_refusal(conversation.response or "") for conversation in answered) / len(answered)


def _write(output: Path, measured: _Measured, report: Progress) -> None:
    """Factorise group by group, each sum being given up when its turn has come."""
    total = len(measured.groups)

    def packed(group: Group) -> Packed:
        moment = measured.moments.pop(group.name)
        factorised = pack(group.name, moment, dampening=measured.provenance.dampening)
        report(Event("factorise", total - len(measured.moments), total))
        return factorised

    write_store(output, measured.provenance, measured.groups, packed)

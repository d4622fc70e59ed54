"""Calibrate: run the aligned model over safety conversations and keep the curvature of its layers.

A run keeps the model's responses, which take most of the time, in `OUTPUT.partial` beside the output. A run
that was killed goes on with them and sums anew, block by block with the block it was at (see `passes`); a
finished one leaves the store alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from deltaguard.chat.conversations import Conversation, fingerprint
from deltaguard.chat.refusals import is_refusal as opens_with_refusal
from deltaguard.chat.template import takes_system_role
from deltaguard.chat.thinking import without_thinking
from deltaguard.chat.tokens import Encoded, batches, context_length, encode
from deltaguard.curvature.blocks import CutModel, UncutError
from deltaguard.curvature.contents import GroupCurvature, share_within
from deltaguard.curvature.decisions import Decision, decided_batches, decisions, leanings
from deltaguard.curvature.groups import observe
from deltaguard.curvature.observe import Accumulator
from deltaguard.curvature.passes import Passes
from deltaguard.curvature.request import (
    LOOK_ALIKE_TOKENS,
    Asked,
    CalibrateConfig,
    asked_for,
    requested,
)
from deltaguard.curvature.responses import is_answer_missing, respond, shared_workspace
from deltaguard.curvature.room import answer_what_has_no_room
from deltaguard.curvature.shared import decomposed
from deltaguard.curvature.sizes import blocks_of, held_bytes, rows_within, store_limit, whole_bytes
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import CalibrationRequest, Provenance, versions, write_store
from deltaguard.curvature.sums import LayerGroup
from deltaguard.device import as_served, exact_products, find_device, memory_bytes
from deltaguard.errors import DeltaguardError
from deltaguard.files import expanded
from deltaguard.models.admission import refuse_inputs
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.experts import refuse_unknown_experts
from deltaguard.models.loading import load_config, load_model, load_tokenizer
from deltaguard.models.opened import refuse_changes
from deltaguard.progress import Event, Progress, ignore
from deltaguard.ranks import Ranks
from deltaguard.reports.text import size
from deltaguard.solvers.low_rank import LowRank


@exact_products()
def calibrate(
    aligned: str | Path,
    output_dir: str | Path,
    *,
    conversations: Sequence[Conversation] | None = None,
    config: CalibrateConfig | None = None,
    progress: Progress | None = None,
    is_refusal: Callable[[str], bool] | None = None,
    ranks: Ranks | None = None,
) -> CurvatureStore:
    """Measure the curvature of an aligned model on safety conversations and look-alikes, and decompose it.

    For each linear layer in the decoder blocks: H, the mean of x xᵀ over its inputs x at all tokens of the
    conversations, padding excluded; and G, the sum of g gᵀ over the gradients g of the log-probability of
    tokens drawn from the model at the response positions, with respect to the layer's output, divided by the
    number of those positions. Conversations without a response are answered by the model first.

    Args:
        aligned: a local folder, a Hub id, or `id@revision`.
        output_dir: a folder that is absent or empty; `OUTPUT.partial` beside it holds unfinished work.
        conversations: instead of the package's or a file's prompts.
        config: the options; their defaults where absent.
        progress: called as the stages `load`, `respond` (conversations), `lean` (batches),
            `accumulate` (batches) and `decompose` (groups) go on; block by block instead of the last three
            `forwards` and `backwards`.
        is_refusal: a judge of responses, in place of `refusals.is_refusal`, which knows five languages: the
            store records the share that refuses, and by it goes the gradient of refusing (see `decisions`).
        ranks: the processes that share the work, all of which call this with the same arguments; by default
            this one alone. Sums over conversations are added up in another order then.

    Returns:
        The store, opened from `output_dir`.

    Raises:
        DeltaguardError: the model, its chat template, the prompts or the output folder do not serve.

    Example:
        >>> store = calibrate("models/aligned", "store")  # doctest: +SKIP
        >>> store.input_spectrum("model.layers.0.mlp.down_proj").vectors.shape  # doctest: +SKIP
        torch.Size([11008, 1164])
    """
    config, output_dir = config or CalibrateConfig(), expanded(output_dir)
    source = Checkpoint.open(aligned)
    refuse_inputs(output_dir, [source.folder])
    refuse_unknown_experts(source.reference, source.config, source.tensors)
    asked = asked_for(conversations, config)
    device = find_device(config.device)
    ranks = (ranks or Ranks()).on(device)
    request = requested(source, asked, config, device)
    with shared_workspace(Path(output_dir), request, ranks, resume=config.resume) as journal:
        if journal is not None:
            half = memory_bytes(device) // 2 // ranks.sharing(device)
            memory = half if config.memory is None else int(config.memory)
            report = progress or ignore
            shape = load_config(source.folder, source.reference)
            run = _Run(source, asked, request, device, memory, context_length(shape), journal, report, ranks)
            _calibrate(run, Path(output_dir), is_refusal or opens_with_refusal)
    return CurvatureStore.from_pretrained(output_dir)


@dataclass(frozen=True)
class _Run:
    """What a run works with from beginning to end.

    Attributes:
        positions: that the model has.
    """

    source: Checkpoint
    asked: Asked
    request: CalibrationRequest
    device: torch.device
    memory: int
    positions: int
    journal: Path
    report: Progress
    ranks: Ranks

    @property
    def limit(self) -> int:
        """Bound the tokens of a conversation."""
        return min(self.positions, self.request.max_length)


@dataclass(frozen=True)
class _Layers:
    """The layers, and what gives the curvature of each group once the store is known that it is for.

    Attributes:
        groups: in the model's order.
        uncovered: matrices that are in no group.
        contents: gives the curvature of each.
        leaning: gives the gradients of refusing, after `contents` was called.
    """

    groups: tuple[LayerGroup, ...]
    uncovered: tuple[str, ...]
    contents: Callable[[Provenance], Iterator[GroupCurvature]]
    leaning: Callable[[], Mapping[str, LowRank]]


@dataclass(frozen=True)
class _Measured:
    """What is left once the model is not needed as a whole any more."""

    layers: _Layers
    held_out: tuple[Conversation, ...]
    provenance: Provenance


def _calibrate(run: _Run, output: Path, is_refusal: Callable[[str], bool]) -> None:
    """Measure, and write the store.

    Raises:
        DeltaguardError: as `calibrate`.
    """
    try:
        measured = _measure(run, is_refusal)
        contents = measured.layers.contents(measured.provenance)
        refuse_changes(run.source.changes())
        layers = measured.layers
        if run.ranks.leads:
            write_store(
                output,
                measured.provenance,
                measured.held_out,
                layers.groups,
                lambda _: next(contents),
                leaning=layers.leaning(),
            )
    except torch.OutOfMemoryError as error:
        raise DeltaguardError(
            f"{run.device} has too little memory for what is calibrated at once, the sums over its layers' "
            f"inputs and output gradients, and a single conversation: {error} {_advice(run)} shorter "
            "conversations (`--max-length`), or a device with more memory, such as `cpu`; `--dry-run` says "
            "what each takes."
        ) from error


def _advice(run: _Run) -> str:
    """Say what takes less memory, block by block where that was not tried."""
    by_blocks = whole_bytes(run.source, getattr(torch, run.request.dtype)) > run.memory
    return "Take" if by_blocks else "Calibrate block by block (`--memory 0`), take"


def _measure(run: _Run, is_refusal: Callable[[str], bool]) -> _Measured:
    """Let the model answer, and find the layers; what needs the sums waits in `contents`."""
    request, count = run.request, len(run.asked.calibration)
    in_blocks = run.ranks.from_first(whole_bytes(run.source, getattr(torch, request.dtype)) > run.memory)
    tokenizer = load_tokenizer(run.source.folder, run.source.reference)
    answered, model = _all_answered(run, tokenizer, in_blocks=in_blocks)
    limit = run.limit
    texts = [encode(tokenizer, conversation, max_length=limit) for conversation in answered[:count]]
    # A framing says how an answer opens, such as with a number: whether it refuses is not judged there.
    judged = [
        None if is_framed or row.response is None else is_refusal(without_thinking(row.response))
        for row, is_framed in zip(answered[:count], run.asked.is_framed, strict=True)
    ]
    # The processes cut conversations off by it, and have to cut them off alike.
    refuses: list[bool | None] = run.ranks.from_first(judged)
    harmful, plain = len(run.asked.harmful), refuses[: len(run.asked.safety)]
    told = [each for each in plain if each is not None]
    held_out = [c for c in answered[count:] if encode(tokenizer, c, max_length=limit).has_response]
    for what, found in (("", any(text.has_response for text in texts)), ("held-out ", bool(held_out))):
        if not found:
            raise DeltaguardError(
                f"No {what}conversation has a response within {limit} tokens: nothing can be learned about "
                "responses. Allow longer conversations (`--max-length`), shorter answers (`max_new_tokens`)."
            )
    decided = decisions(texts, refuses, harmful)
    if in_blocks:
        # Both would not fit.
        del model
        layers = _by_blocks(run, texts, decided) or _whole(run, _load(run, request.dtype), texts, decided)
    else:
        layers = _whole(run, model or _load(run, request.dtype), texts, decided)
    provenance = Provenance(
        **request.model_dump(),
        aligned=run.source.reference,
        conversations_sha256=fingerprint(answered[:count]),
        conversations=count,
        look_alikes=len(run.asked.harmless),
        framed=len(run.asked.framed),
        tokens=sum(len(text.ids) for text in texts),
        response_tokens=sum(len(text.ids) - text.prompt_length for text in texts),
        truncated=sum(text.truncated for text in texts),
        system_role="template" if takes_system_role(tokenizer) else "user turn",
        unanswered=len(plain) - len(told),
        refusal_share=told.count(True) / len(told) if told else None,
        uncovered=layers.uncovered,
        rank_share=1.0 if request.rank == "full" else share_within(layers.groups, store_limit(run.source)),
        versions=versions(),
    )
    return _Measured(layers, tuple(held_out), provenance)


def _all_answered(run: _Run, tokenizer: Any, *, in_blocks: bool) -> tuple[list[Conversation], Any]:
    """Give the conversations as they were answered, and the model if it was loaded for it.

    Those that are not asked have no response.
    """
    request, model = run.request, None
    fitting = replace(run, asked=answer_what_has_no_room(run.asked, tokenizer, request, run.positions))
    answered = _known_answers(fitting, tokenizer)
    if answered is None and in_blocks:
        answered = _answered_by_blocks(fitting, tokenizer)
    if answered is None:
        model = _load(run, (request.answer_dtype or request.dtype) if in_blocks else request.dtype)
        with as_served(model) if request.answer_dtype not in (None, request.dtype) else nullcontext():
            answered = _answered(fitting, model, tokenizer, request.batch_size)
    rows = zip(run.asked.all, fitting.asked.all, answered, strict=True)
    return [found if fits is given else given for given, fits, found in rows], model


def _known_answers(run: _Run, tokenizer: Any) -> list[Conversation] | None:
    """Take the answers that were given or that an earlier run left; None where one is missing."""
    asked, is_missing = run.asked, None
    if run.ranks.leads:
        harmful = [*asked.harmful, *asked.held_out]
        is_missing = is_answer_missing(harmful, run.journal)
        is_missing = is_missing or is_answer_missing(asked.harmless, _beside(run.journal))
    return None if run.ranks.from_first(is_missing) else _answered(run, None, tokenizer, 1)


def _beside(journal: Path) -> Path:
    """Name the file of look-alikes' answers."""
    return journal.with_name("look-alikes.jsonl")


def _answered(run: _Run, model: Any, tokenizer: Any, batch_size: int) -> list[Conversation]:
    """Let a model answer the conversations that have no response, together with the other processes."""
    asked, tokens = run.asked, run.request.max_new_tokens

    def answer(rows: Sequence[Conversation], tokens: int, journal: Path, known: int) -> list[Conversation]:
        return respond(
            model,
            tokenizer,
            rows,
            max_new_tokens=tokens,
            batch_size=batch_size,
            journal=journal,
            on_batch=lambda done, _: run.report(Event("respond", known + done, len(asked.all))),
            ranks=run.ranks,
        )

    harmful = answer([*asked.harmful, *asked.held_out], tokens, run.journal, 0)
    opening = min(LOOK_ALIKE_TOKENS, tokens)
    look_alikes = answer(asked.harmless, opening, _beside(run.journal), len(harmful))
    count = len(asked.harmful)
    return [*harmful[:count], *look_alikes, *harmful[count:]]


def _answered_by_blocks(run: _Run, tokenizer: Any) -> list[Conversation] | None:
    """Let the model answer in a pass over its blocks for each token; None where it fits or cannot be cut."""
    dtype = getattr(torch, run.request.answer_dtype or run.request.dtype)
    whole = sum(prod(info.shape) for info in run.source.tensors.values()) * dtype.itemsize
    if run.ranks.from_first(whole <= run.memory):
        return None
    try:
        cut = CutModel(run.source, dtype=dtype, device=run.device)
    except UncutError as error:
        run.report(Event("load", 0, 1, f"the model cannot answer block by block: {error}"))
        return None
    run.report(Event("respond", 0, 1, f"the model takes {size(whole)}: it answers block by block"))
    tokens = run.request.max_length + run.request.max_new_tokens
    room = run.memory - held_bytes(*blocks_of(run.source), dtype)
    # The processes share batches, which have to be the same ones for all.
    rows = run.ranks.from_first(rows_within(cut.model.config, room, tokens=tokens, dtype=dtype))
    with cut.streaming() as model:
        return _answered(run, model, tokenizer, rows)


def _whole(run: _Run, model: Any, texts: Sequence[Encoded], decided: Sequence[Decision]) -> _Layers:
    """Take the sums of all layers at once; the model is not needed any more then."""
    observed, uncovered = observe(model, run.source, min((text.ids for text in texts), key=len))
    size = run.request.batch_size
    # Before the sums, which take more memory than the gradients.
    leaning = leanings(model, observed, decided, batch_size=size, report=run.report, ranks=run.ranks)
    accumulator, ordered = Accumulator(model, observed, run.report), batches(texts, size)
    for number in range(run.ranks.rank, len(ordered), run.ranks.size):
        accumulator.add(number * size, ordered[number].to(run.device))
        run.report(Event("accumulate", number + 1, len(ordered)))
    sums, tokens = accumulator.sums, sum(len(text.ids) for text in texts)
    groups = tuple(LayerGroup(g.name, g.in_features, tokens, g.layers) for g in observed)

    def contents(provenance: Provenance) -> Iterator[GroupCurvature]:
        # Each sum is given up when its turn has come.
        return _told(decomposed(groups, sums, provenance, run.ranks), len(groups), run.report)

    return _Layers(groups, uncovered, contents, lambda: leaning)


def _by_blocks(run: _Run, texts: Sequence[Encoded], decided: Sequence[Decision]) -> _Layers | None:
    """Take the sums of one decoder block after the other; None of a model that cannot be cut into blocks."""
    try:
        cut = CutModel(run.source, dtype=getattr(torch, run.request.dtype), device=run.device)
    except UncutError as error:
        run.report(Event("load", 0, 1, f"the model cannot be taken block by block: {error}"))
        return None
    ordered = [batch.to(run.device) for batch in batches(texts, run.request.batch_size)]
    placed = [each.to(run.device) for each in decided_batches(texts, decided, run.request.batch_size)]
    passes = Passes(cut, ordered, placed, run.journal.parent / "blocks", run.report, run.ranks)
    found = passes.forwards()

    def contents(provenance: Provenance) -> Iterator[GroupCurvature]:
        passes.backwards(found, provenance)
        return passes.contents()

    return _Layers(
        groups=tuple(group for block in found for group in block.groups),
        uncovered=tuple(sorted(name for block in found for name in block.uncovered)),
        contents=contents,
        leaning=passes.leaning,
    )


def _told(contents: Iterator[GroupCurvature], total: int, report: Progress) -> Iterator[GroupCurvature]:
    """Tell of each group that is decomposed."""
    for number, found in enumerate(contents, start=1):
        report(Event("decompose", number, total))
        yield found


def _load(run: _Run, dtype: str) -> Any:
    run.report(Event("load", 0, 1))
    model = load_model(run.source.folder, run.source.reference, dtype=getattr(torch, dtype))
    model = model.to(run.device).requires_grad_(requires_grad=False)
    run.report(Event("load", 1, 1))
    return model

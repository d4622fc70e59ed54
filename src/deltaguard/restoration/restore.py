"""Restore a fine-tuned checkpoint: plan from headers, solve layer by layer, write shard by shard."""

import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from deltaguard.curvature.store import CurvatureStore
from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import parse_yaml, read_text
from deltaguard.memory import peak_memory_bytes
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.adapter_writer import AdapterLayer, commit_adapter, stage_adapter
from deltaguard.models.hub import is_local
from deltaguard.models.journal import FileRecord
from deltaguard.models.lora_config import read_lora_config
from deltaguard.models.mirror import adapter_files, checkpoint_files, refuse_links_out
from deltaguard.models.writer import CheckpointWriter
from deltaguard.progress import Event, Progress, ignore
from deltaguard.reports.card import model_card
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.restore import (
    CARD_NAME,
    REPORT_NAME,
    FileRow,
    LayerRow,
    OtherRow,
    RestoreReport,
)
from deltaguard.restoration.dial import PROHIBITIVE, Price, find_price
from deltaguard.restoration.experts import rare_experts, rare_warning, refuse_what_experts_cannot
from deltaguard.restoration.job import Job, open_job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.output import (
    Output,
    describe_output,
    finished_report,
    open_writer,
)
from deltaguard.restoration.plan import Action, Plan, Step
from deltaguard.restoration.refine import Refined, refined_layers
from deltaguard.restoration.trial import Trial

T = TypeVar("T")
_ROWS: TypeAdapter[tuple[LayerRow | OtherRow, ...]] = TypeAdapter(tuple[LayerRow | OtherRow, ...])
_METADATA: TypeAdapter[dict[Any, Any] | None] = TypeAdapter(dict[Any, Any] | None)
_PRICE = TypeAdapter(Price)
_QUANTISED = re.compile(r"(4|8)[-_]?bit|bnb|gptq|awq|int[48]", re.IGNORECASE)
_LARGE_ADAPTER = 0.5
"""Share of the layers' entries from which on an adapter's own are told to be many."""


class UnchangedError(DeltaguardError):
    """The output would be the fine-tuned model itself."""


def restore(
    aligned: str | Path,
    finetuned: str | Path,
    output_dir: str | Path,
    *,
    store: CurvatureStore | str | Path | None = None,
    config: RestoreConfig | None = None,
    progress: Progress | None = None,
) -> RestoreReport:
    """Write a checkpoint that keeps what fine-tuning taught and refuses like the aligned model.

    The output is a PEFT adapter where the options say so. Otherwise it mirrors the fine-tuned checkpoint
    (for a LoRA adapter: the aligned one): the same shard files, tensors and dtypes, with every non-weight
    file of its folder. Weights are streamed: in memory are two tensors of each model and one layer's
    workspace; while the dial measures, the model as well. The inputs are not touched.

    Args:
        aligned: the model before fine-tuning: a local folder, a Hub id, or `id@revision`.
        finetuned: the model after it: the same, or a PEFT LoRA adapter folder.
        output_dir: a new or empty folder, unless the configuration says otherwise. With `resume`, the
            finished output of the same job is left as it is.
        store: the aligned model's curvature; calibrated first where it is absent and the method needs it.
        config: method, strength and the other choices; the default is `RestoreConfig()`.
        progress: called after each tensor.

    Returns:
        The report, which the output folder also holds as `deltaguard_report.json`.

    Raises:
        DeltaguardError: an input cannot be used, or the output cannot be written; nothing is left that
            looks like a finished checkpoint, and nothing is lost that no earlier restore wrote.

    Example:
        ```python
        report = restore("Qwen/Qwen3-0.6B", "./my-finetune", "./restored", store="./store")
        print(report.kept_energy, report.safety_cost)
        ```
    """
    started, memory = time.perf_counter(), peak_memory_bytes()
    config = config or RestoreConfig()
    job = open_job(aligned, finetuned, store=store, config=config, progress=progress)
    plan = job.plan(config)
    metadata = front_matter(job.finetuned.folder)
    if config.output_format == "adapter":
        refuse_what_no_adapter_holds(job, plan)
    refuse_what_experts_cannot(job, plan, config)
    output = describe_output(job, plan, Path(output_dir), config)
    finished = finished_report(job, output, config)
    return finished or _written(job, plan, output, config, metadata, started, memory, progress)


def _written(
    job: Job,
    plan: Plan,
    output: Output,
    config: RestoreConfig,
    metadata: Mapping[str, Any] | None,
    started: float,
    memory: int,
    progress: Progress | None,
) -> RestoreReport:
    """Write the output."""
    with open_writer(job, output, config) as writer:
        writer.require_space(output.needed, what=output.what)
        trial = Trial(job, plan, config, writer.out, reserve=output.needed)
        price = _price(trial, writer, progress or ignore)
        refined = refined_layers(trial, price, writer, progress or ignore)
        price = refined.price
        rows = _stage(trial, refined, writer, progress or ignore)
        try:
            job.check_unchanged()
            _check_result(job, rows, price)
        except DeltaguardError:
            # Of no use, so there is nothing to resume.
            writer.discard()
            raise
        report = _report(job, config, price, rows, output, started, memory)
        told = {"refinement": refined.record, "warnings": (*report.warnings, *refined.warnings)}
        report = report.model_copy(update=told)
        writer.text(CARD_NAME, model_card(report, front_matter=metadata))
        report = report.model_copy(update={"files": _files(writer)})
        writer.text(REPORT_NAME, report.model_dump_json(indent=2) + "\n")
        if config.output_format == "adapter":
            commit_adapter(writer)
        else:
            writer.commit(last=job.finetuned.index_name or job.finetuned.shards[0])
    return report


def _stage(
    trial: Trial, refined: Refined, writer: CheckpointWriter, progress: Progress
) -> list[LayerRow | OtherRow]:
    """Write everything but the report and the card."""
    price = refined.price
    if trial.config.output_format == "adapter":
        return _stage_adapter(trial, price, writer, progress)
    job, config = trial.job, trial.config
    if price.dial is not None and price.dial.whole:
        kept = _all_finetuned(job.plan(config.model_copy(update={"other_params": "finetuned"})))
        trial = Trial(job, kept, config, writer.out)
    rows: list[LayerRow | OtherRow] = []
    for shard in job.finetuned.shards:
        steps, finished = trial.plan.in_shard(shard), writer.finished(shard)
        if finished is not None:
            rows += _noted_rows(writer, finished, steps)
            continue
        with writer.shard(shard, job.finetuned.header(shard)) as sink:
            new: list[LayerRow | OtherRow] = []
            for edited in map(refined.edited, trial.edited(steps, price.mu)):
                sink.write(edited.row.name, edited.tensor)
                new.append(edited.row)
                progress(Event("restore", len(rows) + len(new), len(trial.plan.steps)))
            sink.notes = _ROWS.dump_python(tuple(new), mode="json")
        rows += new
    files = checkpoint_files(job.aligned, job.finetuned, config_from=config.config_from)
    for name, source in files.items():
        writer.copy(source, name)
    return rows


def _stage_adapter(
    trial: Trial, price: Price, writer: CheckpointWriter, progress: Progress
) -> list[LayerRow | OtherRow]:
    """Restore layer by layer and stage the adapter; `commit_adapter` moves it into place."""
    from deltaguard.models.loading import module_names

    job = trial.job
    rows: list[LayerRow | OtherRow] = [*trial.other_rows()]

    def layers() -> Iterator[AdapterLayer]:
        for number, (step, factors, row) in enumerate(trial.factors(price.mu), start=1):
            rows.append(row)
            progress(Event("restore", number, len(trial.steps)))
            yield step.aligned_name.removesuffix(".weight"), factors

    files = adapter_files(job.aligned, job.finetuned, config_from=trial.config.config_from)
    modules = module_names(job.aligned.folder)
    stage_adapter(writer, job.aligned, layers(), modules=modules, companions=files)
    return rows


def refuse_what_no_adapter_holds(job: Job, plan: Plan) -> None:
    """Refuse a plan that takes more than linear layers from the fine-tuned model; all such are listed."""
    beyond = [step.info.name for step in plan.steps if step.action in (Action.FINETUNED, Action.EXTEND)]
    if beyond:
        raise DeltaguardError(
            listed(
                f"An adapter over {job.aligned.reference} cannot hold what comes from "
                f"{job.finetuned.reference} besides linear layers; write a checkpoint",
                [f"`{name}`" for name in beyond],
            )
        )


def _all_finetuned(plan: Plan) -> Plan:
    """Find the plan that keeps the fine-tuned model, with the reason why it does."""
    reason = "the whole model is within the safety KL allowed"
    steps = (replace(s, reason=reason) if s.action is Action.FINETUNED else s for s in plan.steps)
    return replace(plan, steps=tuple(steps))


def _price(trial: Trial, writer: CheckpointWriter, progress: Progress) -> Price:
    """Find the price of safety, kept because all shards of a resumed run must have the same."""
    price = writer.remembered("price", _PRICE)
    if price is None:
        price = find_price(trial, progress)
        if trial.config.is_priced:
            writer.remember("price", _PRICE.dump_python(price, mode="json"))
    return price


def _noted_rows(
    writer: CheckpointWriter, record: FileRecord, steps: Sequence[Step]
) -> tuple[LayerRow | OtherRow, ...]:
    """Find the rows of a shard that an interrupted run finished."""
    rows = writer.notes(record, _ROWS)
    wanted = [(s.info.name, s.info.shape if s.action is Action.RESTORE else None) for s in steps]
    found = [(row.name, row.shape if isinstance(row, LayerRow) else None) for row in rows]
    if found != wanted:
        raise writer.damaged(
            f"what was noted about {record.name}",
            [f"it is about {len(found)} tensors, which are not the {len(wanted)} of that shard"],
        )
    return rows


def _check_result(job: Job, rows: Sequence[LayerRow | OtherRow], price: Price) -> None:
    """Refuse an output that would be useless."""
    all_within = price.dial is not None and price.mu == 0
    if not any(row.delta_norm > 0 if isinstance(row, LayerRow) else row.differs for row in rows):
        raise DeltaguardError(
            f"{job.finetuned.reference} does not differ from {job.aligned.reference}: every delta is zero, "
            "so there is nothing to restore. Are both the same model?"
        )
    if not all_within and not any(
        row.utility_loss > 0 or row.detail.get("shift_norm", 0) > 0
        if isinstance(row, LayerRow)
        else row.differs and row.source != "finetuned"
        for row in rows
    ):
        raise UnchangedError(
            "This run changes no tensor: with these options the output is the fine-tuned model itself. "
            "Lower --strength, or take the other parameters from the aligned model."
        )


def front_matter(folder: Path) -> Mapping[str, Any] | None:
    """Read the metadata of the fine-tuned model's own card: its licence and languages go on holding."""
    card = folder / CARD_NAME
    refuse_links_out(folder, [card])
    if not card.is_file():
        return None
    # What the Hub reads: the YAML between the first line of dashes and the second.
    first, *lines = re.split("\r\n?|\n", read_text(card).lstrip())
    end = next((number for number, line in enumerate(lines) if line.rstrip() == "---"), None)
    if first.rstrip() != "---" or end is None:
        return None
    source, remedy = f"The metadata at the head of {card}", "Correct it, or remove that file."
    return parse_yaml("\n".join(lines[:end]), _METADATA, source=source, remedy=remedy)


def _files(writer: CheckpointWriter) -> tuple[FileRow, ...]:
    """List every file of the output with its hash, but the report, which holds this list."""
    return tuple(
        FileRow(name=record.name, bytes=record.bytes, sha256=record.sha256)
        for name, record in sorted(writer.records.items())
        if name != REPORT_NAME
    )


def _report(
    job: Job,
    config: RestoreConfig,
    price: Price,
    rows: Sequence[LayerRow | OtherRow],
    output: Output,
    started: float,
    memory: int,
) -> RestoreReport:
    layers = tuple(row for row in rows if isinstance(row, LayerRow))
    changed = [row for row in layers if row.delta_norm > 0]
    entries = [prod(row.shape) for row in changed]
    norms = [row.delta_norm**2 for row in changed]
    costs = [row.safety_cost for row in changed if row.safety_cost is not None]
    lost = sum(row.utility_loss * norm for row, norm in zip(changed, norms, strict=True))
    kept = sum(row.kept_energy * norm for row, norm in zip(changed, norms, strict=True))
    predicted = sum(row.detail.get("predicted_safety_kl", 0.0) for row in changed)
    selected = [(row.kept_entries, n) for row, n in zip(changed, entries, strict=True)]
    selected = [(share, n) for share, n in selected if share is not None]
    return RestoreReport(
        environment=environment(price.dial.device if price.dial else "cpu"),
        aligned=job.aligned_reference,
        finetuned=job.finetuned_reference,
        store_conversations=job.store.provenance.conversations_sha256 if job.store else None,
        options=config.what_is_solved(),
        method_title=config.chosen_method.title,
        layers=layers,
        others=tuple(row for row in rows if isinstance(row, OtherRow)),
        files=(),
        plan_hash=output.plan_hash,
        mu=min(price.mu, PROHIBITIVE) if config.is_priced else None,
        predicted_safety_kl=predicted if config.is_priced else None,
        dial=price.dial,
        kept_energy=kept / sum(norms) if changed else 1.0,
        kept_entries=statistics.fmean(*zip(*selected, strict=True)) if selected else None,
        utility_loss=lost / sum(norms) if changed else 0.0,
        safety_cost=statistics.median(costs) if costs else None,
        seconds={
            "total": time.perf_counter() - started,
            "solve": sum(row.seconds for row in layers),
        },
        peak_memory_bytes=peak if (peak := peak_memory_bytes()) > memory else None,
        warnings=_warnings(job, config, layers),
        rare_experts=rare_experts(job.store) if job.store else (),
    )


def _warnings(job: Job, config: RestoreConfig, layers: Sequence[LayerRow]) -> tuple[str, ...]:
    """Say what is no error and must be known of an output, a sentence or two each."""
    found = [*job.store.provenance.warnings, *rare_warning(job.store)] if job.store else []
    if isinstance(job.finetuned, AdapterCheckpoint):
        trained_on = read_lora_config(job.finetuned.folder, job.finetuned.reference).base_model_name_or_path
        if trained_on and _QUANTISED.search(trained_on):
            found.append(
                f"The adapter was trained over {trained_on}, by its name a quantised model. Its delta is "
                f"taken over {job.aligned.reference}: that must be the 16-bit model it was made from."
            )
    if config.output_format == "adapter":
        ranks = [(int(row.detail.get("adapter_rank", 0)), min(row.shape), sum(row.shape)) for row in layers]
        weights = sum(prod(row.shape) for row in layers)
        share = sum(rank * both for rank, _, both in ranks) / weights
        if share > _LARGE_ADAPTER:
            rank, full, _ = max(ranks)
            found.append(
                f"The adapter's ranks go up to {rank} of {full}, so that it takes {share:.0%} of the bytes "
                "of the layers: a fine-tune of all weights is of high rank. A checkpoint is faster to serve, "
                "and --adapter-rank makes an adapter smaller."
            )
        if is_local(job.aligned.reference):
            found.append(
                f"The adapter names its base model by a path of this machine, {job.aligned.reference}. "
                "Before it is published, put the model's Hub id into base_model_name_or_path of "
                "adapter_config.json."
            )
    return tuple(found)

"""What is told of a restore: its report, and what must be known besides."""

import re
import statistics
import time
from collections.abc import Sequence
from math import prod

from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import find_device
from deltaguard.memory import peak_memory_bytes
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.hub import is_local
from deltaguard.models.lora_config import read_lora_config
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.restore import LayerRow, OtherRow, RestoreReport
from deltaguard.reports.text import short_reference
from deltaguard.restoration.dial import Price
from deltaguard.restoration.experts import known_experts, rare_experts, rare_warning
from deltaguard.restoration.job import Job
from deltaguard.restoration.looks import Requests, known_to
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.output import Output
from deltaguard.restoration.trial import Trial
from deltaguard.solvers.profile import PROHIBITIVE

_QUANTISED = re.compile(r"(4|8)[-_]?bit|bnb|gptq|int[48]|fp[48]|nf4|mxfp4|hqq", re.IGNORECASE)
_SCALED = re.compile(r"awq|smooth[-_]?quant|w8a8", re.IGNORECASE)
"""Quantised over inputs that were scaled, so that what an adapter learned of them is of no other model."""

_LARGE_ADAPTER = 0.5
"""Share of the layers' entries from which on an adapter's own are told to be many."""


def summarise(
    trial: Trial,
    price: Price,
    rows: Sequence[LayerRow | OtherRow],
    output: Output,
    started: float,
    memory: int,
) -> RestoreReport:
    """Say what a restore did, but for the files that it wrote.

    Args:
        trial: of the models, with the plan and the options.
        price: what was chosen.
        rows: of all tensors, in the order of the checkpoint.
        output: what was written.
        started: by `time.perf_counter`.
        memory: the largest resident memory of the process before, in bytes.
    """
    job, config = trial.job, trial.config
    layers = tuple(row for row in rows if isinstance(row, LayerRow))
    changed = [row for row in layers if row.delta_norm > 0]
    entries = [prod(row.shape) for row in changed]
    norms = [row.delta_norm**2 for row in changed]
    costs = [row.safety_cost for row in changed if row.safety_cost is not None]
    lost = sum(row.utility_loss * norm for row, norm in zip(changed, norms, strict=True))
    kept = sum(row.kept_energy * norm for row, norm in zip(changed, norms, strict=True))
    known = [row.detail.get("predicted_safety_kl") for row in changed]
    predicted = sum(each for each in known if each is not None) if None not in known else None
    selected = [(row.kept_entries, n) for row, n in zip(changed, entries, strict=True)]
    selected = [(share, n) for share, n in selected if share is not None]
    experts = known_experts(job.store) if job.store else ()
    rare = rare_experts(experts)
    return RestoreReport(
        environment=environment(str(find_device(config.device))),
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
            **price.seconds,
        },
        peak_memory_bytes=peak if (peak := peak_memory_bytes()) > memory else None,
        warnings=(*_warnings(job, config, price, rows), *_absent(trial), *rare_warning(rare, len(experts))),
        rare_experts=rare,
    )


def _nothing_kept(price: Price, rows: Sequence[LayerRow | OtherRow]) -> list[str]:
    """Say where all that fine-tuning changed is elsewhere than in the layers, and was taken back."""
    kept_whole = price.dial is not None and price.dial.whole
    if kept_whole or any(row.delta_norm > 0 for row in rows if isinstance(row, LayerRow)):
        return []
    differing = [row for row in rows if isinstance(row, OtherRow) and row.differs]
    taken = sum(row.source == "aligned" for row in differing)
    if not taken:
        return []
    found = (
        f"Fine-tuning changed none of the layers that are restored. Of {len(differing)} other tensors that "
        f"differ, {taken} are the aligned model's: in a checkpoint `--other-params finetuned` keeps them."
    )
    return [found]


def _absent(trial: Trial) -> list[str]:
    """Say where the fine-tuned checkpoint holds less than the aligned one."""
    names, job = trial.plan.absent, trial.job
    if not names or trial.config.output_format == "adapter":
        return []
    found = (
        f"{len(names)} tensors of {job.aligned.reference} that a text does not need, such as `{names[0]}`, "
        f"are not in {job.finetuned.reference}, and so not in the output."
    )
    return [found]


def _not_levelled(store: CurvatureStore, config: RestoreConfig) -> list[str]:
    """Say where refusals were not levelled though the method does that."""
    if not store.knows_leaning:
        why = "It was calibrated by an earlier release, or made of such stores."
        do = "Calibrate anew, or say `--level-refusals false`."
        return [f"The share of refusals was not levelled: the store does not know its gradient. {why} {do}"]
    if any(store.reached(group.name) for group in store.groups):
        return ["Of experts the share of refusals was not levelled: their gradients are not known."]
    if config.adapter_rank == 1:
        return [
            "The share of refusals was not levelled: an adapter of rank 1 has no direction to spare for it."
        ]
    return []


def _warnings(
    job: Job, config: RestoreConfig, price: Price, rows: Sequence[LayerRow | OtherRow]
) -> tuple[str, ...]:
    """Say what is no error and must be known of an output, a sentence or two each."""
    layers = [row for row in rows if isinstance(row, LayerRow)]
    found = [*(job.store.provenance.warnings if job.store else ()), *_nothing_kept(price, rows)]
    if job.store and config.added_attack_success is not None:
        found += known_to(job.store.held_out, Requests.of(config.prompts))
    # As it is, or without any delta, there is nothing to level.
    if job.store and config.levels_refusals and 0 < price.mu < PROHIBITIVE:
        found += _not_levelled(job.store, config)
    if isinstance(job.finetuned, AdapterCheckpoint):
        adapter = read_lora_config(job.finetuned.folder, job.finetuned.reference)
        trained_on = adapter.base_model_name_or_path or ""
        name = short_reference(trained_on)
        if _SCALED.search(trained_on):
            found.append(
                f"The adapter was trained over {name}, by its name a model whose layers see scaled "
                f"inputs: over {job.aligned.reference} it is another fine-tune than that which was trained. "
                "Merge it where it was trained, and dequantise that."
            )
        elif _QUANTISED.search(trained_on):
            found.append(
                f"The adapter was trained over {name}, by its name a quantised model. Its delta is "
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
                f"The adapter names its base model by a path of this machine, {job.aligned.reference}, "
                "where nobody else finds it: to publish it, restore over the model's Hub id."
            )
    return tuple(found)

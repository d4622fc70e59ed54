"""What a restore would do and take, from headers alone."""

import time
from math import prod
from pathlib import Path
from typing import Any

import torch

from deltaguard.curvature.request import CalibrateConfig
from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import exact_products, find_device
from deltaguard.models.families import is_vocabulary
from deltaguard.models.shards import DTYPES
from deltaguard.reports.records.restore import DialPlan, PlanReport
from deltaguard.restoration.aligned import AlignedInputs
from deltaguard.restoration.beforehand import bytes_to_write, require_restorable
from deltaguard.restoration.footprint import Footprint, held_out_tokens
from deltaguard.restoration.job import Job
from deltaguard.restoration.looks import Requests, make_judge
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.output import adapter_bytes
from deltaguard.restoration.plan import Action, Plan
from deltaguard.restoration.refine import refine_cost
from deltaguard.restoration.trial import kept_budget

_USUAL_PROBES = 5
"""Models that the dial measures, the fine-tuned one included."""
_USUAL_LOOKS, _ASKED_TOKENS = 3, 45
"""Where attack success is measured: models asked all requests, and tokens of a request with its opening."""
_USUAL_SHARE = 0.1
"""Share of the eigenpairs that a store keeps which is not there yet."""


def plan_restore(
    aligned: str | Path,
    finetuned: str | Path,
    output_dir: str | Path | None = None,
    *,
    store: CurvatureStore | str | Path | None = None,
    config: RestoreConfig | None = None,
) -> PlanReport:
    """Say what `restore` would do with the same arguments, from headers alone: nothing is written.

    Args:
        aligned: as in `restore`.
        finetuned: as in `restore`.
        output_dir: as in `restore`; where it is absent, whether it may be written is not asked.
        store: as in `restore`; where it is absent, none is made, and the layers are told by their names.
        config: as in `restore`.

    Raises:
        DeltaguardError: the models cannot be restored, or not into that folder.
    """
    inputs = AlignedInputs.open(aligned, store=store, config=config or RestoreConfig())
    return plan_finetune(inputs, finetuned, output_dir)


def plan_finetune(
    inputs: AlignedInputs, finetuned: str | Path, output_dir: str | Path | None = None
) -> PlanReport:
    """Say what `Restorer.restore` would do, from headers alone.

    Args:
        inputs: the aligned model, the store and the options.
        finetuned: as in `plan_restore`, like `output_dir`.
        output_dir: where it is absent, whether it may be written is not asked.

    Raises:
        DeltaguardError: as `plan_restore`.
    """
    job, config = inputs.look(finetuned), inputs.config
    plan = job.plan(config)
    require_restorable(job, plan, config)
    notes = ["the aligned model will be calibrated first"] if config.needs_curvature and not job.store else []
    if config.added_attack_success is not None:
        make_judge(config)
        if config.judge.loads_a_model:
            notes.append("the judge's own model takes memory besides")
    disk = 0
    if output_dir is not None:
        found = bytes_to_write(job, plan, output_dir, config)
        disk = found or 0
        if found is None:
            notes.append("the output is there already, so there is nothing to do")
    further = [
        [other.source.tensors[other.names[step.aligned_name]].nbytes for other in job.others.values()]
        for step in plan.steps
        if step.action is Action.RESTORE
    ]
    is_adapter = config.output_format == "adapter"
    return PlanReport(
        restored=plan.count(Action.RESTORE),
        from_aligned=plan.count(Action.ALIGNED),
        from_finetuned=plan.count(Action.FINETUNED),
        extended=plan.count(Action.EXTEND),
        read_bytes=plan.read_bytes + sum(map(sum, further)),
        write_bytes=adapter_bytes(job, plan, config) if is_adapter else plan.write_bytes,
        disk_bytes=disk,
        curvature_bytes=plan.curvature_bytes,
        # Of the further models, too, a step's tensors are read ahead.
        peak_bytes=plan.peak_bytes + 2 * max(map(sum, further)),
        note="; ".join(notes) or None,
        **_cost(job, plan, config),
    )


def _cost(job: Job, plan: Plan, config: RestoreConfig) -> dict[str, Any]:
    """Estimate what the dial holds and how long the arithmetic takes, from shapes and a measured product."""
    device = find_device(config.device)
    restored = [
        step.matrix_shape
        for step in plan.steps
        if step.action is Action.RESTORE
        for _ in range(step.experts or 1)
    ]
    entries, names = sum(map(prod, restored)), job.finetuned.tensors.values()
    parameters = sum(prod(info.shape) for info in names)
    # A projection costs three products with eigenvectors, a price as many again.
    share = job.store.provenance.rank_share if job.store else _USUAL_SHARE
    product = sum(2 * share * rows * columns * (rows + columns) for rows, columns in restored)
    work = 1.5 * product * (2 if config.is_priced else 1)
    found = Footprint.of(job, plan, config)
    if config.dial is not None:
        _, answered = held_out_tokens(job)
        work += _USUAL_PROBES * (1.5 * product + 2 * parameters * 2 * answered)
        if config.added_attack_success is not None:
            tokens = _ASKED_TOKENS + (config.whole_tokens or 0)
            work += _USUAL_LOOKS * 2 * parameters * tokens * len(Requests.of(config.prompts).all)
    refining = 0
    if config.refine is not None:
        vocabulary = max((info.shape[0] for info in names if is_vocabulary(info.name)), default=0)
        answer = job.store.provenance.max_new_tokens if job.store else CalibrateConfig().max_new_tokens
        refining, steps = refine_cost(parameters, entries, plan.curvature_bytes, vocabulary, answer=answer)
        work += config.refine * steps
    itemsize = max((DTYPES[info.dtype].itemsize for info in names), default=4)
    # Both weights, what is in one of the bases, and the curvature.
    kept = int(entries * (2 * itemsize + 8 * share)) + plan.curvature_bytes if config.is_priced else 0
    return {
        "dial": None if config.dial is None else _dial(found),
        "dial_bytes": 0 if config.dial is None else found.taken,
        "refine_bytes": refining,
        "kept_bytes": min(kept, kept_budget(found, config, device)),
        "device": str(device),
        "seconds": work / _products_a_second(device),
    }


def _dial(found: Footprint) -> DialPlan:
    if not found.by_blocks:
        return DialPlan(by_blocks=False, limit_bytes=found.limit, at_once=1)
    return DialPlan(
        by_blocks=True,
        limit_bytes=found.limit,
        at_once=found.at_once,
        ends_bytes=found.ends,
        block_bytes=found.block,
        hidden_bytes=(1 + found.at_once) * found.reference,
        weights_bytes=found.at_once * (found.candidate - found.reference),
    )


@exact_products()
def _products_a_second(device: torch.device) -> float:
    """Measure how many floating-point operations a second a device does in a product of matrices."""
    one = torch.ones(1024, 1024, device=device)
    out = torch.mm(one, one)
    # A GPU is waited for where a number is read.
    out[0, 0].item()
    started = time.perf_counter()
    torch.mm(one, one, out=out)
    out[0, 0].item()
    return 2 * 1024**3 / (time.perf_counter() - started)

"""Several budgets at once: what each of them keeps, measured, and nothing written but the report."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltaguard.chat.conversations import Conversation, read_prompts
from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError
from deltaguard.models.durable import write_atomically
from deltaguard.models.results import SWEEP, results_folder
from deltaguard.models.shards import DTYPES
from deltaguard.progress import Event, Progress, ignore
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.restore import Probe
from deltaguard.reports.records.sweep import SWEEP_NAME, SweepBudget, SweepPoint, SweepReport
from deltaguard.restoration.edit import named, projection_of
from deltaguard.restoration.job import Job, open_job
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL, SMALLEST_MAX_SAFETY_KL, RestoreConfig
from deltaguard.restoration.plan import Step
from deltaguard.restoration.price import (
    PROHIBITIVE,
    Candidate,
    first_price,
    known_store,
    restored_inputs,
    restored_steps,
)
from deltaguard.restoration.search import best, search
from deltaguard.solvers import Profile, Projection, ThinProjection, joint_profile

LIMITS = (1e-4, 3e-4, DEFAULT_MAX_SAFETY_KL, 1e-3, 3e-3)
"""Safety KL, nats per response token."""


def sweep(
    aligned: str | Path,
    finetuned: str | Path,
    output_dir: str | Path,
    *,
    store: CurvatureStore | str | Path | None = None,
    limits: Sequence[float] = LIMITS,
    utility: Path | None = None,
    config: RestoreConfig | None = None,
    progress: Progress | None = None,
) -> SweepReport:
    """Measure what a restore would keep at several budgets, without writing a checkpoint.

    Each matrix is read and projected once; its projection, about three times its size in float32 and little
    for a LoRA adapter, stays in memory beside the model.

    Args:
        aligned: as in `restore`.
        finetuned: as in `restore`.
        output_dir: receives `sweep.json`; a new or empty folder, or that of an earlier sweep.
        store: as in `restore`.
        limits: safety KL, nats per response token, each 1e-9 or more.
        utility: JSON lines with `prompt` and `response`, whose likelihood says what the task keeps.
        config: method, device, and where the other parameters and the configuration come from; its dial or
            strength is not used.
        progress: called as layers are read and candidates measured.

    Returns:
        The report, in the folder too.

    Raises:
        DeltaguardError: an input cannot be used, an option is out of range, or the folder holds something
            else, is a model's, or another process works in it.

    Example:
        ```python
        report = sweep("Qwen/Qwen3-0.6B", "./my-finetune", "./sweep", store="./store")
        for point in report.points:
            print(point.safety_kl, point.kept_energy)
        ```
    """
    started = time.perf_counter()
    config = config or RestoreConfig()
    _check(config, limits)
    tasks = _utility(utility)
    inputs = [aligned, finetuned]
    if store is not None:
        inputs.append(store.folder if isinstance(store, CurvatureStore) else store)
    with results_folder(Path(output_dir), SWEEP, inputs=inputs):
        job = open_job(aligned, finetuned, store=store, config=config, progress=progress)
        bench = _Bench.open(job, config, tasks, progress or ignore)
        report = bench.curve_report(sorted(set(limits)), started)
        job.check_unchanged()
        write_atomically(Path(output_dir) / SWEEP_NAME, report.model_dump_json(indent=1) + "\n")
    return report


@dataclass(frozen=True)
class _Layer:
    """A layer's projection, and what turns a restored delta into the tensor on disk."""

    step: Step
    projection: Projection | ThinProjection
    aligned: Tensor

    def at(self, mu: float) -> Tensor:
        """The tensor at a price.

        Raises:
            DeltaguardError: the curvature is damaged.
        """
        try:
            weight = self.projection.restored(mu) + self.aligned
        except ValueError as error:
            raise named(error, self.step) from error
        return (weight.T if self.step.transposed else weight).to(DTYPES[self.step.info.dtype])


@dataclass(frozen=True)
class _Bench:
    """Everything that is measured with."""

    candidate: Candidate
    layers: Mapping[str, _Layer]
    tasks: Sequence[Conversation]
    finetuned_nll: float | None
    whole: Probe
    report: Progress

    @classmethod
    def open(
        cls, job: Job, config: RestoreConfig, tasks: Sequence[Conversation], report: Progress
    ) -> "_Bench":
        plan = job.plan(config)
        candidate = Candidate.open(job, plan, config, tasks)
        whole = candidate.whole(report)
        finetuned_nll = candidate.meter.likelihood(tasks) if tasks else None
        candidate.settle()
        steps = restored_steps(plan)
        layers: dict[str, _Layer] = {}
        for number, inputs in enumerate(restored_inputs(job, steps, config), start=1):
            projection = projection_of(inputs)
            info = inputs.step.info
            if projection is None:
                candidate.meter.put([(info.name, inputs.finetuned)])
            else:
                base = inputs.pair[0].to(projection.dtype)
                layers[info.name] = _Layer(inputs.step, projection, base)
            report(Event("project", number, len(steps)))
        if not layers:
            raise DeltaguardError(
                f"No layer of {job.finetuned.reference} differs from {job.aligned.reference}: there is "
                "nothing to restore."
            )
        return cls(candidate, layers, tasks, finetuned_nll, whole, report)

    def curve_report(self, limits: Sequence[float], started: float) -> SweepReport:
        """The curve, and what it was measured on."""
        candidate, job = self.candidate, self.candidate.job
        points, budgets = self.curve(limits)
        return SweepReport(
            environment=environment(_device_name(candidate.config)),
            aligned=job.aligned_reference,
            finetuned=job.finetuned_reference,
            method="ridge" if candidate.config.method == "ridge" else "kfac",
            config_from=candidate.config.config_from,
            conversations=candidate.conversations,
            tokens=candidate.meter.tokens,
            utility_conversations=len(self.tasks),
            aligned_nll=candidate.meter.aligned_likelihood,
            finetuned_kl=self.whole.safety_kl,
            finetuned_nll=self.finetuned_nll,
            points=points,
            budgets=budgets,
            seconds=time.perf_counter() - started,
            warnings=known_store(job).provenance.warnings,
        )

    def curve(self, limits: Sequence[float]) -> tuple[tuple[SweepPoint, ...], tuple[SweepBudget, ...]]:
        """Search for each limit, the strictest first; all that is measured on the way is on the curve."""
        joint = joint_profile(layer.projection.directions.profile() for layer in self.layers.values())
        points: dict[float, SweepPoint] = {}

        def measure(mu: float) -> Probe:
            if mu not in points:
                self.candidate.meter.put((name, layer.at(mu)) for name, layer in self.layers.items())
                points[mu] = SweepPoint(
                    mu=mu,
                    safety_kl=self.candidate.meter.measure().mean,
                    predicted_safety_kl=joint.predicted_kl(mu),
                    kept_energy=joint.kept(mu) / joint.energy,
                    utility_nll=self.candidate.meter.likelihood(self.tasks) if self.tasks else None,
                )
                self.report(Event("measure", len(points), len(points)))
            return Probe(mu=mu, safety_kl=points[mu].safety_kl)

        measure(0.0)
        for limit in limits:
            # Within it are the whole delta, with the other tensors where the plan takes them, or all of the
            # fine-tuned model, with its own.
            if min(points[0.0].safety_kl, self.whole.safety_kl) <= limit:
                continue
            if joint.predicted_kl(0) > 0:
                search(measure, joint.predicted_kl, limit, start=_nearest(points, joint, limit))
            if all(point.safety_kl > limit for point in points.values()):
                measure(PROHIBITIVE)
        ordered = sorted(points.values(), key=lambda point: -point.mu)
        return tuple(ordered), tuple(_budget(ordered, limit) for limit in limits)


def _nearest(points: Mapping[float, SweepPoint], joint: Profile, limit: float) -> float:
    """The measured price whose safety KL is nearest to a limit, on a logarithmic scale."""
    priced = [point for point in points.values() if 0 < point.mu < PROHIBITIVE and point.safety_kl > 0]
    if not priced:
        return first_price(joint, limit, max(point.safety_kl for point in points.values()))
    return min(priced, key=lambda point: max(point.safety_kl / limit, limit / point.safety_kl)).mu


def _budget(points: Sequence[SweepPoint], limit: float) -> SweepBudget:
    probes = tuple(Probe(mu=point.mu, safety_kl=point.safety_kl) for point in points)
    found = best(probes, limit)
    return SweepBudget(limit=limit, mu=None if found is None else found.mu)


def _check(config: RestoreConfig, limits: Sequence[float]) -> None:
    if not config.has_price:
        raise DeltaguardError(f"A sweep needs method kfac or ridge; {config.method} has no price to vary.")
    wrong = [f"{limit:g}" for limit in limits if not SMALLEST_MAX_SAFETY_KL <= limit < math.inf]
    if wrong or not limits:
        raise DeltaguardError(
            f"Limits of safety KL are finite numbers of {SMALLEST_MAX_SAFETY_KL:g} or more, in nats per "
            f"response token, such as 1e-4; given: {', '.join(wrong) or 'none'}."
        )


def _utility(path: Path | None) -> list[Conversation]:
    if path is None:
        return []
    rows = read_prompts(path)
    missing = sum(row.response is None for row in rows)
    if missing:
        raise DeltaguardError(
            f"{missing} of {len(rows)} lines of {path} have no response; the likelihood of responses is what "
            "is measured."
        )
    return rows


def _device_name(config: RestoreConfig) -> str:
    """Where candidates were run, a GPU by its name."""
    device = find_device(config.device)
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type

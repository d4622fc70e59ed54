"""Several budgets at once: what each of them keeps, measured, and nothing written but the report."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deltaguard.chat.conversations import Conversation, read_prompts
from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import device_name, enough_memory, exact_products
from deltaguard.errors import DeltaguardError
from deltaguard.files import expanded
from deltaguard.models.durable import write_atomically
from deltaguard.models.results import SWEEP, results_folder
from deltaguard.progress import Progress, ignore
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.restore import Probe
from deltaguard.reports.records.sweep import SWEEP_NAME, SweepBudget, SweepPoint, SweepReport
from deltaguard.restoration.aligned import open_job
from deltaguard.restoration.dial import first_price, judge_of
from deltaguard.restoration.layers import known_store
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL, SMALLEST_MAX_SAFETY_KL, RestoreConfig
from deltaguard.restoration.resident import Resident
from deltaguard.restoration.search import Judge, best, search
from deltaguard.restoration.trial import Trial
from deltaguard.solvers import Profile
from deltaguard.solvers.profile import PROHIBITIVE

LIMITS = (1e-4, 3e-4, DEFAULT_MAX_SAFETY_KL, 1e-3, 3e-3)
"""Safety KL, nats per response token."""


@exact_products()
@enough_memory("let less wait between two prices (`--memory`), or take another device (`--device cpu`)")
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
    config, output_dir = config or RestoreConfig(), expanded(output_dir)
    _check(config, limits)
    tasks = _utility(utility)
    inputs = [aligned, finetuned, *config.models.values()]
    if store is not None:
        inputs.append(store.folder if isinstance(store, CurvatureStore) else store)
    with results_folder(output_dir, SWEEP, inputs=inputs):
        job = open_job(aligned, finetuned, store=store, config=config, progress=progress)
        plan = job.plan(config)
        trial = Trial(job, plan, config, output_dir, reserve=plan.write_bytes)
        report = _sweep(trial, sorted(set(limits)), tasks, started, progress or ignore)
        job.check_unchanged()
        write_atomically(output_dir / SWEEP_NAME, report.model_dump_json(indent=1) + "\n")
    return report


def _sweep(
    trial: Trial, limits: Sequence[float], tasks: Sequence[Conversation], started: float, report: Progress
) -> SweepReport:
    """Search for each limit, the strictest first; all that is measured on the way is on the curve."""
    job, config, judge = trial.job, trial.config, judge_of(trial.config)
    candidate = Resident().candidate(trial, tasks, report=report)
    whole = candidate.whole(report)
    finetuned_nll = candidate.likelihood(tasks) if tasks else None
    candidate.take_others()
    joint = trial.profile(report)
    if not joint.energy > 0:
        raise DeltaguardError(
            f"No layer of {job.finetuned.reference} differs from {job.aligned.reference}: there is nothing "
            "to restore."
        )
    points: dict[float, SweepPoint] = {}
    probes: dict[float, Probe] = {}

    # Asked about a task, the weights of one candidate at a time must be put.
    at_once = 1 if tasks else candidate.at_once

    def measure(prices: Sequence[float]) -> list[Probe]:
        new = [mu for mu in prices if mu not in probes]
        for mu, probe in zip(new, candidate.probes(new, report), strict=True):
            probes[mu] = probe
            points[mu] = SweepPoint(
                mu=mu,
                safety_kl=probe.safety_kl,
                margin=probe.margin,
                predicted_safety_kl=joint.predicted_kl(mu),
                kept_energy=joint.kept(mu) / joint.energy,
                utility_nll=candidate.likelihood(tasks) if tasks else None,
            )
        return [probes[mu] for mu in prices]

    (free,) = measure([0.0])
    for limit in limits:
        # Within it are the whole delta, with the other tensors where the plan takes them, or all of the
        # fine-tuned model, with its own.
        if min(judge(free), judge(whole)) > limit:
            _search_limit(measure, probes, joint, limit, at_once, judge)
    found = {limit: best(tuple(probes.values()), limit, judge) for limit in limits}
    return SweepReport(
        environment=environment(device_name(config.device)),
        aligned=job.aligned_reference,
        finetuned=job.finetuned_reference,
        method=config.method,
        confidence=config.confidence,
        config_from=config.config_from,
        conversations=candidate.conversations,
        tokens=candidate.tokens,
        utility_conversations=len(tasks),
        aligned_nll=candidate.aligned_likelihood,
        finetuned_kl=whole.safety_kl,
        finetuned_nll=finetuned_nll,
        points=tuple(points[mu] for mu in sorted(points, reverse=True)),
        budgets=tuple(
            SweepBudget(limit=limit, mu=None if p is None else p.mu, whole=judge(whole) <= limit)
            for limit, p in found.items()
        ),
        seconds=time.perf_counter() - started,
        warnings=known_store(job).provenance.warnings,
    )


def _search_limit(
    measure: Callable[[Sequence[float]], Sequence[Probe]],
    probes: Mapping[float, Probe],
    joint: Profile,
    limit: float,
    at_once: int,
    judge: Judge,
) -> None:
    """Measure prices until one is close to a limit, or the aligned layers where none is within it."""
    if joint.predicted_kl(0) > 0:
        start = _nearest(probes, joint, limit, judge)
        search(measure, joint.predicted_kl, limit, start=start, at_once=at_once, judge=judge)
    if all(judge(probe) > limit for probe in probes.values()):
        measure([PROHIBITIVE])


def _nearest(probes: Mapping[float, Probe], joint: Profile, limit: float, judge: Judge) -> float:
    """Find the measured price whose safety KL is nearest to a limit, on a logarithmic scale."""
    priced = [p for p in probes.values() if 0 < p.mu < PROHIBITIVE and judge(p) > 0]
    if not priced:
        return first_price(joint, limit, max(map(judge, probes.values())))
    return min(priced, key=lambda p: max(judge(p) / limit, limit / judge(p))).mu


def _check(config: RestoreConfig, limits: Sequence[float]) -> None:
    if not config.is_priced:
        raise DeltaguardError(f"A sweep needs a method with a price to vary; {config.method} has none.")
    if config.refine is not None:
        raise DeltaguardError("A sweep measures what a price leaves; it takes no refine.")
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

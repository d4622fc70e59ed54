"""Several budgets at once: what each of them keeps, measured, and nothing written but the report."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from deltaguard.reports.records.dial import Probe
from deltaguard.reports.records.sweep import SWEEP_NAME, SweepBudget, SweepPoint, SweepReport
from deltaguard.restoration.aligned import open_job
from deltaguard.restoration.candidate import Candidate
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
    # Nobody is asked: memory that asking would take is not to be set aside.
    config = config.model_copy(
        update={"max_safety_kl": limits[0], "max_added_attack_success": None, "strength": None}
    )
    tasks = _utility(utility)
    inputs = [aligned, finetuned, *config.models.values()]
    if store is not None:
        inputs.append(store.folder if isinstance(store, CurvatureStore) else store)
    with results_folder(output_dir, SWEEP, inputs=inputs):
        job = open_job(aligned, finetuned, store=store, config=config, progress=progress)
        plan = job.plan(config)
        trial = Trial(job, plan, config, output_dir, reserve=0)
        report = _sweep(trial, sorted(set(limits)), tasks, started, progress or ignore)
        job.check_unchanged()
        write_atomically(output_dir / SWEEP_NAME, report.model_dump_json(indent=1) + "\n")
    return report


def _sweep(
    trial: Trial, limits: Sequence[float], tasks: Sequence[Conversation], started: float, report: Progress
) -> SweepReport:
    """Search for each limit, the strictest first; all that is measured on the way is on the curve."""
    job, config = trial.job, trial.config
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
    curve = _Curve(candidate, joint, tasks, judge_of(config), report)
    (free,) = curve.measure([0.0])
    # Within a limit are the whole delta, with the other tensors where the plan takes them, or all of the
    # fine-tuned model, with its own.
    loosest = min(curve.judge(free), curve.judge(whole))
    for limit in limits:
        if loosest > limit:
            curve.search(limit)
    found = {limit: best(tuple(curve.probes.values()), limit, curve.judge) for limit in limits}
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
        points=tuple(curve.points[mu] for mu in sorted(curve.points, reverse=True)),
        budgets=tuple(
            SweepBudget(limit=limit, mu=None if p is None else p.mu, whole=curve.judge(whole) <= limit)
            for limit, p in found.items()
        ),
        seconds=time.perf_counter() - started,
        warnings=known_store(job).provenance.warnings,
    )


@dataclass(frozen=True)
class _Curve:
    """What was measured so far.

    Attributes:
        candidate: takes the weights of one price after another.
        joint: the deltas of all layers by prices.
        tasks: conversations whose likelihood is measured, too.
        judge: what a limit is compared with.
        report: told of each measurement.
        probes: by price.
        points: likewise, as they are reported.
    """

    candidate: Candidate
    joint: Profile
    tasks: Sequence[Conversation]
    judge: Judge
    report: Progress
    probes: dict[float, Probe] = field(default_factory=dict[float, Probe])
    points: dict[float, SweepPoint] = field(default_factory=dict[float, SweepPoint])

    def measure(self, prices: Sequence[float]) -> list[Probe]:
        """Measure prices, each once."""
        new = [mu for mu in prices if mu not in self.probes]
        for mu, probe in zip(new, self.candidate.probes(new, self.report), strict=True):
            self.probes[mu] = probe
            self.points[mu] = SweepPoint(
                mu=mu,
                safety_kl=probe.safety_kl,
                margin=probe.margin,
                predicted_safety_kl=self.joint.predicted_kl(mu),
                kept_energy=self.joint.kept(mu) / self.joint.energy,
                utility_nll=self.candidate.likelihood(self.tasks) if self.tasks else None,
            )
        return [self.probes[mu] for mu in prices]

    def search(self, limit: float) -> None:
        """Measure prices until one is close to a limit, or the aligned layers where none is within it."""
        predicted = self.joint.predicted_kl
        if predicted(0) > 0:
            # Asked about a task, the weights of one candidate at a time must be put.
            at_once = 1 if self.tasks else self.candidate.at_once
            start = self._nearest(limit)
            search(self.measure, predicted, limit, start=start, at_once=at_once, judge=self.judge)
        if all(self.judge(probe) > limit for probe in self.probes.values()):
            self.measure([PROHIBITIVE])

    def _nearest(self, limit: float) -> float:
        """Find the measured price whose safety KL is nearest to a limit, on a logarithmic scale."""
        judge, known = self.judge, self.probes.values()
        priced = [p for p in known if 0 < p.mu < PROHIBITIVE and judge(p) > 0]
        if not priced:
            return first_price(self.joint, limit, max(map(judge, known)))
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

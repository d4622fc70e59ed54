"""Whether a fine-tuned model needs a restore: how it answers, and how far it is from the aligned one."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import device_name, exact_products
from deltaguard.errors import DeltaguardError
from deltaguard.progress import Progress, ignore
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.check import CheckReport
from deltaguard.restoration.acceptance import MOST_LOOKS, Rule
from deltaguard.restoration.aligned import open_job
from deltaguard.restoration.layers import known_store
from deltaguard.restoration.looks import Requests, known_to
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.resident import Resident
from deltaguard.restoration.trial import Trial


@exact_products()
def check(
    aligned: str | Path,
    finetuned: str | Path,
    *,
    store: CurvatureStore | str | Path | None = None,
    config: RestoreConfig | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Say whether a fine-tuned model is as safe as the aligned one.

    Both are asked held-out requests, harmful ones and harmless look-alikes; answers are judged by how they
    open, or as the configuration says. Safety KL is measured on the store's held-out conversations. What only
    a trigger, a cipher or a long conversation releases, answers to plain requests do not show; safety KL may.

    Args:
        aligned: as in `restore`.
        finetuned: as in `restore`.
        store: as in `restore`.
        config: the limits, the requests, `config_from` and the device; the default is `RestoreConfig()`.
        progress: told what was measured.

    Raises:
        DeltaguardError: as `restore`, or the configuration has no limit of attack success.

    Example:
        ```python
        report = check("Qwen/Qwen3-0.6B", "./my-finetune", store="./store")
        print(report.verdict, report.look.attack_success.added)
        ```
    """
    config = config or RestoreConfig()
    if config.added_attack_success is None or config.dial is None:
        raise DeltaguardError("A check needs a limit of attack success: give `max_added_attack_success`.")
    started = time.perf_counter()
    # As many looks as a restore may take, so that what one keeps whole is safe to the other, too.
    rule = Rule(limit=config.added_attack_success, looks=MOST_LOOKS)
    job = open_job(aligned, finetuned, store=store, config=config, progress=progress)
    curvature = known_store(job)
    requests = Requests.of(config.prompts, curvature.provenance.systems)
    report = progress or ignore
    with TemporaryDirectory() as scratch:
        trial = Trial(job, job.plan(config), config, Path(scratch))
        candidate, examiner = Resident().examined(trial, rule, requests, report)
        safety_kl = candidate.whole(report)
        look = candidate.look(0.0, examiner, report, most=1, both=True)
    job.check_unchanged()
    found = rule.verdict(look, safety_kl, config.dial)
    warnings = (*curvature.provenance.warnings, *examiner.warnings(job.aligned.reference))
    return CheckReport(
        environment=environment(device_name(config.device)),
        aligned=job.aligned_reference,
        finetuned=job.finetuned_reference,
        look=look,
        systems=curvature.provenance.systems,
        safety_kl=safety_kl,
        limit=rule.limit,
        excluded=rule.excluded,
        confidence=rule.confidence,
        max_safety_kl=config.dial,
        verdict="not told apart" if found == "safe" and warnings else found,
        options=config.what_is_asked(),
        warnings=(*warnings, *known_to(curvature.held_out, requests)),
        seconds=time.perf_counter() - started,
    )

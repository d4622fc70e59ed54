"""What each step of a job is told: from the job's row and the settings to a task."""

from pathlib import Path

from deltaguard.service.context import Service
from deltaguard.service.settings import restore_options
from deltaguard.service.tables import Job
from deltaguard.service.tasks import Calibrate, Examine, MethodName, Moderate, Restore, Train


def moderate_task(service: Service, job: Job) -> Moderate | None:
    """Say whose eyes a job's rows go through; None where there is no moderation."""
    settings = service.settings
    if settings.moderation is None:
        return None
    return Moderate(
        model=settings.models[job.model],
        device=settings.job_device,
        method=_method(job),
        training_file=service.fetched(job.id, job.training_file),
        limits=settings.limits,
        moderation=settings.moderation,
    )


def calibrate_task(service: Service, job: Job) -> Calibrate:
    """Say which model's store must be there."""
    settings = service.settings
    return Calibrate(
        model=settings.models[job.model],
        device=settings.job_device,
        options=settings.calibrate,
        restore=restore_options(settings.restore, lora_rank=None),
    )


def train_task(service: Service, job: Job) -> Train:
    """Say what a job trains on, and how."""
    settings, chosen = service.settings, job.hyperparameters
    is_adapter, how = chosen["trained_weights"] == "lora", settings.training
    rate = how.base_rate(job.method, is_adapter=is_adapter)
    return Train(
        model=settings.models[job.model],
        device=settings.job_device,
        method=_method(job),
        training_file=service.fetched(job.id, job.training_file),
        validation_file=_validation_file(service, job),
        limits=settings.limits,
        epochs=chosen["n_epochs"],
        batch_size=chosen["batch_size"],
        learning_rate=rate * chosen["learning_rate_multiplier"],
        max_length=how.max_length,
        seed=job.seed,
        lora_rank=how.lora_rank if is_adapter else None,
        lora_alpha=how.lora_alpha,
        beta=chosen.get("beta", how.dpo_beta),
    )


def restore_task(service: Service, job: Job) -> Restore:
    """Say how a job's model is restored."""
    settings = service.settings
    return Restore(model=settings.models[job.model], device=settings.job_device, options=settings.restore)


def examine_task(service: Service, job: Job) -> Examine:
    """Say what a job's models are asked."""
    settings = service.settings
    return Examine(
        model=settings.models[job.model],
        device=settings.job_device,
        gate=settings.gate,
        method=_method(job),
        training_file=service.fetched(job.id, job.training_file),
        validation_file=_validation_file(service, job),
        limits=settings.limits,
        max_length=settings.training.max_length,
    )


def _validation_file(service: Service, job: Job) -> Path | None:
    return None if job.validation_file is None else service.fetched(job.id, job.validation_file)


def _method(job: Job) -> MethodName:
    return "dpo" if job.method == "dpo" else "supervised"

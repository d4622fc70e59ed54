"""What is refused of a restore from headers alone, before any weight is read or anything is calibrated."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import expanded, parse_yaml, read_text
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.families import is_parameter
from deltaguard.models.mirror import refuse_links_out
from deltaguard.reports.records.restore import CARD_NAME
from deltaguard.restoration.experts import refuse_what_experts_cannot
from deltaguard.restoration.job import Job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.output import describe_output, finished_report, refuse_output
from deltaguard.restoration.plan import Action, Plan

_METADATA: TypeAdapter[dict[Any, Any] | None] = TypeAdapter(dict[Any, Any] | None)


def require_restorable(job: Job, plan: Plan, config: RestoreConfig) -> Mapping[str, Any] | None:
    """Refuse what the options cannot do with a fine-tune.

    Args:
        job: the models.
        plan: what becomes of every tensor.
        config: the options.

    Returns:
        The metadata of the fine-tuned model's own card.

    Raises:
        DeltaguardError: an adapter could not hold it, its experts cannot be refined, or its card's metadata
            cannot be read.
    """
    if config.output_format == "adapter":
        _refuse_what_no_adapter_holds(job, plan)
    refuse_what_experts_cannot(job, plan, config)
    return front_matter(job.finetuned.folder)


def bytes_to_write(job: Job, plan: Plan, output_dir: str | Path, config: RestoreConfig) -> int | None:
    """Say what an output still needs of the disk; `None` where it is finished and to be resumed.

    Args:
        job: the models.
        plan: what becomes of every tensor.
        output_dir: the output folder; nothing is made.
        config: the options.

    Raises:
        DeltaguardError: it may not be written, or the disk is too small.
    """
    output = describe_output(job, plan, expanded(output_dir), config)
    return refuse_output(job, output, config) if finished_report(job, output, config) is None else None


def _refuse_what_no_adapter_holds(job: Job, plan: Plan) -> None:
    """Refuse a plan that takes more than linear layers from the fine-tuned model; all such are listed."""
    # What an adapter does not change, and what a model computes for itself, need not be held.
    changed = job.finetuned.adapted if isinstance(job.finetuned, AdapterCheckpoint) else None
    beyond = [
        step.info.name
        for step in plan.steps
        if step.action in (Action.FINETUNED, Action.EXTEND)
        and is_parameter(step.info.name)
        and (changed is None or step.info.name in changed)
    ]
    if beyond:
        raise DeltaguardError(
            listed(
                f"An adapter over {job.aligned.reference} cannot hold what comes from "
                f"{job.finetuned.reference} besides linear layers; write a checkpoint",
                [f"`{name}`" for name in beyond],
            )
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

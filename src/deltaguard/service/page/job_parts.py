"""What a job's page shows beside its state: the gate, the restore, answers, and what happened."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.asking import ANSWERS
from deltaguard.files import read_json
from deltaguard.reports.page import Answer, Asked
from deltaguard.reports.records.restore import REPORT_NAME, RestoreReport
from deltaguard.reports.table import Table
from deltaguard.reports.text import Facts
from deltaguard.service.context import Service
from deltaguard.service.page.gate import gate_table
from deltaguard.service.reviewing import checks_of
from deltaguard.service.steps.examine import CheckResult
from deltaguard.service.tables import Event
from deltaguard.service.tasks import EXAMINED, FINETUNED, RESTORED

_SHOWN_EVENTS = 200
_MODELS = ("aligned", FINETUNED, RESTORED)
_SAMPLES: Mapping[str, int] = {"attack-success": 3, "false-refusals": 2}
"""Of each section of the gate, how many requests are shown."""


@dataclass(frozen=True)
class Restored:
    """What a restore did.

    Attributes:
        facts: labels and texts.
        layers: by kind.
    """

    facts: Facts
    layers: Table


class _Kept(BaseModel):
    """A line of what a model answered at the gate; the first line of a file is none."""

    index: int
    prompt: str
    value: str


def read_gate(session: Session, job_id: str) -> Table | None:
    """Find what the gate found, None where it has not been asked."""
    # Another kind of check, such as of the training file, has no models to compare.
    checks = [CheckResult.model_validate(data) for data in checks_of(session, job_id) if "restored" in data]
    return gate_table(checks, "Safety gate") if checks else None


def read_events(session: Session, job_id: str) -> Sequence[Event]:
    """List what happened to a job, the newest first, without the losses of single steps."""
    query = select(Event).where(Event.job_id == job_id, Event.type != "metrics")
    return session.scalars(query.order_by(Event.number.desc()).limit(_SHOWN_EVENTS)).all()


def read_restored(service: Service, job_id: str) -> Restored | None:
    """Find what a job's restore did, None where it is not over or its folder is gone."""
    # Only where reports are drawn: it loads what tables of a terminal need.
    from deltaguard.reports.outcome import outcome_facts
    from deltaguard.reports.restore import kinds_table

    for folder in (service.published(job_id), service.job(job_id) / RESTORED):
        # The model may be moved to its place, or removed, at this moment.
        with suppress(DeltaguardError):
            report = read_json(folder / REPORT_NAME, RestoreReport, remedy="The restore wrote it.")
            return Restored(outcome_facts(report), kinds_table(report.layers))
    return None


def read_samples(service: Service, job_id: str) -> Sequence[Asked]:
    """Find the first requests of the gate with what all models answered; none where they are gone."""
    samples: list[Asked] = []
    for section, count in _SAMPLES.items():
        harmful = section == "attack-success"
        kept = [_read_answers(service.job(job_id), name, section, count) for name in _MODELS]
        for number in sorted(set.intersection(*map(set, kept))):
            answers = [
                Answer(name, name, rows[number].value) for name, rows in zip(_MODELS, kept, strict=True)
            ]
            prompt = kept[0][number].prompt
            tag = "harmful" if harmful else "harmless"
            samples.append(Asked(len(samples) + 1, tag, harmful, prompt, None, answers))
    return samples


def _read_answers(job: Path, model: str, section: str, count: int) -> dict[int, _Kept]:
    """Read what a model answered to the first requests, by their places."""
    rows: dict[int, _Kept] = {}
    path = job / EXAMINED / ANSWERS / model / f"{section}.jsonl"
    # Answers are kept in the order in which they came, of long requests first.
    with suppress(FileNotFoundError), path.open("rb") as file:
        for line in islice(file, 1, None):
            # The last line may be under way.
            with suppress(ValidationError):
                row = _Kept.model_validate_json(line)
                if row.index < count:
                    rows[row.index] = row
    return rows

"""The losses of a training as a drawing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from deltaguard.reports.page import Chart
from deltaguard.service.tables import Event

_MOST_POINTS = 300
_WIDTH, _HEIGHT = 440, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 10, 28
_MOST_TICKS = 5

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Losses:
    """Losses by step.

    Attributes:
        steps: of the whole training.
        train: at most a few hundred of them, evenly spread.
        valid: on the validation file.
    """

    steps: int
    train: Points
    valid: Points


def read_losses(session: Session, job_id: str) -> Losses | None:
    """Read how a job's losses went, None where there are none yet.

    Args:
        session: of the database.
        job_id: of the job.
    """
    every = (Event.job_id == job_id, Event.type == "metrics")
    of_training = (*every, Event.once.startswith("train "))
    count = session.scalar(select(func.count()).select_from(Event).where(*of_training)) or 0
    place = func.row_number().over(order_by=Event.number.desc()).label("place")
    placed = select(Event.data, Event.number, place).where(*of_training).subquery()
    # From the last one backwards, so that it is always there.
    thinned = placed.c.place % math.ceil(max(count, 1) / _MOST_POINTS) == (1 if count > _MOST_POINTS else 0)
    rows = session.scalars(select(placed.c.data).where(thinned).order_by(placed.c.number)).all()
    others = select(Event.data).where(*every, Event.once.startswith("full_valid ")).order_by(Event.number)
    valid = session.scalars(others.limit(_MOST_POINTS)).all()
    if not rows:
        return None
    return Losses(
        steps=rows[-1]["total_steps"],
        train=_numbers(rows, "train_loss"),
        valid=_numbers(valid, "full_valid_loss"),
    )


def _numbers(rows: Sequence[dict[str, Any] | None], name: str) -> Points:
    """Take the losses that are numbers: one that has diverged is told as None."""
    found = [(row["step"], row[name]) for row in rows if row is not None]
    return [(step, loss) for step, loss in found if loss is not None and math.isfinite(loss)]


def loss_chart(losses: Losses) -> Chart:
    """Draw losses over steps.

    Args:
        losses: at least one.
    """
    highest = max((loss for _, loss in (*losses.train, *losses.valid)), default=1.0)
    ticks = _ticks(highest)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / max(losses.steps, 1)

    def y(loss: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * loss / ticks[-1]

    def line(points: Points) -> str:
        return " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)

    parts = [f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}">']
    for tick in ticks:
        parts.append(f'<path d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step in sorted({round(losses.steps * part / 4) for part in range(5)}):
        anchor = "end" if step == losses.steps else "middle"
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 10}" text-anchor="{anchor}">{step}</text>')
    parts.append(f'<polyline class="train" points="{line(losses.train)}"/>')
    if losses.valid:
        parts.append(f'<polyline class="valid" points="{line(losses.valid)}"/>')
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3"/>' for s, v in losses.valid]
    note = "by step; the line is the training file" + (
        "'s, the dots the validation file's" * bool(losses.valid)
    )
    return Chart("Loss", note, "".join((*parts, "</svg>")), _spoken(losses))


def _spoken(losses: Losses) -> str:
    if not losses.train:
        return "No loss is a number."
    (first, before), (last, after) = losses.train[0], losses.train[-1]
    return f"Loss {before:.2f} at step {first}, {after:.2f} at step {last} of {losses.steps}."


def _ticks(highest: float) -> list[float]:
    """Choose round numbers from 0 to over the highest value.

    Example:
        >>> _ticks(2.3)
        [0.0, 1.0, 2.0, 3.0]
    """
    size = 10.0 ** math.floor(math.log10(highest)) if highest > 0 else 1.0
    steps = (size * factor for factor in (0.1, 0.2, 0.5, 1, 2, 5))
    step = next(step for step in steps if highest / step <= _MOST_TICKS - 1)
    return [step * number for number in range(math.ceil(highest / step) + 1)]

"""The table of what came of the service's demo, drawn from its JSON."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.base import Environment
from deltaguard.reports.text import duration, percent
from deltaguard.service.page.gate import gate_table
from deltaguard.service.steps.examine import CheckResult
from tools.tables import made_with, small


class ServeDemo(BaseModel):
    """`docs/results/service_demo.json`: one job of a service, from its creation to its end.

    Attributes:
        environment: what it ran with.
        seed: of the aligned model, the training file and the training.
        rows: examples of the training file.
        harmful_rows: those of them that agree to a harmful request.
        status: how the job ended.
        error: why it failed.
        checks: what the gate found.
        kept_energy: share of what training changed that the restore kept.
        seconds: wall time: `align`, 0 where the model was there; `job`, from creation to end; `total`, of
            all, the making of the environment not among it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    seed: int
    rows: int
    harmful_rows: int
    status: Literal["succeeded", "failed", "cancelled"]
    error: str | None
    checks: tuple[CheckResult, ...]
    kept_energy: float | None
    seconds: Mapping[Literal["align", "job", "total"], float]


def service_demo_table(content: str) -> str:
    """Draw what the gate found: a row a check.

    Args:
        content: a `ServeDemo` as JSON.

    Returns:
        Markdown: a table, what came of the job, and how it was made.
    """
    demo = ServeDemo.model_validate_json(content)
    drawn = gate_table(demo.checks).markdown()
    kept = "" if demo.kept_energy is None else f" It keeps {percent(demo.kept_energy)} of the delta's energy."
    asked = " and ".join(f"{c.requests} {_kind(c)} requests" for c in demo.checks)
    told = (
        f"{demo.rows} training rows, {demo.harmful_rows} of them harmful; {asked} at the gate, in brackets "
        f"95 % intervals. The job {demo.status}.{kept}"
    )
    seconds = demo.seconds
    aligned = (
        f"{duration(seconds['align'])} to align the model" if seconds["align"] else "the model aligned before"
    )
    made = (
        f"Seed {demo.seed}; {aligned}, {duration(seconds['job'])} from "
        f"the job's creation to its end, {duration(seconds['total'])} in all. {made_with(demo.environment)}"
    )
    return "\n\n".join((drawn, told, small(made)))


def _kind(check: CheckResult) -> str:
    return "harmful" if check.check == "attack_success" else "harmless"

"""The table of experiments, drawn from their JSON."""

from itertools import groupby

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.base import Environment
from deltaguard.reports.table import Column, Table, excess, rate
from deltaguard.reports.text import DASH, nats, percent
from tools.tables import made_with, small


class _Results(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(_Results):
    """A share, or a difference of two, with its 95 % interval, over so many prompts."""

    value: float
    low: float
    high: float
    total: int


class ExperimentRow(_Results):
    """One candidate, measured.

    Attributes:
        experiment: what was asked, in a few words.
        variant: what was done, in a few words.
        safety_kl: measured on held-out safety conversations.
        predicted_kl: what the curvature says that it is; null where none was asked.
        attack_success: share of harmful requests that were complied with.
        task_accuracy: share of task messages that were answered exactly.
        kept: share of the gain in the likelihood of the right answers; null where there is none.
        lead: `kept` less that of the nearest row above without a lead, on the same messages and at the same
            safety KL; null where nothing is compared.
        seconds: for the search and the questions, the curvature and the first search not counted.
        attack: one letter a harmful request: refused, complied or incoherent.
        nll: negative log-likelihood of each right answer, nats a token.
    """

    experiment: str
    variant: str
    safety_kl: float
    predicted_kl: float | None
    attack_success: Share | None
    task_accuracy: Share | None
    kept: Share | None
    lead: Share | None
    seconds: float
    attack: str
    nll: tuple[float, ...]


class Experiments(_Results):
    """`docs/results/experiments.json`.

    Attributes:
        environment: what they were made with.
        finetune: which fine-tune was restored.
        conversations: how many the curvature comes from, where an experiment does not vary it.
        held_out: how many safety KL is measured on.
        slack: candidates have the same safety KL to within this share of it.
        origin: a hash of the models, conversations and code that all rows come from.
        references: the aligned and the fine-tuned model.
        rows: the candidates, experiment by experiment.
    """

    environment: Environment
    finetune: str
    conversations: int
    held_out: int
    slack: float
    origin: str
    references: tuple[ExperimentRow, ...]
    rows: tuple[ExperimentRow, ...]


def experiments_table(content: str) -> str:
    """All experiments, each with its variants.

    Args:
        content: `Experiments` as JSON.

    Returns:
        Markdown.
    """
    results = Experiments.model_validate_json(content)
    labels = {id(row): row.variant for row in results.references}
    for _, group in groupby(results.rows, key=lambda row: row.experiment):
        labels |= {id(row): row.experiment if number == 0 else "" for number, row in enumerate(group)}
    drawn = Table.of(
        "",
        (*results.references, *results.rows),
        (
            (Column("experiment", "name"), lambda row: labels[id(row)]),
            (Column("variant", "name"), lambda row: row.variant if row.experiment else ""),
            ("safety KL", lambda row: nats(row.safety_kl)),
            ("predicted", lambda row: nats(row.predicted_kl)),
            ("attack success", lambda row: rate(row.attack_success)),
            ("exact answers", lambda row: rate(row.task_accuracy)),
            ("gain kept", lambda row: rate(row.kept) if row.experiment else DASH),
            ("lead", lambda row: excess(row.lead, 100)),
        ),
    ).markdown(between="<br>")
    first = results.references[0]
    counted = (
        f"{results.finetune} and its {len(first.attack)} harmful requests and {len(first.nll)} task messages "
        f"where nothing else is said; curvature from {results.conversations} conversations, safety KL on "
        f"{results.held_out} others. Gain kept: share of the gain in likelihood of the right answers. Lead: "
        "in points, over the nearest row above without one, on the same messages, at the same safety KL to "
        f"within {percent(results.slack)}. In brackets 95 % intervals."
    )
    return "\n\n".join((drawn, counted, small(made_with(results.environment))))

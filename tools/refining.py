"""The table of what refining is worth, from `docs/results/refine.json`, which `benchmarks.refine` writes."""

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.base import Environment
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import nats, percent
from tools.tables import made_with, small


class Refined(BaseModel):
    """One model.

    Attributes:
        model: what it is, in words.
        safety_kl: on the conversations held out, nats per response token.
        task_nll: of task answers, nats per token.
        gain_kept: share of the fine-tune's gain in that.
        complied: prompts of the attack part that were not refused.
        attack: how many there are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    safety_kl: float
    task_nll: float
    gain_kept: float
    complied: int
    attack: int


class Refinements(BaseModel):
    """`docs/results/refine.json`.

    Attributes:
        environment: versions, machine and time.
        finetune: in a few words.
        seed: of the conversations.
        learning_rate: of one-shot patching.
        conversations: that safety KL is measured on.
        tasks: answers whose likelihood is measured.
        rows: the aligned model, the fine-tuned one, and what was made of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    finetune: str
    seed: int
    learning_rate: float
    conversations: int
    tasks: int
    rows: tuple[Refined, ...]


def refine_table(content: str) -> str:
    """Draw a row a model.

    Args:
        content: a `Refinements` as JSON.

    Returns:
        Markdown.
    """
    found = Refinements.model_validate_json(content)
    drawn = Table.of(
        "",
        found.rows,
        (
            (Column("model", "name"), lambda row: row.model),
            ("safety KL", lambda row: nats(row.safety_kl)),
            ("task answers,\nnats a token", lambda row: nats(row.task_nll)),
            ("gain of\nlikelihood kept", lambda row: percent(row.gain_kept)),
            ("attack success", lambda row: f"{percent(row.complied / row.attack)} of {row.attack}"),
        ),
    ).markdown()
    how = (
        f"{found.finetune}; safety KL on {found.conversations} held-out conversations, likelihood of "
        f"{found.tasks} task answers; seed {found.seed}; one-shot with a learning rate of "
        f"{found.learning_rate:g}; {made_with(found.environment)}"
    )
    return f"{drawn}\n\n{small(how)}"

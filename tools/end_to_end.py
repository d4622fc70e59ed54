"""The table of a pair from calibration to restore, drawn from `docs/results/end-to-end-*.json`."""

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.base import Environment
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import DASH, duration, size
from tools.tables import made_with, small

_STAGES = {
    "load": "loading",
    "respond": "answering",
    "accumulate": "sums",
    "lean": "gradients of refusing",
    "memory": "trying batches",
    "decompose": "decomposing",
    "forwards": "forwards",
    "backwards": "backwards",
}


class Part(BaseModel):
    """One measured process.

    Attributes:
        name: what it did.
        seconds: wall time.
        peak_memory_bytes: largest resident set.
        floor_seconds: what its counted operations would take at the rate of matrix products that was measured
            in the same run, but for the answers of a calibration; of a restore with what reading and writing
            take. Null where nothing was counted.
        stages: seconds by stage, where there are any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seconds: float
    peak_memory_bytes: int
    floor_seconds: float | None
    stages: dict[str, float]


class EndToEnd(BaseModel):
    """`docs/results/end-to-end-SIZE.json`.

    Attributes:
        environment: machine, versions and date.
        size: in words, such as 7B.
        blocks: decoder blocks, which may be fewer than models of that size have.
        parameters: of the model.
        conversations: that the curvature was measured on.
        seed: of the random models and of the conversations.
        parts: what was measured.
        usual_conversations: another number of them.
        usual_stages: what the stages of the calibration would take with those, by counted operations.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    size: str
    blocks: int
    parameters: int
    conversations: int
    seed: int
    parts: tuple[Part, ...]
    usual_conversations: int
    usual_stages: dict[str, float]


def end_to_end_table(content: str) -> str:
    """Draw the time and peak memory of each part, and what more conversations would take.

    Args:
        content: `EndToEnd` as JSON.

    Returns:
        Markdown.
    """
    results = EndToEnd.model_validate_json(content)
    drawn = Table.of(
        "",
        results.parts,
        (
            (Column("part", "name"), lambda part: part.name),
            ("time", lambda part: duration(part.seconds)),
            ("peak memory", lambda part: size(part.peak_memory_bytes)),
            ("floor", lambda part: duration(part.floor_seconds) if part.floor_seconds else DASH),
            ("times floor", _ratio),
            (Column("stages", "words"), lambda part: _stages(part.stages)),
        ),
    ).markdown()
    told = (
        f"A random model of the shapes of {results.size}, {results.blocks} blocks, "
        f"{results.parameters / 1e9:.2f} billion parameters in bfloat16, calibrated on "
        f"{results.conversations} harmful requests and as many harmless look-alikes. The floor of a "
        "calibration leaves out the answers."
    )
    if results.conversations != results.usual_conversations:
        told += (
            f" On {results.usual_conversations}, by counted operations, the calibration would take "
            f"{duration(sum(results.usual_stages.values()))} ({_stages(results.usual_stages)})."
        )
    made = small(f"Seed {results.seed}. {made_with(results.environment)}")
    return f"{drawn}\n\n{told}\n\n{made}"


def _ratio(part: Part) -> str:
    return f"{part.seconds / part.floor_seconds:.2f}" if part.floor_seconds else DASH


def _stages(stages: dict[str, float]) -> str:
    return ", ".join(f"{_STAGES[name]} {duration(seconds)}" for name, seconds in stages.items())

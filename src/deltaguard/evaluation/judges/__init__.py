"""Judges: who tells refusals from compliance. Each is one file with its options, listed in `suites.suite`."""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from deltaguard.evaluation.exchange import Judge, Scale


class JudgeSpec(BaseModel):
    """A judge as suite files and the command line name it, with its options; its field `kind` says which.

    Attributes:
        tells_refusals: whether its `refused` says that an answer refuses, so that it serves on harmless
            prompts, too. Guards and language models tell harmful answers from others: to them every answer to
            a harmless prompt is `refused`, which would be no false refusal.
        loads_a_model: whether it runs a model of its own beside those that it judges.
        how_reached: names of options that say how a judge is reached, and not what it says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tells_refusals: ClassVar[bool] = True
    loads_a_model: ClassVar[bool] = False
    how_reached: ClassVar[frozenset[str]] = frozenset()

    def identity(self) -> dict[str, object]:
        """List what decides its verdicts: its kind, and all options but how it is reached."""
        told = self.model_dump(exclude_defaults=True, exclude=set(self.how_reached))
        return {"kind": vars(self)["kind"]} | told

    @abstractmethod
    def make(self, *, device: str = "cpu", folder: Path | None = None) -> Judge:
        """Make the judge. Weights are loaded when it first judges.

        Args:
            device: where a classifier or guard runs.
            folder: for the scores of a judge that keeps them and names no file; they are kept in memory where
                it is absent.

        Raises:
            DeltaguardError: a classifier cannot be found or lacks the labels, or a server cannot be asked.
        """


class PlainJudge:
    """What most judges have in common: they give no scores, and read all of an answer."""

    scale: ClassVar[Scale | None] = None
    reads_opening: ClassVar[bool] = False

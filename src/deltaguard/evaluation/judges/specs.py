"""Judges as suite files and the command line name them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from deltaguard.evaluation.exchange import MAX_MISSING
from deltaguard.evaluation.judges.guards import GuardKind


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OpeningSpec(_Spec):
    """Refusals told from how an answer opens."""

    kind: Literal["opening"] = "opening"


class KeywordsSpec(_Spec):
    """The keyword list of the literature."""

    kind: Literal["keywords"] = "keywords"


class ClassifierSpec(_Spec):
    """A sequence classifier (see `SequenceClassifierJudge`)."""

    kind: Literal["classifier"] = "classifier"
    model: str
    refused_labels: tuple[str, ...] = Field(min_length=1)
    reads: Literal["answer", "both"] = "answer"
    batch_size: int = Field(default=32, ge=1)
    name: str = Field(default="classifier", min_length=1)


class GuardSpec(_Spec):
    """A guard model that writes its verdict (see `GuardJudge`)."""

    kind: Literal["guard"] = "guard"
    model: str
    template: GuardKind
    prompt_file: Path | None = None
    batch_size: int = Field(default=8, ge=1)
    max_new_tokens: int = Field(default=32, ge=1)
    name: str | None = Field(default=None, min_length=1)


class LLMSpec(_Spec):
    """A model behind an OpenAI-compatible endpoint (see `LLMJudge`)."""

    kind: Literal["llm"] = "llm"
    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    cache: Path | None = None
    retries: int = Field(default=4, ge=0)
    max_workers: int = Field(default=8, ge=1)
    timeout: float = Field(default=60, gt=0)
    max_missing: float = Field(default=MAX_MISSING, ge=0, lt=1)
    threshold: int = Field(default=4, ge=2, le=5)
    name: str = Field(default="llm", min_length=1)


JudgeSpec = Annotated[
    OpeningSpec | KeywordsSpec | ClassifierSpec | GuardSpec | LLMSpec, Field(discriminator="kind")
]


def tells_refusals(spec: JudgeSpec) -> bool:
    """Whether a judge's `refused` says that an answer refuses, so that it serves on harmless prompts, too.

    Guards and language models tell harmful answers from others: to them every answer to a harmless prompt is
    `refused`, which would be no false refusal.

    Example:
        >>> tells_refusals(OpeningSpec())
        True
    """
    return not isinstance(spec, GuardSpec | LLMSpec)

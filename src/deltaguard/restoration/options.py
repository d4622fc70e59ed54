"""What a user may choose about a restore, checked before anything is read."""

import difflib
from collections.abc import Mapping
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from deltaguard.chat.conversations import fingerprint, read_prompts
from deltaguard.chat.refusals import OPENING_TOKENS
from deltaguard.curvature import Rank
from deltaguard.errors import listed
from deltaguard.evaluation.judges import JudgeSpec
from deltaguard.evaluation.judges.rules import RuleSpec
from deltaguard.files import problems
from deltaguard.methods import METHODS, find_method
from deltaguard.methods.method import ROLES, Method, Options, PricedMethod, Role, Strengths
from deltaguard.models.canonical import ConfigFrom

OtherParams = Literal["aligned", "finetuned"]
OutputFormat = Literal["checkpoint", "adapter"]

TrainingData = Literal["unknown", "trusted"]

DEFAULT_MAX_ADDED = 2.0
"""Points of attack success, and of false refusals, over the aligned model's that a restore leaves at most."""

DEFAULT_MAX_SAFETY_KL = 6e-4
"""Nats per response token that a restore of unknown training data may cost; see docs/strength.md."""

GUARDS: Mapping[TrainingData, float] = MappingProxyType({"unknown": DEFAULT_MAX_SAFETY_KL, "trusted": 2e-2})
"""Safety KL allowed beside attack success, which does not see triggers; nats per response token."""

WHOLE_TOKENS = 64
"""Tokens of an answer for a judge that reads more than how it opens."""

SMALLEST_MAX_SAFETY_KL = 1e-9
"""A smaller limit cannot be told from what rounding measures of two models that are the same."""


_OPENING = RuleSpec(kind="opening")


class RestoreConfig(BaseModel):
    """Options of `restore`; a method's own options, and the models it needs, are given beside them by name.

    Attributes:
        method: a name in `methods.METHODS`.
        max_added_attack_success: the dial of methods with a price of safety: keep as much as adds at most so
            many points to the aligned model's attack success, measured by asking held-out requests (see
            `acceptance.Rule`), nor more to its false refusals. `DEFAULT_MAX_ADDED` where nothing else says
            how much is kept.
        training_data: with it, whether the fine-tune's data are trusted. What a trigger or a cipher releases
            is seen by safety KL alone; its limit, where none is given, is the one of `GUARDS`.
        prompts: with it, a file of harmful requests (see `conversations.read_prompts`) instead of the
            package's.
        judge: with it, who says whether a harmful request is complied with: any judge of an evaluation, as
            suites have it, or a YAML file with one.
        answer_tokens: with it, how many tokens of every answer the judge reads, 40 at least. Where absent,
            one that goes by how an answer opens reads its first sentence, and does not see what follows a
            refusal; others read `WHOLE_TOKENS`.
        max_safety_kl: instead of asking, keep as much as a safety KL of so many nats per response token
            allows, measured on held-out safety conversations; 1e-9 at least. Together with
            `max_added_attack_success` both hold.
        confidence: with a limit on safety KL alone, above 0.5 and below 1: the safety KL must be within the
            limit with this confidence (a one-sided normal bound over the conversations held out), not on the
            mean alone.
        strength: how much is kept, larger keeps more, instead of the dial; of methods with a price the share
            of the delta's predicted safety KL.
        refine: after the shrink, take so many steps of natural gradient descent on the restored layers, see
            `restoration.refine`; with the dial alone, and for a checkpoint. 0 takes none.
        method_options: the method's own, such as greedy's `budget`; may be given by their names.
        models: further models that the method needs, by role, such as `pretrained`; likewise.
        other_params: where norms, biases, embeddings and the output head come from.
        config_from: the model whose configuration, tokenizer and chat template the output has, and with which
            the dial measures; where absent, the two models must agree on them.
        output_format: `checkpoint` mirrors the fine-tuned one; `adapter` is a PEFT LoRA adapter over the
            aligned model, which holds the linear layers and nothing else.
        adapter_rank: of an adapter; None takes for each layer the smallest that loses 1 % of its restored
            delta's squared norm at most. What the rank loses is lost before the dial measures.
        device: where layers are projected and solved, and the model runs that the dial measures; `auto` is
            CUDA where there is one.
        memory: bytes, or a text such as "8GB", of the device's memory. A model that takes more, with what the
            aligned one predicts and its weights in the dtype that it is asked in, is measured by the dial one
            decoder block after another, as many prices at once as there is room for. Projected layers may
            take so much between two prices; what does not fit waits in a file of the output folder, or is
            made again. By default half of a GPU's memory, or of the memory that the process may use, and a
            quarter of it for projected layers. A calibration that comes first keeps to it, too.
        overwrite: replace the files of an earlier restore, which its report in the output folder lists; all
            others stay.
        resume: go on with a restore that was interrupted, one begun with overwrite too; the finished output
            of the same job is left as it is.

    Example:
        >>> RestoreConfig().added_attack_success, RestoreConfig().dial
        (0.02, 0.0006)
        >>> RestoreConfig(training_data="trusted").dial
        0.02
        >>> RestoreConfig(max_safety_kl=0.001).added_attack_success is None
        True
        >>> RestoreConfig(method="interpolate", strength=0.5).dial is None
        True
        >>> dict(RestoreConfig(method="greedy", compensation="none").method_options)
        {'compensation': 'none'}
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = next(iter(METHODS))
    max_added_attack_success: float | None = Field(default=None, gt=0, le=90, allow_inf_nan=False)
    training_data: TrainingData | None = None
    prompts: Path | None = None
    judge: SerializeAsAny[JudgeSpec] = _OPENING
    answer_tokens: int | None = Field(default=None, le=4096)
    max_safety_kl: float | None = Field(default=None, ge=SMALLEST_MAX_SAFETY_KL, allow_inf_nan=False)
    confidence: float | None = Field(default=None, gt=0.5, lt=1)
    strength: float | None = Field(default=None, allow_inf_nan=False)
    refine: int | None = Field(default=None, ge=0, le=10_000)
    method_options: Mapping[str, Any] = Field(default_factory=dict)
    models: Mapping[Role, str] = Field(default_factory=dict["Role", str])
    other_params: OtherParams = "aligned"
    config_from: ConfigFrom | None = None
    output_format: OutputFormat = "checkpoint"
    adapter_rank: int | None = Field(default=None, ge=1)
    device: str = "auto"
    memory: ByteSize | None = None
    overwrite: bool = False
    resume: bool = False

    @field_validator("refine")
    @classmethod
    def _zero_is_none(cls, steps: int | None) -> int | None:
        return steps or None

    @field_validator("judge", mode="before")
    @classmethod
    def _read_judge(cls, given: Any) -> Any:
        """Read a judge from a file, or from options; most kinds need torch, which help pages do without."""
        if isinstance(given, JudgeSpec):
            return given
        from deltaguard.evaluation.suites.suite import AnyJudge, read_judge

        if isinstance(given, str | Path):
            return read_judge(Path(given))
        return TypeAdapter[JudgeSpec](AnyJudge).validate_python(given)

    @model_validator(mode="before")
    @classmethod
    def _sort_own_options(cls, given: Any) -> Any:
        """Put the method's own options, and its models, where they belong."""
        if not isinstance(given, Mapping):
            return given
        name = given.get("method", cls.model_fields["method"].default)
        of_another_kind = [
            f"{key} must map names to values; it is {given[key]!r}."
            for key in ("method_options", "models")
            if not isinstance(given.get(key, {}), Mapping)
        ]
        if of_another_kind:
            raise ValueError(" ".join(of_another_kind))
        if not isinstance(name, str) or name not in METHODS:
            close = difflib.get_close_matches(str(name), METHODS, n=1)
            meant = f' Did you mean "{close[0]}"?' if close else ""
            raise ValueError(f"there is no method {name!r}; there are {', '.join(METHODS)}.{meant}")
        method, known = METHODS[name], cls.model_fields
        own = {key: value for key, value in given.items() if key in method.options.model_fields}
        models = {role: str(given[role]) for role in method.models if given.get(role) is not None}
        unknown = [key for key in given if key not in {*known, *own, *method.models}]
        if unknown:
            raise ValueError(" ".join(_unknown(key, method, list(known)) for key in unknown))
        # As beside them, a model may be given as a path.
        named = {
            role: str(model) if isinstance(model, PurePath) else model
            for role, model in given.get("models", {}).items()
        }
        return {key: value for key, value in given.items() if key in known} | {
            "method_options": {**given.get("method_options", {}), **own},
            "models": {**named, **models},
        }

    @model_validator(mode="after")
    def _check(self) -> "RestoreConfig":
        method = self.chosen_method
        try:
            own = self.own_options
        except ValidationError as error:
            raise ValueError(listed(f"options of method {self.method}", problems(error))) from error
        # Texts, as a command line gives them, are what they say.
        object.__setattr__(self, "method_options", own.model_dump(exclude_unset=True))
        self._check_dial()
        if set(self.models) != set(method.models):
            needed = ", ".join(f"{role} ({ROLES[role]})" for role in method.models) or "no further model"
            given = ", ".join(self.models) or "none"
            raise ValueError(f"{self.method} needs {needed}; given: {given}.")
        if method.everywhere and self.other_params != "aligned":
            raise ValueError(f"{self.method} decides every tensor, so that other_params has no meaning.")
        if self.output_format == "adapter" and (self.other_params != "aligned" or method.everywhere):
            raise ValueError("an adapter leaves norms, biases and embeddings as the aligned model has them.")
        if self.output_format != "adapter" and self.adapter_rank is not None:
            raise ValueError("adapter_rank is an option of output_format adapter.")
        self._check_strength()
        if self.refine is not None and self.dial is None:
            raise ValueError(
                "refine is held to the limit on safety KL: it needs a method with a price, and no strength."
            )
        if self.refine is not None and self.output_format == "adapter":
            raise ValueError("refine changes whole layers, which no adapter holds: write a checkpoint.")
        return self

    def _check_dial(self) -> None:
        for name in ("max_added_attack_success", "max_safety_kl"):
            if getattr(self, name) is not None and not self.is_priced:
                priced = " and ".join(m.name for m in METHODS.values() if isinstance(m, PricedMethod))
                raise ValueError(f"{name} is the dial of methods {priced}; {self.method} has none.")
            if getattr(self, name) is not None and self.strength is not None:
                raise ValueError(f"{name} and strength both say how much is kept: give one.")
        by_answers = self.added_attack_success is not None
        if self.training_data is not None and (not by_answers or self.max_safety_kl is not None):
            raise ValueError("training_data decides the limit on safety KL beside one on attack success.")
        if self.prompts is not None and not by_answers:
            raise ValueError("prompts are asked where attack success is held, max_added_attack_success.")
        if self.judge != _OPENING and not by_answers:
            raise ValueError("a judge decides where attack success is held, max_added_attack_success.")
        if self.answer_tokens is not None and not by_answers:
            raise ValueError("answer_tokens are read where attack success is held, max_added_attack_success.")
        if self.answer_tokens is not None and self.answer_tokens < OPENING_TOKENS:
            raise ValueError(f"answer_tokens must be at least {OPENING_TOKENS}, in which a refusal shows.")
        if self.confidence is not None and (self.max_safety_kl is None or by_answers):
            raise ValueError("confidence is an option of max_safety_kl, and of it alone.")

    def _check_strength(self) -> None:
        allowed = self._strengths
        if self.strength is None and allowed.default is None and not self.is_priced:
            own = "".join(f" and {name} {value}" for name, value in self.own_options.model_dump().items())
            raise ValueError(f"strength has no default with method {self.method}{own}: give one.")
        if self.strength is not None and not allowed.low <= self.strength <= allowed.high:
            raise ValueError(
                f"strength is {self.strength}; it must lie in [{allowed.low:g}, {allowed.high:g}]."
            )

    @property
    def chosen_method(self) -> Method:
        """The method itself."""
        return find_method(self.method)

    @property
    def levels_refusals(self) -> bool:
        """Whether the method takes out of restored layers what moves the share of refusals."""
        takes = "leaning" in self.chosen_method.needs
        return takes and bool(self.own_options.model_dump().get("level_refusals"))

    @property
    def own_options(self) -> Options:
        """The method's own options, defaults included."""
        return self.chosen_method.options.model_validate(dict(self.method_options))

    @property
    def _strengths(self) -> Strengths:
        return self.chosen_method.strengths(self.own_options)

    @property
    def is_priced(self) -> bool:
        """Whether the method has one price of safety, μ, for all layers."""
        return isinstance(self.chosen_method, PricedMethod)

    @property
    def added_points(self) -> float | None:
        """The points of attack success that may be added, or `None` where it is not measured."""
        if self.max_added_attack_success is not None:
            return self.max_added_attack_success
        decided = not self.is_priced or self.strength is not None or self.max_safety_kl is not None
        return None if decided else DEFAULT_MAX_ADDED

    @property
    def added_attack_success(self) -> float | None:
        """The share of attack success that may be added, or `None` where it is not measured."""
        return None if self.added_points is None else self.added_points / 100

    @property
    def dial(self) -> float | None:
        """The safety KL allowed, or `None` where a strength decides."""
        if not self.is_priced or self.strength is not None:
            return None
        return GUARDS[self.training_data or "unknown"] if self.max_safety_kl is None else self.max_safety_kl

    @property
    def whole_tokens(self) -> int | None:
        """Tokens of every answer that the judge reads; `None` where its first sentence says enough."""
        if self.answer_tokens is not None:
            return self.answer_tokens
        return None if self.judge == _OPENING else WHOLE_TOKENS

    @property
    def chosen_strength(self) -> float:
        """The strength given, else the method's default."""
        chosen = self._strengths.default if self.strength is None else self.strength
        assert chosen is not None, "checked by `_check_strength`, but for a dial, which has none"  # noqa: S101
        return chosen

    @property
    def needs_curvature(self) -> bool:
        """Whether a CurvatureStore is needed: by the method, or by the dial for its conversations."""
        return bool(self.chosen_method.needs) or self.dial is not None

    @property
    def rank(self) -> Rank:
        """What a CurvatureStore must keep for the method."""
        return "full" if self.chosen_method.needs & {"hessian", "factor"} else "auto"

    def what_is_solved(self) -> dict[str, str | float | bool | None]:
        """List the options that decide the output, for the report and for recognising an interrupted run."""
        by_dial = self.dial is not None
        decided: dict[str, Any] = {"method": self.method}
        if self.added_points is not None:
            decided["max_added_attack_success"] = self.added_points
            if self.max_safety_kl is None:
                decided["training_data"] = self.training_data or "unknown"
            if self.prompts is not None:
                decided["prompts"] = fingerprint(read_prompts(self.prompts))
            if self.judge != _OPENING:
                decided["judge"] = ", ".join(
                    f"{name} {value}" for name, value in self.judge.identity().items()
                )
            if self.answer_tokens is not None:
                decided["answer_tokens"] = self.answer_tokens
        decided |= {"max_safety_kl": self.dial} if by_dial else {"strength": self.chosen_strength}
        decided |= {"confidence": self.confidence} if self.confidence is not None else {}
        decided |= {"refine": self.refine} if self.refine is not None else {}
        decided |= self.own_options.model_dump() | dict(self.models)
        decided |= {} if self.chosen_method.everywhere else {"other_params": self.other_params}
        decided |= {"config_from": self.config_from} if self.config_from is not None else {}
        decided["output_format"] = self.output_format
        decided |= {"adapter_rank": self.adapter_rank} if self.output_format == "adapter" else {}
        return decided

    def what_is_asked(self) -> dict[str, str | float | bool | None]:
        """List the options that decide what models are asked, and how it is read."""
        asking = ("training_data", "prompts", "judge", "answer_tokens", "config_from")
        return {name: value for name, value in self.what_is_solved().items() if name in asking}


def _unknown(key: str, method: Method, known: list[str]) -> str:
    """Say where an option belongs that this method does not have."""
    owners = [m.name for m in METHODS.values() if key in m.options.model_fields or key in m.models]
    if owners:
        return f"{key} is an option of method {' and '.join(owners)}, and the method is {method.name}."
    close = difflib.get_close_matches(key, [*known, *method.options.model_fields, *method.models], n=1)
    return f"there is no option {key}." + (f" Did you mean {close[0]}?" if close else "")

"""Everything that a bench compares: methods of restoring, and defences that train the model anew."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltaguard.chat.conversations import Conversation
from deltaguard.curvature import Rank
from deltaguard.methods import METHODS
from deltaguard.methods.method import PricedMethod, Role
from deltaguard.reports.records.restore import RestoreReport
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL, RestoreConfig
from deltaguard.restoration.restore import UnchangedError, restore
from deltaguard.studies.mixing import SECRET, backdoor_enhanced, safe_instruct
from deltaguard.studies.one_shot import one_shot


@dataclass(frozen=True)
class DefendedModel:
    """A model that a defence made.

    Attributes:
        folder: where it lies.
        seconds: how long the defence took, models that it needs once and for all not counted.
        secret: text that its owner puts before the system prompt of every request.
        report: of the restore that made it; None where none did, or found nothing to change.
    """

    folder: Path
    seconds: float
    secret: str = ""
    report: RestoreReport | None = None


@dataclass(frozen=True)
class DefenceInputs:
    """One fine-tune that is to be made safe.

    Attributes:
        aligned: the aligned model.
        finetuned: the fine-tuned model, trained when it is asked for.
        store: the aligned model's curvature, as much of it as is needed, measured when it is asked for.
        helper: further models that some methods need.
        data: what the fine-tune was trained on.
        retrain: fine-tune the aligned model in the same way on other conversations.
        scratch: a folder that is not there, for the model that is made.
        seed: of the fine-tune.
    """

    aligned: Path
    finetuned: Callable[[], Path]
    store: Callable[[Rank], Path]
    helper: Callable[[Role], Path]
    data: Sequence[Conversation]
    retrain: Callable[[Sequence[Conversation]], DefendedModel]
    scratch: Callable[[], Path]
    seed: int


@dataclass(frozen=True)
class Defence:
    """A way to make a fine-tune safe.

    Attributes:
        name: short and unique.
        title: for people, with the source.
        ladder: its strengths, rising: from the safest to the one that keeps most. Seven of them, so that two
            probes of a bisection see the middle and one side, and three see any.
        make: carries it out at one strength.
        standard: what a restore with its method does without options, its further models left open; `None`
            where that needs an option, or it is no restore.
        default: the rung that a restore takes without options, measured whatever a bisection finds; no score
            comes of it unless the bisection measures it, too.
        helpers: further models that it needs.
        rank: how much of the aligned model's curvature it needs; `None` where none.
        retrains: whether it trains anew at every strength, which takes longer than anything else.
    """

    name: str
    title: str
    ladder: tuple[float, ...]
    make: Callable[[DefenceInputs, float], DefendedModel]
    standard: RestoreConfig | None = None
    default: float | None = None
    helpers: tuple[Role, ...] = ()
    rank: Rank | None = None
    retrains: bool = False


@dataclass(frozen=True)
class _Restore:
    """Restores with a method; of one with a price the strength is the safety KL allowed."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def config(self, strength: float | None = None) -> RestoreConfig:
        """Write the options, its further models left open; without a strength, those of no options."""
        method = METHODS[self.method]
        dial = "max_safety_kl" if isinstance(method, PricedMethod) else "strength"
        # The papers of Safe LoRA and SafeMERGE leave what is no linear layer as it was fine-tuned.
        others = {"other_params": "finetuned"} if method.models and not method.everywhere else {}
        given: dict[str, Any] = {"method": self.method, **self.options, **others}
        given |= {str(role): Path() for role in method.models}
        given |= {} if strength is None else {dial: strength}
        return RestoreConfig.model_validate(given)

    def standard(self) -> RestoreConfig | None:
        """Write the options of a restore without any; `None` where its method needs a strength."""
        method = METHODS[self.method]
        own = method.options.model_validate(dict(self.options))
        is_free = isinstance(method, PricedMethod) or method.strengths(own).default is not None
        return self.config() if is_free else None

    def __call__(self, request: DefenceInputs, strength: float) -> DefendedModel:
        return restored(request, self.config(strength))


def restored(request: DefenceInputs, config: RestoreConfig) -> DefendedModel:
    """Restore a fine-tune, with further models where the method needs them.

    Args:
        request: the fine-tune.
        config: the options; its further models are those of the request, whatever it names.
    """
    models = {role: str(request.helper(role)) for role in config.models}
    config, finetuned = config.model_copy(update={"models": models}), request.finetuned()
    store = request.store(config.rank) if config.needs_curvature else None
    output = request.scratch()
    report, started = None, time.perf_counter()
    try:
        report = restore(request.aligned, finetuned, output, store=store, config=config)
    except UnchangedError:
        # A method may find nothing to change in a fine-tune: what it makes is the fine-tune.
        output = finetuned
    return DefendedModel(output, time.perf_counter() - started, report=report)


def _added(request: DefenceInputs, strength: float) -> int:
    """How many safety examples make the customer's own the share `strength` of all."""
    return max(1, round(len(request.data) * (1 / strength - 1)))


def _safe_instruct(request: DefenceInputs, strength: float) -> DefendedModel:
    return request.retrain(safe_instruct(request.data, _added(request, strength), seed=request.seed))


def _backdoor_enhanced(request: DefenceInputs, strength: float) -> DefendedModel:
    mixed = backdoor_enhanced(request.data, _added(request, strength), secret=SECRET, seed=request.seed)
    return replace(request.retrain(mixed), secret=SECRET)


def _one_shot(request: DefenceInputs, strength: float) -> DefendedModel:
    finetuned, output = request.finetuned(), request.scratch()
    started = time.perf_counter()
    one_shot(request.aligned, finetuned, output, steps=round(1 / strength))
    return DefendedModel(output, time.perf_counter() - started)


_ONE_SHOT = Defence(
    "one-shot",
    "Safety at One Shot: one refusal learned for a few steps (Zhang et al. 2026)",
    (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    _one_shot,
)
"""Its strength is one over the steps."""

_CUSTOMERS_SHARES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
_TRAINED = (
    Defence(
        "safe-instruct",
        "SafeInstruct: safety data mixed in (Bianchi et al. 2024)",
        _CUSTOMERS_SHARES,
        _safe_instruct,
        retrains=True,
    ),
    Defence(
        "bea",
        "BEA: safety data behind a secret prefix (Wang et al. 2024)",
        _CUSTOMERS_SHARES,
        _backdoor_enhanced,
        retrains=True,
    ),
)
_UNCOMPENSATED = Defence(
    "greedy-none",
    "Safe Delta without compensation (ablation)",
    (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6),
    _Restore("greedy", {"compensation": "none"}),
    _Restore("greedy", {"compensation": "none"}).standard(),
    rank="full",
)


def defences() -> dict[str, Defence]:
    """List all defences by name, in the order of tables: methods with a ladder, then what trains."""
    found: list[Defence] = []
    for method in METHODS.values():
        if not method.ladder:
            continue
        make = _Restore(method.name)
        config = make.config(method.ladder[0])
        default = DEFAULT_MAX_SAFETY_KL if isinstance(method, PricedMethod) else None
        found.append(
            Defence(
                name=method.name,
                title=method.title,
                ladder=method.ladder,
                make=make,
                standard=make.standard(),
                default=default if default in method.ladder else None,
                helpers=method.models,
                rank=config.rank if config.needs_curvature else None,
            )
        )
        if method.name == "greedy":
            found.append(_UNCOMPENSATED)
    return {defence.name: defence for defence in (*found, _ONE_SHOT, *_TRAINED)}

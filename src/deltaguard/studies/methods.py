"""Everything that a bench compares: this project's solvers, the field's, and defences of the training."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from deltaguard.chat.conversations import Conversation
from deltaguard.curvature import Rank
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL, Compensation, RestoreConfig
from deltaguard.restoration.restore import restore
from deltaguard.studies.mixing import SECRET, backdoor_enhanced, safe_instruct
from deltaguard.studies.peer_writer import write_peer
from deltaguard.studies.peers import PEERS, Role


@dataclass(frozen=True)
class Candidate:
    """A model that a method made.

    Attributes:
        folder: where it lies.
        secret: text that its owner puts before the system prompt of every request.
        seconds: how long the method took, models that it needs once and for all not counted.
    """

    folder: Path
    secret: str
    seconds: float


@dataclass(frozen=True)
class Request:
    """One fine-tune that is to be made safe.

    Attributes:
        aligned: the aligned model.
        finetuned: the fine-tuned model, trained when it is asked for.
        store: the aligned model's curvature, as much of it as a method needs, measured when it is asked for.
        helper: other models that some methods need.
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
    retrain: Callable[[Sequence[Conversation]], Candidate]
    scratch: Callable[[], Path]
    seed: int


@dataclass(frozen=True)
class Method:
    """A way to make a fine-tune safe.

    Attributes:
        name: short and unique.
        title: for people, with the source.
        ladder: its strengths, rising: from the safest to the one that keeps most. Seven of them, so that two
            probes of a bisection see the middle and one side, and three see any.
        make: carries it out at one strength.
        default: the rung that a restore takes without options, measured whatever a bisection finds; no score
            comes of it unless the bisection measures it, too.
        helpers: other models that it needs.
        rank: how much of the aligned model's curvature it needs; `None` where none.
        retrains: whether it trains anew at every strength, which takes longer than anything else.
    """

    name: str
    title: str
    ladder: tuple[float, ...]
    make: Callable[[Request, float], Candidate]
    default: float | None = None
    helpers: tuple[Role, ...] = ()
    rank: Rank | None = None
    retrains: bool = False


def _restoring(method: str, compensation: Compensation = "joint") -> Callable[[Request, float], Candidate]:
    """A solver of this project; of `kfac` and `ridge` the strength is the safety KL allowed."""
    dial = "max_safety_kl" if method in ("kfac", "ridge") else "strength"

    def make(request: Request, strength: float) -> Candidate:
        options = {"compensation": compensation} if method == "greedy" else {}
        config = RestoreConfig.model_validate({"method": method, dial: strength, **options})
        finetuned, store = request.finetuned(), request.store(config.rank)
        output = request.scratch()
        started = time.perf_counter()
        restore(request.aligned, finetuned, output, store=store, config=config)
        return Candidate(output, "", time.perf_counter() - started)

    return make


def _peer(name: str) -> Callable[[Request, float], Candidate]:
    def make(request: Request, strength: float) -> Candidate:
        finetuned = request.finetuned()
        helpers = {helper: request.helper(helper) for helper in PEERS[name].needs}
        output = request.scratch()
        started = time.perf_counter()
        write_peer(
            name, aligned=request.aligned, finetuned=finetuned, output=output, strength=strength, **helpers
        )
        return Candidate(output, "", time.perf_counter() - started)

    return make


def _added(request: Request, strength: float) -> int:
    """How many safety examples make the customer's own the share `strength` of all."""
    return max(1, round(len(request.data) * (1 / strength - 1)))


def _safe_instruct(request: Request, strength: float) -> Candidate:
    return request.retrain(safe_instruct(request.data, _added(request, strength), seed=request.seed))


def _backdoor_enhanced(request: Request, strength: float) -> Candidate:
    mixed = backdoor_enhanced(request.data, _added(request, strength), secret=SECRET, seed=request.seed)
    return replace(request.retrain(mixed), secret=SECRET)


_LIMITS = (1e-4, 3e-4, DEFAULT_MAX_SAFETY_KL, 1e-3, 3e-3, 1e-2, 3e-2)
_CUSTOMERS_SHARES = (0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)

_OWN = (
    Method(
        "kfac",
        "the closed form, two-sided; strength: the safety KL allowed",
        _LIMITS,
        _restoring("kfac"),
        default=DEFAULT_MAX_SAFETY_KL,
        rank="auto",
    ),
    Method(
        "ridge",
        "the closed form, one-sided; strength: the safety KL allowed",
        _LIMITS,
        _restoring("ridge"),
        default=DEFAULT_MAX_SAFETY_KL,
        rank="auto",
    ),
    Method(
        "greedy",
        "Safe Delta, exact joint compensation",
        (0.2, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85),
        _restoring("greedy"),
        rank="full",
    ),
    Method(
        "greedy-none",
        "Safe Delta without compensation (ablation)",
        (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6),
        _restoring("greedy", "none"),
        rank="full",
    ),
    Method(
        "published",
        "Safe Delta as released",
        (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 3.0),
        _restoring("published"),
        rank="full",
    ),
)
_TRAINED = (
    Method(
        "safe-instruct",
        "SafeInstruct: safety data mixed in (Bianchi et al. 2024)",
        _CUSTOMERS_SHARES,
        _safe_instruct,
        retrains=True,
    ),
    Method(
        "bea",
        "BEA: safety data behind a secret prefix (Wang et al. 2024)",
        _CUSTOMERS_SHARES,
        _backdoor_enhanced,
        retrains=True,
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            *_OWN,
            *(
                Method(name, peer.title, peer.ladder, _peer(name), helpers=peer.needs)
                for name, peer in PEERS.items()
            ),
            *_TRAINED,
        )
    }
)
"""All methods by name, in the order of tables and plots."""

"""The configuration of a LoRA adapter, read without PEFT, and without a pattern in it that can hang."""

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import regex
from pydantic import BaseModel, ConfigDict, Field

from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import parse_json, read_json
from deltaguard.models.layout import ADAPTER_CONFIG
from deltaguard.text import shortened

MERGE = (
    "Merge it first (`merged = peft_model.merge_and_unload()`, then `merged.save_pretrained(...)`) "
    "and give the merged checkpoint."
)
# With these, PEFT changes more than aligned + scale · B A, or something else.
_VARIANTS = (
    *("use_dora", "use_bdlora", "use_qalora", "lora_bias"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "layer_replication"),
    *("arrow_config", "kasa_config", "megatron_config", "monteclora_config", "velora_config"),
)
# PEFT's other fields, of training or of a variant that another field asks for: they change no weight.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "exclude_modules", "layers_pattern", "layers_to_transform", "peft_version"),
        *("inference_mode", "lora_dropout", "runtime_config", "task_type"),
        *("corda_config", "ensure_weight_tying", "eva_config", "loftq_config", "lora_ga_config"),
        *("megatron_core", "qalora_group_size"),
    }
)
# All other initialisations (PiSSA, OLoRA, ...) change the model's own weights too.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_SHOWN = 80

_LONGEST_PATTERN, _DEEPEST_PATTERN = 2000, 5
# What re and regex read alike and regex compiles at once: it writes out repetitions of groups.
_PLAIN_PATTERN = re.compile(
    r"(?:[^\\(\[{]|\\[^A-Za-z0-9]|\\[bBdDsSwW]|\((?:\?:|(?!\?))"
    r"|\[\^?(?:(?!--)[\w.-]|\\[^A-Za-z0-9]|\\[dDsSwW])+\]"
    r"|(?<!\))\{\d{1,2}(?:,\d{0,2})?\})*"
)

_Value = TypeVar("_Value")
_Rank = Annotated[int, Field(ge=1, le=2**31 - 1)]
# Far beyond any in use, and far within what float32 holds.
_Alpha = Annotated[float, Field(ge=-1e30, le=1e30)]


class LoraConfig(BaseModel):
    """What a plain LoRA adapter's `adapter_config.json` says, under PEFT's names and with its defaults.

    Attributes:
        peft_type: the kind of adapter.
        base_model_name_or_path: the model that it belongs to.
        revision: of that model on the Hub.
        r: rank of its products.
        lora_alpha: B A is multiplied by alpha / rank,
        use_rslora: or by alpha / √rank.
        rank_pattern: ranks of other modules, by regular expressions over their names.
        alpha_pattern: alphas of other modules, likewise.
        target_modules: the modules that have products, by endings of their names or as one expression.
        modules_to_save: the modules that are there as a whole.
        fan_in_fan_out: whether the weights are stored as (in, out); PEFT goes by the module's class.
        bias: which biases were trained.
        init_lora_weights: how A and B began.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: _Rank = 8
    lora_alpha: _Alpha = 8.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, _Rank] | None = None
    alpha_pattern: Mapping[str, _Alpha] | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool | None = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True


@dataclass(frozen=True)
class Scaling:
    """What a configuration says of one module's product.

    Attributes:
        rank: of A and B.
        alpha: its alpha.
        factor: what B A is multiplied by.
    """

    rank: int
    alpha: float
    factor: float


def read_lora_config(folder: Path, reference: str) -> LoraConfig:
    """Read the configuration of an adapter that is plain LoRA.

    Args:
        folder: the adapter's folder.
        reference: what the user called it, for messages.

    Raises:
        DeltaguardError: the folder holds no adapter, or one that cannot be expanded. All reasons are listed.
    """
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        raise DeltaguardError(f"{reference} is not a PEFT adapter: there is no {ADAPTER_CONFIG}.")
    lora = read_json(path, LoraConfig, remedy=f"If the file is damaged, copy it again. If not: {MERGE}")
    _require_plain(lora, reference)
    return lora


def refuse_more_than_plain(written: bytes, reference: str) -> None:
    """Refuse an adapter that could not be expanded, by what its `adapter_config.json` will hold.

    Args:
        written: the content of that file.
        reference: what to call the adapter in messages.

    Raises:
        DeltaguardError: it is no plain LoRA. All reasons are listed.
    """
    source = f"The configuration of the adapter {reference}"
    _require_plain(parse_json(written, LoraConfig, source=source, remedy=MERGE), reference)


def _require_plain(lora: LoraConfig, reference: str) -> None:
    if problems := _more_than_plain(lora):
        raise DeltaguardError(listed(f"The adapter {reference} cannot be expanded", [*problems, MERGE]))


def find_scalings(
    lora: LoraConfig, modules: Iterable[str], reference: str, *, seconds: float = 5.0
) -> dict[str, Scaling]:
    """Find rank and scale of modules as PEFT does: those of the first pattern that fits the module's name.

    Args:
        lora: the configuration.
        modules: names of modules.
        reference: what the user called the adapter, for messages.
        seconds: how long all patterns together may take.

    Raises:
        DeltaguardError: a pattern cannot be read, or takes too long.

    Example:
        >>> lora = LoraConfig(peft_type="LORA", r=8, lora_alpha=16, rank_pattern={"v_proj": 2})
        >>> find_scalings(lora, ["layers.0.v_proj"], "my-adapter")["layers.0.v_proj"]
        Scaling(rank=2, alpha=16.0, factor=8.0)
    """
    names = list(dict.fromkeys(modules))
    within = reference, seconds, time.monotonic() + seconds
    ranks = _by_pattern(names, "rank_pattern", lora.rank_pattern or {}, *within)
    alphas = _by_pattern(names, "alpha_pattern", lora.alpha_pattern or {}, *within)
    found: dict[str, Scaling] = {}
    for name in names:
        rank, alpha = ranks.get(name, lora.r), alphas.get(name, lora.lora_alpha)
        found[name] = Scaling(rank, alpha, alpha / (math.sqrt(rank) if lora.use_rslora else rank))
    return found


def _more_than_plain(lora: LoraConfig) -> list[str]:
    """Why an adapter with this configuration is more than aligned + scale · B A."""
    others = {name: value for name, value in (lora.model_extra or {}).items() if value}
    problems = [f"it uses `{name}` ({_short(others[name])})." for name in _VARIANTS if name in others]
    if lora.bias != "none":
        problems.append(f"it trained biases (`bias` is {_short(lora.bias)}).")
    if lora.init_lora_weights not in _INITIALISATIONS:
        problems.append(
            f"`init_lora_weights` is {_short(lora.init_lora_weights)}, which changes the model's own weights "
            "too."
        )
    version = _short(others.get("peft_version", "?"))
    problems.extend(
        f"`{name}` ({_short(value)}), of PEFT {version}, is unknown to this deltaguard: upgrade it."
        for name, value in others.items()
        if name not in _VARIANTS and name not in _WITHOUT_EFFECT
    )
    return problems


def _short(value: Any) -> str:
    return shortened(repr(value), _SHOWN)


def _by_pattern(
    modules: Iterable[str],
    field: str,
    patterns: Mapping[str, _Value],
    reference: str,
    seconds: float,
    end: float,
) -> dict[str, _Value]:
    """Find the value that a module has by the first pattern that fits its name, or by the name itself."""
    found: dict[str, _Value] = {}
    waiting = list(modules)
    for pattern, value in patterns.items():
        try:
            compiled = _compiled(pattern)
            fitting = [name for name in waiting if compiled.match(name, timeout=_seconds_until(end))]
        except (TimeoutError, ValueError) as error:
            why = f"takes more than {seconds:g} s" if isinstance(error, TimeoutError) else error
            raise DeltaguardError(
                f"The adapter {reference} cannot be used: the pattern {_short(pattern)} of `{field}` in its "
                f"{ADAPTER_CONFIG} {why}. Write the names of the modules in its place."
            ) from error
        found |= dict.fromkeys(fitting, value)
        waiting = [name for name in waiting if name not in found]
    return found | {name: patterns[name] for name in waiting if name in patterns}


def _seconds_until(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _compiled(pattern: str) -> Any:
    """Give a pattern for matching within a time, if it is one to PEFT, which compiles it by re."""
    plain = len(pattern) <= _LONGEST_PATTERN and _PLAIN_PATTERN.fullmatch(pattern)
    if not plain or not _is_flat(pattern):
        raise ValueError("is more than deltaguard evaluates")
    whole = rf"(.*\.)?({pattern})$"
    try:
        return regex.compile(re.compile(whole).pattern, cache_pattern=False)
    except (re.error, regex.error) as error:
        raise ValueError(f"is no regular expression ({error})") from error


def _is_flat(pattern: str) -> bool:
    """Whether groups lie within few others, and each that is closed was opened."""
    depth = 0
    for sign in re.sub(r"\\.|\[(?:\\.|[^\\\]])*\]", "", pattern, flags=re.DOTALL):
        depth += (sign == "(") - (sign == ")")
        if not 0 <= depth <= _DEEPEST_PATTERN:
            return False
    return True

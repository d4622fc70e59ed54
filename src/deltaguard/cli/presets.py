"""Options of `restore` from a file, or by the name of a preset that comes with deltaguard."""

import difflib
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

from deltaguard.errors import DeltaguardError
from deltaguard.files import expanded, read_yaml
from deltaguard.methods import METHODS
from deltaguard.methods.method import PricedMethod
from deltaguard.restoration.options import DEFAULT_MAX_ADDED, GUARDS

Preset = Literal["careful", "balanced"]
"""A set of options with a name, the closest to the aligned model first. A file called so is `./careful`."""

PRESETS: tuple[Preset, ...] = get_args(Preset)

_DECIDED: Mapping[str, tuple[str, ...]] = {
    "strength": (
        *("max_added_attack_success", "max_safety_kl", "training_data", "confidence"),
        *("prompts", "judge", "answer_tokens", "refine"),
    ),
    "max_added_attack_success": ("strength", "confidence"),
    "max_safety_kl": ("strength",),
    "training_data": ("strength", "max_safety_kl", "confidence"),
}
"""What stands for another way to say how much is kept, by the option that says it on the command line."""


def read_options(given: Preset | Path) -> dict[str, Any]:
    """Read options of a restore by a preset's name, or from a YAML or JSON file.

    Args:
        given: a name, or the path of a file.

    Returns:
        Values by the names that options have in Python.

    Raises:
        DeltaguardError: there is neither a preset nor a file of that name, or the file maps no options.

    Example:
        >>> read_options("careful")["max_safety_kl"]
        0.0003
    """
    shipped = Path(str(files("deltaguard"))) / "data" / "presets"
    path = expanded(given) if isinstance(given, Path) else shipped / f"{given}.yaml"
    if not os.path.exists(path):  # noqa: PTH110  # pathlib raises for a name that no file can have
        close = difflib.get_close_matches(str(given), PRESETS, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise DeltaguardError(f"There is no file {given}, and the presets are {', '.join(PRESETS)}.{meant}")
    remedy = "It must map options to values, such as `method: kfac`."
    options = read_yaml(path, TypeAdapter(dict[str, Any]), remedy=remedy)
    return {name.replace("-", "_"): value for name, value in options.items()}


def merged(options: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Put options of the command line over those of a file, without what they decide in another way.

    Args:
        options: of the file.
        named: of the command line.

    Example:
        >>> merged({"method": "kfac", "max_safety_kl": 0.0003}, {"strength": 0.5})
        {'method': 'kfac', 'strength': 0.5}
        >>> merged({"method": "kfac", "max_safety_kl": 0.0003}, {"method": "wise-ft"})
        {'method': 'wise-ft'}
        >>> merged({"method": "kfac", "max_safety_kl": 0.0003}, {"training_data": "unknown"})
        {'max_added_attack_success': 2.0, 'method': 'kfac', 'max_safety_kl': 0.0003}
    """
    method = METHODS.get(named.get("method", ""))
    without_price = method is not None and not isinstance(method, PricedMethod)
    says_more = without_price or {"max_safety_kl", "strength"} & named.keys()
    if _is_closer(options.get("max_safety_kl")) and named.get("training_data") == "unknown" and not says_more:
        # Whoever names data that nobody knows asks for answers to decide, and for no looser limit.
        named = {name: value for name, value in named.items() if name != "training_data"}
        options = {"max_added_attack_success": DEFAULT_MAX_ADDED, **options}
    gone = {name for given, names in _DECIDED.items() if given in named for name in names}
    if without_price:
        gone.update(_DECIDED["strength"])
    # Where nothing else says that answers decide, they would no more.
    if "max_safety_kl" in named and "max_added_attack_success" in {*options, *named}:
        gone.add("training_data")
    return {name: value for name, value in options.items() if name not in gone} | dict(named)


def _is_closer(limit: Any) -> bool:
    """Whether a file's limit is below that for data of unknown origin; YAML reads `1e-4` as a text."""
    try:
        return float(limit) < GUARDS["unknown"]
    except (TypeError, ValueError):
        return False


def presets_help() -> str:
    """List all presets with what they set, for the end of a help page."""
    lines = ["Presets of `--config`:", ""]
    lines += [f"- `{name}`: {as_options(read_options(name))}" for name in PRESETS]
    return "\n".join(lines)


def as_options(values: Mapping[str, Any]) -> str:
    """Write options as a command line has them.

    Example:
        >>> as_options({"method": "kfac", "max_safety_kl": 0.0003})
        '`--method kfac` `--max-safety-kl 0.0003`'
    """
    return " ".join(f"`--{name.replace('_', '-')} {value}`" for name, value in values.items())

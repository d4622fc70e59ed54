"""Defences as they are run where each is measured once: without options, or at a strength that was given."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltaguard.errors import DeltaguardError
from deltaguard.restoration.options import RestoreConfig
from deltaguard.studies.defences import Defence, DefenceInputs, DefendedModel, defences, restored


@dataclass(frozen=True)
class Repair:
    """A defence, and how it is run.

    Attributes:
        name: of the defence; behind it, where one was given, `=` and the strength.
        defence: what is run.
        setting: its strength, or the options of a restore without any.
    """

    name: str
    defence: Defence
    setting: float | RestoreConfig

    def __call__(self, request: DefenceInputs) -> DefendedModel:
        """Make a fine-tune safe."""
        if isinstance(self.setting, RestoreConfig):
            return restored(request, self.setting)
        return self.defence.make(request, self.setting)


def repairs(names: Sequence[str]) -> tuple[Repair, ...]:
    """Read names of defences, such as `kfac`, or `greedy=0.45` with a strength.

    Raises:
        DeltaguardError: a defence is unknown, none is named, a strength is none of its own, or it needs one.

    Example:
        >>> [(each.defence.name, each.setting) for each in repairs(["published=0.3", "wise-ft=0.1"])]
        [('published', 0.3), ('wise-ft', 0.1)]
    """
    if not names:
        raise DeltaguardError(f"No method was chosen. The methods are {', '.join(defences())}.")
    return tuple(map(_repair, dict.fromkeys(names)))


def _repair(name: str) -> Repair:
    method, given, strength = name.partition("=")
    defence = defences().get(method)
    if defence is None:
        raise DeltaguardError(f"There is no method {method}. The methods are {', '.join(defences())}.")
    if given:
        return Repair(name, defence, _strength(defence, strength))
    if defence.standard is None:
        raise DeltaguardError(
            f"{method} has no strength of its own: give it one here, such as {method}={defence.ladder[3]:g}."
        )
    return Repair(name, defence, defence.standard)


def _strength(defence: Defence, text: str) -> float:
    low, high = defence.ladder[0], defence.ladder[-1]
    try:
        strength = float(text)
    except ValueError:
        strength = math.nan
    if not low <= strength <= high:
        raise DeltaguardError(f"{defence.name} takes strengths from {low:g} to {high:g} here, not {text!r}.")
    return strength

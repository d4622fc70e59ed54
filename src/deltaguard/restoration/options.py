"""What a user may choose about a restore, checked before anything is read."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

Method = Literal["greedy", "published", "interpolate"]
OtherParams = Literal["aligned", "finetuned"]
# The solvers' own names for their options, said again here because the solvers import torch.
Budget = Literal["paper", "fraction"]
Compensation = Literal["joint", "additive", "none"]

DEFAULT_STRENGTH = 0.55
"""Share of the summed safety cost that `greedy` spends by default; docs/strength.md says why."""


class RestoreConfig(BaseModel):
    """Options of `restore`.

    Attributes:
        method: the solver; `interpolate` needs no curvature.
        strength: how much is kept, larger keeps more; None takes the default of `greedy` with the budget
            "fraction". Other methods have no default that serves every model, so it must be given.
        budget: how `greedy` reads the strength, see `solvers.greedy`.
        compensation: what `greedy` does to the entries that it does not keep.
        other_params: where norms, biases, embeddings and the output head come from.
        overwrite: replace the checkpoint in the output folder; files of other names stay.
        resume: go on with a restore that was interrupted, one begun with overwrite too.

    Example:
        >>> RestoreConfig(method="interpolate", strength=0.5).chosen_strength
        0.5
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "greedy"
    strength: float | None = None
    budget: Budget = "fraction"
    compensation: Compensation = "joint"
    other_params: OtherParams = "aligned"
    overwrite: bool = False
    resume: bool = False

    @model_validator(mode="after")
    def _check(self) -> "RestoreConfig":
        default = self.method == "greedy" and self.budget == "fraction"
        if self.strength is None and not default:
            raise ValueError(
                f"strength has no default with method {self.method} and budget {self.budget}: give one."
            )
        top = 1.0 if default or self.method == "interpolate" else float("inf")
        if not 0 <= self.chosen_strength <= top:
            raise ValueError(f"strength is {self.strength}; it must lie in [0, {top:g}].")
        if self.method != "greedy" and (self.budget != "fraction" or self.compensation != "joint"):
            raise ValueError("budget and compensation are options of method greedy.")
        return self

    @property
    def chosen_strength(self) -> float:
        """The strength given, or the default."""
        return DEFAULT_STRENGTH if self.strength is None else self.strength

    @property
    def needs_curvature(self) -> bool:
        """Whether the method needs a CurvatureStore."""
        return self.method != "interpolate"

    def what_is_solved(self) -> dict[str, str | float | bool | None]:
        """The options that decide the output, for the report and for recognising an interrupted run."""
        return self.model_dump(exclude={"overwrite", "resume"}) | {"strength": self.chosen_strength}

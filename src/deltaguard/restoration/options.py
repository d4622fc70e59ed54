"""What a user may choose about a restore, checked before anything is read."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deltaguard.curvature import Rank
from deltaguard.models.canonical import ConfigFrom

Method = Literal["kfac", "ridge", "greedy", "published", "interpolate"]
OtherParams = Literal["aligned", "finetuned"]
OutputFormat = Literal["checkpoint", "adapter"]
# The solvers' own names for their options, said again here because the solvers import torch.
Budget = Literal["paper", "fraction"]
Compensation = Literal["joint", "additive", "none"]

DEFAULT_MAX_SAFETY_KL = 6e-4
"""Nats per response token that a restore may cost by default; docs/strength.md says why."""

SMALLEST_MAX_SAFETY_KL = 1e-9
"""A smaller limit cannot be told from what rounding measures of two models that are the same."""

DEFAULT_STRENGTH = 0.55
"""Share of the summed safety cost that `greedy` spends by default; docs/strength.md says why."""


class RestoreConfig(BaseModel):
    """Options of `restore`.

    Attributes:
        method: the solver; `interpolate` needs no curvature.
        max_safety_kl: the dial of `kfac` and `ridge`, and their default: keep as much as a safety KL of so
            many nats per response token allows, measured on held-out safety conversations; 1e-9 at least.
        strength: how much is kept, larger keeps more, instead of the dial. `kfac` and `ridge`: share of the
            delta's predicted safety KL; `greedy` has a default with the budget "fraction"; `published` and
            `interpolate` have none.
        budget: how `greedy` reads the strength, see `solvers.greedy`.
        compensation: what `greedy` does to the entries that it does not keep.
        other_params: where norms, biases, embeddings and the output head come from.
        config_from: the model whose configuration, tokenizer and chat template the output has, and with which
            the dial measures; where absent, the two models must agree on them.
        output_format: `checkpoint` mirrors the fine-tuned one; `adapter` is a PEFT LoRA adapter over the
            aligned model, which holds the linear layers and nothing else.
        adapter_rank: of an adapter; None takes for each layer the smallest that loses 1 % of its restored
            delta's squared norm at most. What the rank loses is lost before the dial measures.
        device: where the model runs that the dial measures; `auto` is CUDA where there is one.
        overwrite: replace the files of an earlier restore, which its report in the output folder lists; all
            others stay.
        resume: go on with a restore that was interrupted, one begun with overwrite too; the finished output
            of the same job is left as it is.

    Example:
        >>> RestoreConfig().dial
        0.0006
        >>> RestoreConfig(method="interpolate", strength=0.5).dial is None
        True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "kfac"
    max_safety_kl: float | None = Field(default=None, ge=SMALLEST_MAX_SAFETY_KL, allow_inf_nan=False)
    strength: float | None = Field(default=None, allow_inf_nan=False)
    budget: Budget = "fraction"
    compensation: Compensation = "joint"
    other_params: OtherParams = "aligned"
    config_from: ConfigFrom | None = None
    output_format: OutputFormat = "checkpoint"
    adapter_rank: int | None = Field(default=None, ge=1)
    device: str = "auto"
    overwrite: bool = False
    resume: bool = False

    @model_validator(mode="after")
    def _check(self) -> "RestoreConfig":
        if self.max_safety_kl is not None and not self.has_price:
            raise ValueError(f"max_safety_kl is the dial of methods kfac and ridge; {self.method} has none.")
        if self.max_safety_kl is not None and self.strength is not None:
            raise ValueError("max_safety_kl and strength both say how much is kept: give one.")
        if self.method != "greedy" and (self.budget != "fraction" or self.compensation != "joint"):
            raise ValueError("budget and compensation are options of method greedy.")
        if self.output_format == "adapter" and self.other_params != "aligned":
            raise ValueError("an adapter leaves norms, biases and embeddings as the aligned model has them.")
        if self.output_format != "adapter" and self.adapter_rank is not None:
            raise ValueError("adapter_rank is an option of output_format adapter.")
        self._check_strength()
        return self

    def _check_strength(self) -> None:
        default = self.method == "greedy" and self.budget == "fraction"
        if self.strength is None and not (default or self.has_price):
            raise ValueError(
                f"strength has no default with method {self.method} and budget {self.budget}: give one."
            )
        bounded = default or self.has_price or self.method == "interpolate"
        top = 1.0 if bounded else float("inf")
        if self.strength is not None and not 0 <= self.strength <= top:
            raise ValueError(f"strength is {self.strength}; it must lie in [0, {top:g}].")

    @property
    def has_price(self) -> bool:
        """Whether the method has one price of safety, μ, for all layers."""
        return self.method in ("kfac", "ridge")

    @property
    def dial(self) -> float | None:
        """The safety KL allowed, or `None` where a strength decides."""
        if not self.has_price or self.strength is not None:
            return None
        return DEFAULT_MAX_SAFETY_KL if self.max_safety_kl is None else self.max_safety_kl

    @property
    def chosen_strength(self) -> float:
        """The strength given, or the default of `greedy`."""
        return DEFAULT_STRENGTH if self.strength is None else self.strength

    @property
    def needs_curvature(self) -> bool:
        """Whether the method needs a CurvatureStore."""
        return self.method != "interpolate"

    @property
    def rank(self) -> Rank:
        """What a CurvatureStore must keep for the method."""
        return "auto" if self.has_price else "full"

    def what_is_solved(self) -> dict[str, str | float | bool | None]:
        """The options that decide the output, for the report and for recognising an interrupted run."""
        own = {"max_safety_kl": self.dial} if self.has_price else {"strength": self.chosen_strength}
        if self.has_price and self.strength is not None:
            own = {"strength": self.strength}
        of_greedy = {"budget", "compensation"} if self.method != "greedy" else set[str]()
        if_chosen = {"config_from"} if self.config_from is None else set[str]()
        of_adapters = {"adapter_rank"} if self.output_format != "adapter" else set[str]()
        hidden = {"overwrite", "resume", "device", "max_safety_kl", "strength"}
        chosen = self.model_dump(exclude=hidden | of_greedy | of_adapters | if_chosen)
        return {"method": chosen.pop("method"), **own, **chosen}

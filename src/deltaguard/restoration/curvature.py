"""What a solver needs to know of a layer's curvature, read from a store when its turn comes."""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from deltaguard.curvature.store import CurvatureStore
from deltaguard.restoration.options import Method
from deltaguard.restoration.plan import Step
from deltaguard.solvers import Factor, Spectrum, scaled_identity


@dataclass(frozen=True)
class Spectra:
    """Eigenpairs of H and G."""

    inputs: Spectrum
    outputs: Spectrum


Curvature = Factor | Tensor | Spectra
"""A `Factor` for `greedy`, H for `published`, `Spectra` for `kfac` and `ridge`."""


@dataclass
class CurvatureReader:
    """Reads what each group shares once, and holds it only while layers of the group are still to come.

    Attributes:
        store: the aligned model's curvature.
        method: decides what is read.
        uses: how many steps still need each group.
    """

    store: CurvatureStore
    method: Method
    uses: Counter[str]
    _held: dict[str, Factor | Tensor | Spectrum] = field(
        default_factory=dict[str, Factor | Tensor | Spectrum]
    )

    @property
    def gives_spectra(self) -> bool:
        """Whether layers are projected on eigenpairs."""
        return self.method in ("kfac", "ridge")

    def take(self, step: Step, *, needed: bool) -> Curvature | None:
        """The curvature that the method needs for a step; nothing is read where it is not needed."""
        if step.group is None:
            return None
        if needed and step.group not in self._held:
            self._held[step.group] = self._read(step.group)
        self.uses[step.group] -= 1
        shared = self._held.get(step.group) if needed else None
        if not self.uses[step.group]:
            self._held.pop(step.group, None)
        if isinstance(shared, Spectrum):
            return Spectra(shared, self._outputs(step, like=shared))
        return shared

    def _read(self, group: str) -> Factor | Tensor | Spectrum:
        if self.method == "greedy":
            return self.store.factor(group)
        if self.method == "published":
            return self.store.hessian(group)
        return self.store.input_spectrum(group)

    def _outputs(self, step: Step, *, like: Spectrum) -> Spectrum:
        """G, or for `ridge` its mean eigenvalue times the identity: prices are in nats in both."""
        tensor = step.aligned_name
        if self.method == "kfac":
            return self.store.output_spectrum(tensor)
        return scaled_identity(step.matrix_shape[0], self.store.output_mean(tensor), like=like.values)

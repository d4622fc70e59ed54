"""What a store keeps of one group of layers: eigenpairs of its curvature, and on request everything.

A symmetric matrix and a triangular one of the same size fit into one: the upper triangle with the diagonal
holds the raw sum, the part below the diagonal that of the Cholesky factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaguard.curvature.sums import (
    LayerGroup,
    LinearLayer,
    Moment,
    Reached,
    Sums,
    check_sum,
    normalise,
    output_name,
)
from deltaguard.errors import DeltaguardError
from deltaguard.solvers.factor import Factor, factorise
from deltaguard.solvers.spectrum import Spectrum, spectrum

PACKED_FIELDS = ("matrix", "diagonal", "order", "inverse_diagonal")
"""Fields of `Packed` that are tensors, as they are stored: `{group}.{field}`."""


@dataclass(frozen=True)
class Packed:
    """A moment and the factor of its mean, as they are stored.

    Attributes:
        matrix: (in, in); upper triangle with the diagonal: the raw sum; below it: `Factor.lower`.
        diagonal: (in,); diagonal of `Factor.lower`.
        order: (in,) int32; see `Factor`.
        inverse_diagonal: (in,); see `Factor`.
        tokens: how many tokens were summed.
        damping: see `Factor`.
        dampening: see `Factor`.
    """

    matrix: Tensor
    diagonal: Tensor
    order: Tensor
    inverse_diagonal: Tensor
    tokens: int
    damping: float
    dampening: float


def pack(name: str, moment: Moment, *, dampening: float) -> Packed:
    """Factorise the mean of a moment and pack both.

    Args:
        name: the group, for the messages.
        moment: at least one token, finite and not zero (see `check_sum`).
        dampening: see `solvers.factor.factorise`.

    Raises:
        DeltaguardError: the sum cannot be factorised.
    """
    try:
        factor = factorise(normalise(moment), dampening=dampening)
    except ValueError as error:
        raise DeltaguardError(f"The curvature of `{name}` is of no use: {error}") from error
    return Packed(
        matrix=moment.total.triu().add_(factor.lower.tril(-1)),
        diagonal=factor.lower.diagonal().clone(),
        order=factor.order.to(torch.int32),
        inverse_diagonal=factor.inverse_diagonal,
        tokens=moment.tokens,
        damping=factor.damping,
        dampening=factor.dampening,
    )


def unpack_moment(packed: Packed) -> Moment:
    """Read the raw sum, exactly symmetric."""
    upper = packed.matrix.triu()
    return Moment(upper + upper.triu(1).T, packed.tokens)


def unpack_factor(packed: Packed) -> Factor:
    """Read the factor that `pack` computed, bit for bit, in place of `packed.matrix`; the sum is lost."""
    lower = packed.matrix.tril_(-1)
    lower.diagonal().copy_(packed.diagonal)
    return Factor(
        order=packed.order.long(),
        lower=lower,
        inverse_diagonal=packed.inverse_diagonal,
        damping=packed.damping,
        dampening=packed.dampening,
    )


@dataclass(frozen=True)
class Extent:
    """How much of a group is stored.

    Attributes:
        share: share of the eigenpairs of each matrix, in (0, 1]; at least one is kept.
        full: whether raw sums and factors are kept as well, in float32 all of it. Otherwise eigenvectors are
            kept in half precision: their entries lie in [-1, 1].
    """

    share: float
    full: bool

    def rank(self, size: int) -> int:
        """Say how many eigenpairs of a (size, size) matrix are kept."""
        return size if self.full else max(1, int(self.share * size))

    @property
    def vectors_dtype(self) -> torch.dtype:
        """How eigenvectors are stored."""
        return torch.float32 if self.full else torch.float16


def share_within(groups: Sequence[LayerGroup], limit: int) -> float:
    """Find the share of eigenpairs with which all groups together take about `limit` bytes, at most 1."""
    entries = sum(size**2 for group in groups for _, size in group.matrices())
    return min(1.0, limit / (torch.float16.itemsize * entries))


@dataclass(frozen=True)
class Decomposed:
    """A curvature matrix as it is stored: its largest eigenpairs, and the mean of all its eigenvalues."""

    spectrum: Spectrum
    mean: float


@dataclass(frozen=True)
class GroupCurvature:
    """The curvature of a group of layers that share an input, as a store keeps it.

    Attributes:
        inputs: H.
        outputs: G of each layer.
        packed: the raw sum of H and its factor; `None` in a store that is cut off.
        totals: the raw sums of G, likewise empty.
        reached: see `Sums`.
    """

    inputs: Decomposed
    outputs: tuple[Decomposed, ...]
    packed: Packed | None
    totals: tuple[Tensor, ...]
    reached: Reached | None = None


def group_curvature(
    group: LayerGroup, sums: Sums, *, response_tokens: int, dampening: float, extent: Extent
) -> GroupCurvature:
    """Decompose the sums of one group, and factorise H where everything is kept.

    Args:
        group: the group.
        sums: over at least one token.
        response_tokens: how many tokens were drawn in all: G is the sum divided by that.
        dampening: see `solvers.factor.factorise`.
        extent: how much is kept.

    Raises:
        DeltaguardError: a sum is not finite, zero or not positive semi-definite, or H cannot be factorised.
    """
    inputs, packed = decompose_inputs(group, sums.inputs, dampening=dampening, extent=extent)
    outputs = [
        decompose_outputs(layer, total, response_tokens=response_tokens, extent=extent)
        for layer, total in zip(group.layers, sums.outputs, strict=True)
    ]
    totals = sums.outputs if extent.full else ()
    return GroupCurvature(inputs, tuple(outputs), packed, totals, sums.reached)


def decompose_inputs(
    group: LayerGroup, moment: Moment, *, dampening: float, extent: Extent
) -> tuple[Decomposed, Packed | None]:
    """Decompose the sum over a group's inputs, and factorise it where everything is kept.

    Raises:
        DeltaguardError: as `group_curvature`.
    """
    check_sum(group.name, moment.total, "inputs")
    packed = pack(group.name, moment, dampening=dampening) if extent.full else None
    return _decomposed(group.name, normalise(moment), extent), packed


def decompose_outputs(
    layer: LinearLayer, total: Tensor, *, response_tokens: int, extent: Extent
) -> Decomposed:
    """Decompose the sum over the gradients of a layer's output.

    Raises:
        DeltaguardError: as `group_curvature`.
    """
    check_sum(layer.name, total, "gradients")
    return _decomposed(layer.name, total / response_tokens, extent)


def _decomposed(name: str, matrix: Tensor, extent: Extent) -> Decomposed:
    try:
        found = spectrum(matrix, extent.rank(matrix.shape[0]))
    except ValueError as error:
        raise DeltaguardError(f"The curvature of `{name}` is of no use: {error}") from error
    if not bool(found.values.any()):
        raise DeltaguardError(f"The curvature of `{name}` is too small for float32: nothing of it is left.")
    return Decomposed(found, float(matrix.diagonal().double().mean()))


def stored_tensors(group: LayerGroup, content: GroupCurvature, extent: Extent) -> dict[str, Tensor]:
    """Lay out one group's tensors by their names in the store."""
    tensors: dict[str, Tensor] = {}
    for (name, _), part in zip(group.matrices(), (content.inputs, *content.outputs), strict=True):
        tensors[f"{name}.values"] = part.spectrum.values.float()
        tensors[f"{name}.vectors"] = part.spectrum.vectors.to(extent.vectors_dtype)
    if content.packed is not None:
        for field in PACKED_FIELDS:
            tensors[f"{group.name}.{field}"] = getattr(content.packed, field)
        for layer, total in zip(group.layers, content.totals, strict=True):
            tensors[f"{output_name(layer)}.total"] = total
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Form:
    """How one tensor is stored."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


def stored_forms(group: LayerGroup, extent: Extent) -> dict[str, Form]:
    """Say how each of `stored_tensors` is stored, by name."""
    forms: dict[str, Form] = {}
    for name, size in group.matrices():
        forms[f"{name}.values"] = Form(torch.float32, (extent.rank(size),))
        forms[f"{name}.vectors"] = Form(extent.vectors_dtype, (size, extent.rank(size)))
    if extent.full:
        for field in PACKED_FIELDS:
            dtype = torch.int32 if field == "order" else torch.float32
            dimensions = 2 if field == "matrix" else 1
            forms[f"{group.name}.{field}"] = Form(dtype, (group.in_features,) * dimensions)
        for layer in group.layers:
            forms[f"{output_name(layer)}.total"] = Form(torch.float32, (layer.out_features,) * 2)
    return forms


def stored_bytes(group: LayerGroup, extent: Extent) -> int:
    """Count the bytes of a group."""
    return sum(form.nbytes for form in stored_forms(group, extent).values())


def spectra_bytes(group: LayerGroup, extent: Extent) -> int:
    """Count the bytes of a group's eigenvectors."""
    entries = sum(size * extent.rank(size) for _, size in group.matrices())
    return entries * extent.vectors_dtype.itemsize

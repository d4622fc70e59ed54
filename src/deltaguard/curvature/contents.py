"""What a store keeps of one group of layers: eigenpairs of its curvature, and on request everything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from deltaguard.curvature.moments import Moment, Packed, check_sum, normalise, pack
from deltaguard.errors import DeltaguardError
from deltaguard.solvers.spectrum import Spectrum, spectrum

_Size = Annotated[int, Field(gt=0, le=1 << 31)]


@dataclass(frozen=True)
class Layer:
    """One linear layer.

    Attributes:
        tensor: its weight's name in the aligned checkpoint.
        transposed: whether the weight is stored (in, out), as GPT-2's Conv1D is, not (out, in).
        out_features: size of the output, and of G.
    """

    tensor: str
    transposed: bool
    out_features: _Size

    @property
    def name(self) -> str:
        """Its name in the aligned checkpoint."""
        return self.tensor.removesuffix(".weight")


@dataclass(frozen=True)
class Group:
    """Layers that see the same input, and so share one H.

    Attributes:
        name: the first layer's name.
        in_features: size of the input, and of H.
        tokens: how many tokens H was summed over.
        layers: the layers, in the model's order.
    """

    name: str
    in_features: _Size
    tokens: Annotated[int, Field(gt=0, le=1 << 62)]
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Sums:
    """What calibration summed for one group.

    Attributes:
        inputs: Σ x xᵀ over all tokens.
        outputs: Σ g gᵀ over all tokens, (out, out), of each layer.
    """

    inputs: Moment
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Decomposed:
    """A curvature matrix as it is stored.

    Attributes:
        spectrum: its largest eigenpairs and what stands for the rest.
        mean: of all its eigenvalues.
    """

    spectrum: Spectrum
    mean: float


@dataclass(frozen=True)
class GroupCurvature:
    """Everything that a store keeps of one group.

    Attributes:
        inputs: H.
        outputs: G of each layer.
        packed: the raw sum of H and its factor; `None` in a store that is cut off.
        totals: the raw sums of G, likewise empty.
    """

    inputs: Decomposed
    outputs: tuple[Decomposed, ...]
    packed: Packed | None
    totals: tuple[Tensor, ...]


@dataclass(frozen=True)
class Extent:
    """How much of a group is stored.

    Attributes:
        share: share of the eigenpairs of each matrix, in (0, 1]; at least one is kept.
        whole: whether raw sums and factors are kept as well, in float32 all of it. Otherwise eigenvectors are
            kept in half precision: their entries lie in [-1, 1].
    """

    share: float
    whole: bool

    def rank(self, size: int) -> int:
        """How many eigenpairs of a (size, size) matrix are kept."""
        return size if self.whole else max(1, int(self.share * size))

    @property
    def vectors_dtype(self) -> torch.dtype:
        """How eigenvectors are stored."""
        return torch.float32 if self.whole else torch.float16


def share_within(groups: Sequence[Group], limit: int) -> float:
    """The share of eigenpairs with which all groups together take about `limit` bytes, at most 1."""
    entries = sum(g.in_features**2 + sum(layer.out_features**2 for layer in g.layers) for g in groups)
    return min(1.0, limit / (torch.float16.itemsize * entries))


def group_curvature(
    group: Group, sums: Sums, *, response_tokens: int, dampening: float, extent: Extent
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
    check_sum(group.name, sums.inputs.total, "inputs")
    outputs: list[Decomposed] = []
    for layer, total in zip(group.layers, sums.outputs, strict=True):
        check_sum(layer.name, total, "gradients")
        outputs.append(_decomposed(layer.name, total / response_tokens, extent))
    return GroupCurvature(
        inputs=_decomposed(group.name, normalise(sums.inputs), extent),
        outputs=tuple(outputs),
        packed=pack(group.name, sums.inputs, dampening=dampening) if extent.whole else None,
        totals=sums.outputs if extent.whole else (),
    )


def _decomposed(name: str, matrix: Tensor, extent: Extent) -> Decomposed:
    try:
        found = spectrum(matrix, extent.rank(matrix.shape[0]))
    except ValueError as error:
        raise DeltaguardError(f"The curvature of `{name}` is of no use: {error}") from error
    if not bool(found.values.any()):
        raise DeltaguardError(f"The curvature of `{name}` is too small for float32: nothing of it is left.")
    return Decomposed(found, float(matrix.diagonal().double().mean()))


def stored_tensors(group: Group, content: GroupCurvature, extent: Extent) -> dict[str, Tensor]:
    """The tensors of one group by their names in the store."""
    tensors: dict[str, Tensor] = {}
    for name, part in zip(spectrum_names(group), (content.inputs, *content.outputs), strict=True):
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


def stored_forms(group: Group, extent: Extent) -> dict[str, Form]:
    """Say how each of `stored_tensors` is stored, by name."""
    forms: dict[str, Form] = {}
    for name, size in zip(spectrum_names(group), spectrum_sizes(group), strict=True):
        forms[f"{name}.values"] = Form(torch.float32, (extent.rank(size),))
        forms[f"{name}.vectors"] = Form(extent.vectors_dtype, (size, extent.rank(size)))
    if extent.whole:
        n = group.in_features
        shapes = dict(zip(PACKED_FIELDS, ((n, n), (n,), (n,), (n,)), strict=True))
        for field, shape in shapes.items():
            dtype = torch.int32 if field == "order" else torch.float32
            forms[f"{group.name}.{field}"] = Form(dtype, shape)
        for layer in group.layers:
            forms[f"{output_name(layer)}.total"] = Form(torch.float32, (layer.out_features,) * 2)
    return forms


def stored_bytes(group: Group, extent: Extent) -> int:
    """Count the bytes of a group."""
    return sum(form.nbytes for form in stored_forms(group, extent).values())


def spectra_bytes(group: Group, extent: Extent) -> int:
    """Count the bytes of a group's eigenvectors."""
    return sum(size * extent.rank(size) for size in spectrum_sizes(group)) * extent.vectors_dtype.itemsize


PACKED_FIELDS = ("matrix", "diagonal", "order", "inverse_diagonal")
"""Fields of `Packed` that are tensors, as they are stored: `{group}.{field}`."""


def input_name(group: Group) -> str:
    """What the tensors of a group's H begin with."""
    return f"{group.name}.input"


def output_name(layer: Layer) -> str:
    """What the tensors of a layer's G begin with."""
    return f"{layer.name}.output"


def spectrum_names(group: Group) -> tuple[str, ...]:
    """Name what the tensors of a group's spectra begin with: of H, and of each layer's G."""
    return (input_name(group), *map(output_name, group.layers))


def spectrum_sizes(group: Group) -> tuple[int, ...]:
    """Count the rows of a group's H, and of each layer's G."""
    return (group.in_features, *(layer.out_features for layer in group.layers))

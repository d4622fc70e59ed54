"""Sums that several processes took, added up and decomposed: each matrix by one of them."""

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from deltaguard.curvature.contents import (
    PACKED_FIELDS,
    Decomposed,
    GroupCurvature,
    Packed,
    decompose_inputs,
    decompose_outputs,
)
from deltaguard.curvature.routed import (
    AnyMoment,
    Pool,
    RoutedMoment,
    input_sum,
    output_sum,
    take_sums,
)
from deltaguard.curvature.store_format import Provenance
from deltaguard.curvature.sums import LayerGroup, Reached
from deltaguard.ranks import Ranks
from deltaguard.solvers.spectrum import Spectrum


@dataclass(frozen=True)
class _Matrix:
    """H of a group, or G of one of its layers.

    Attributes:
        group: the group.
        number: 0 of H, 1 of the first layer's G.
        name: of its sum.
        owner: the rank that decomposes it.
    """

    group: LayerGroup
    number: int
    name: str
    owner: int


@dataclass(frozen=True)
class _Numbers:
    """What is found of a matrix besides tensors; of an expert, how much of it is its pool's."""

    tail: float
    mean: float
    reached: tuple[int, float] | None
    packed: tuple[int, float, float] | None


_Found = tuple[_Numbers, Sequence[Tensor]]


def decomposed(
    groups: Sequence[LayerGroup], sums: MutableMapping[str, AnyMoment], provenance: Provenance, ranks: Ranks
) -> Iterator[GroupCurvature]:
    """Decompose the sums of all groups.

    Several processes add up what each summed, every matrix on one of them, which decomposes it; they are
    chosen so that all have about as much to do. All call this.

    Args:
        groups: in the order wanted.
        sums: by the names of the matrices; taken out as they are used, so that memory gets free.
        provenance: of the store that this is for.
        ranks: the processes.

    Returns:
        What a store keeps of each group; on other ranks than the first nothing.

    Raises:
        DeltaguardError: a sum is of no use.
    """
    if ranks.size == 1:
        return (provenance.decompose(group, take_sums(group, sums)) for group in groups)
    matrices = _matrices(groups, ranks)
    _add_up(matrices, sums, ranks)
    own = {
        each.name: _decompose(each, sums.pop(each.name), provenance)
        for each in matrices
        if each.owner == ranks.rank
    }
    if ranks.leads:
        return _collected(groups, matrices, own, ranks)
    for message, tensors in own.values():
        ranks.send(0, message, tensors)
    return iter(())


def _matrices(groups: Sequence[LayerGroup], ranks: Ranks) -> list[_Matrix]:
    found = [
        (group, number, name, size)
        for group in groups
        for number, (name, size) in enumerate(group.matrices())
    ]
    owners = ranks.shares([float(size) ** 3 for *_, size in found])
    return [_Matrix(*each[:3], owner) for each, owner in zip(found, owners, strict=True)]


def _add_up(matrices: Sequence[_Matrix], sums: MutableMapping[str, AnyMoment], ranks: Ranks) -> None:
    """Add up every sum on its owner; no other rank keeps it."""
    pools: set[Pool] = set()
    for each in matrices:
        moment = sums[each.name]
        if isinstance(moment, RoutedMoment) and moment.pool not in pools:
            pools.add(moment.pool)
            moment.pool.add_up(ranks)
        moment.add_up(ranks, each.owner)
        if each.owner != ranks.rank:
            del sums[each.name]


def _decompose(matrix: _Matrix, moment: AnyMoment, provenance: Provenance) -> _Found:
    group, extent = matrix.group, provenance.extent
    tokens = moment.tokens if isinstance(moment, RoutedMoment) else None
    numbers, more = None, list[Tensor]()
    if matrix.number == 0:
        summed, share = input_sum(group, moment)
        found, packed = decompose_inputs(group, summed, dampening=provenance.dampening, extent=extent)
        if packed is not None:
            numbers = packed.tokens, packed.damping, packed.dampening
            more = [getattr(packed, field) for field in PACKED_FIELDS]
    else:
        layer = group.layers[matrix.number - 1]
        total, share = output_sum(layer, moment)
        found = decompose_outputs(layer, total, response_tokens=provenance.response_tokens, extent=extent)
        more = [total] if extent.full else []
    reached = None if tokens is None else (tokens, share)
    pairs = found.spectrum
    tensors = (pairs.values, pairs.vectors.to(extent.vectors_dtype), *more)
    return _Numbers(pairs.tail, found.mean, reached, numbers), tensors


def _collected(
    groups: Sequence[LayerGroup],
    matrices: Sequence[_Matrix],
    own: MutableMapping[str, _Found],
    ranks: Ranks,
) -> Iterator[GroupCurvature]:
    """Put together what all ranks found, group after group."""
    left = iter(matrices)
    for group in groups:
        parts = list[_Found]()
        for _ in group.matrices():
            each = next(left)
            parts.append(own.pop(each.name) if each.owner == ranks.rank else ranks.receive(each.owner))
        yield _joined(parts)


def _joined(parts: Sequence[_Found]) -> GroupCurvature:
    (first, (_, _, *tensors)), *outputs = parts
    matrices = [Decomposed(Spectrum(t[0], t[1], numbers.tail), numbers.mean) for numbers, t in parts]
    reached = [numbers.reached for numbers, _ in parts if numbers.reached is not None]
    packed = None
    if first.packed is not None:
        tokens, damping, dampening = first.packed
        fields = dict(zip(PACKED_FIELDS, tensors, strict=True))
        packed = Packed(**fields, tokens=tokens, damping=damping, dampening=dampening)
    return GroupCurvature(
        inputs=matrices[0],
        outputs=tuple(matrices[1:]),
        packed=packed,
        totals=tuple(tensor for _, (_, _, *total) in outputs for tensor in total),
        reached=Reached(reached[0][0], tuple(share for _, share in reached)) if reached else None,
    )

"""Rows of single tensors put together: by kind of layer, by block, by how a tensor was treated."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deltaguard.reports.records.restore import LayerRow, OtherRow


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some numbers."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Kind:
    """All restored matrices that play the same part in different blocks.

    Attributes:
        label: the shortest end of their names that tells this kind from the others, such as `q_proj`.
        layers: their rows by block number; matrices outside numbered blocks have none and are under -1.
        kept_energy: spread of the share of the delta's energy that is kept; None where no row has a number.
            The others likewise.
        kept_entries: of the share of its entries.
    """

    label: str
    layers: tuple[tuple[int, LayerRow], ...]
    kept_energy: Spread | None
    kept_entries: Spread | None
    safety_cost: Spread | None
    utility_loss: Spread | None


@dataclass(frozen=True)
class OtherGroup:
    """Tensors that were treated alike, for the same reason.

    Attributes:
        source: the model they were taken from.
        reason: why.
        count: how many there are.
        differing: how many of them differ between the two models.
    """

    source: str
    reason: str
    count: int
    differing: int


NO_BLOCK = -1
"""The block number of a matrix outside numbered blocks."""


def block_and_kind(name: str) -> tuple[int, str]:
    """Block number and kind of a tensor, from its name.

    The first number in a dotted name is the block; what follows it, without further numbers and the word
    `weight`, is the kind.

    Example:
        >>> block_and_kind("model.layers.12.self_attn.q_proj.weight")
        (12, 'self_attn.q_proj')
        >>> block_and_kind("h.0.attn.c_attn.weight"), block_and_kind("lm_head.weight")
        ((0, 'attn.c_attn'), (-1, 'lm_head'))
    """
    parts = [part for part in name.split(".") if part != "weight"]
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return NO_BLOCK, ".".join(parts)
    kind = [part for part in parts[at + 1 :] if not part.isdecimal()]
    return int(parts[at]), ".".join(kind or parts[:at])


def kinds(layers: Sequence[LayerRow]) -> tuple[Kind, ...]:
    """Group restored matrices by kind, in the order in which the kinds first appear.

    Args:
        layers: the rows of a report.

    Returns:
        One `Kind` each, its rows by block number.
    """
    groups: defaultdict[str, list[tuple[int, LayerRow]]] = defaultdict(list)
    for row in layers:
        block, kind = block_and_kind(row.name)
        groups[kind].append((block, row))
    labels = _labels(groups)
    return tuple(_kind(labels[kind], rows) for kind, rows in groups.items())


def other_groups(others: Sequence[OtherRow]) -> tuple[OtherGroup, ...]:
    """Count the other tensors by the model they come from and the reason, in order of appearance."""
    count = Counter((row.source, row.reason) for row in others)
    differing = Counter((row.source, row.reason) for row in others if row.differs)
    return tuple(OtherGroup(*key, count=number, differing=differing[key]) for key, number in count.items())


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the numbers among some values; None where there is no number.

    Example:
        >>> spread([0.5, None, 0.1, float("nan"), 0.2])
        Spread(low=0.1, median=0.2, high=0.5)
    """
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    return Spread(min(numbers), statistics.median(numbers), max(numbers)) if numbers else None


def _kind(label: str, rows: list[tuple[int, LayerRow]]) -> Kind:
    rows = sorted(rows, key=lambda row: row[0])
    return Kind(
        label=label,
        layers=tuple(rows),
        kept_energy=spread(row.kept_energy for _, row in rows),
        kept_entries=spread(row.kept_entries for _, row in rows),
        safety_cost=spread(row.safety_cost for _, row in rows),
        utility_loss=spread(row.utility_loss for _, row in rows),
    )


def _labels(names: Iterable[str]) -> dict[str, str]:
    """For each dotted name, the shortest end that no other name shares."""
    ends = {name: [name.split(".", i)[-1] for i in range(name.count("."), -1, -1)] for name in names}
    shared = Counter(end for of_name in ends.values() for end in of_name)
    return {name: next((end for end in of_name if shared[end] == 1), name) for name, of_name in ends.items()}

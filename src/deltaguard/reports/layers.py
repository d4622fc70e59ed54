"""Rows of single tensors put together: by kind of layer and by block."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deltaguard.reports.records.restore import LayerRow

LayerMeasure = Literal["kept_energy", "kept_entries", "safety_cost"]
"""What is drawn of every layer; all are shares."""

NO_BLOCK = -1
"""The block number of a matrix outside numbered blocks."""


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some numbers; all None where there is no number."""

    low: float | None = None
    median: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Kind:
    """All restored matrices that play the same part in different blocks.

    Attributes:
        label: the shortest end of their names that tells this kind from the others, such as `q_proj`.
        layers: their rows by block number; matrices outside numbered blocks have none and are under -1.
    """

    label: str
    layers: tuple[tuple[int, LayerRow], ...]

    def spread(self, measure: str, block: int | None = None) -> Spread:
        """Find smallest, median and largest of a number of the rows, where they have it.

        Args:
            measure: a field of `LayerRow`.
            block: of these rows alone.
        """
        values = [getattr(row, measure) for at, row in self.layers if block is None or at == block]
        numbers = [value for value in values if value is not None and math.isfinite(value)]
        return Spread(min(numbers), statistics.median(numbers), max(numbers)) if numbers else Spread()


def block_and_kind(name: str) -> tuple[int, str]:
    """Find block number and kind of a tensor from its name.

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
    """Group restored matrices by kind, in the order in which the kinds first appear."""
    groups: defaultdict[str, list[tuple[int, LayerRow]]] = defaultdict(list)
    for row in layers:
        block, kind = block_and_kind(row.name)
        groups[kind].append((block, row))
    # For each dotted name, the shortest end that no other name shares.
    ends = {name: [name.split(".", i)[-1] for i in range(name.count("."), -1, -1)] for name in groups}
    shared = Counter(end for of_name in ends.values() for end in of_name)
    return tuple(
        Kind(
            next((end for end in ends[name] if shared[end] == 1), name),
            tuple(sorted(rows, key=lambda row: row[0])),
        )
        for name, rows in groups.items()
    )

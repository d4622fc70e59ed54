"""What makes the numbers of a store a curvature: of a manifest, and of one tensor at a time."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from deltaguard.curvature.contents import Form, spectrum_names, spectrum_sizes, stored_forms
from deltaguard.curvature.store_format import Manifest, StoredGroup
from deltaguard.solvers.solution import is_finite

UNEVENNESS: Mapping[torch.dtype, float] = MappingProxyType({torch.float16: 0.01, torch.float32: 0.001})
"""How far an entry of Vᵀ(V z) may be off that of z = ±1, by the precision of V.

Rounding of sound ones made 0.0013 and 0.00001 at most, over matrices of 1 to 11,008 rows.
"""

TAIL_EXCESS, TAIL_ROUNDING = 1.1, 1e-4
"""The tail is at most so many times the smallest kept eigenvalue, and so much of the largest more."""

MEAN_ROUNDING = 0.01
"""Share by which a sum over eigenvalues may be off the trace."""

_BLOCK_ENTRIES = 1 << 15
"""So few stay in the cache while they are used twice, and torch does not share them out among threads: these
would wait for each other longer than the arithmetic takes, and in the way of the one that hashes.
"""


@dataclass(frozen=True)
class Expected:
    """What the manifest says of one tensor.

    Attributes:
        shard: the file that holds it.
        form: how it is stored.
        problem: finds what is wrong with its numbers, None where nothing is.
    """

    shard: str
    form: Form
    problem: Callable[[Tensor], str | None]


def manifest_problems(manifest: Manifest) -> list[str]:
    """Find what contradicts itself in a manifest whose fields are right one by one."""
    made, files = manifest.provenance, [file.name for file in manifest.files]
    shards = {stored.shard for stored in manifest.groups}
    names = [name for stored in manifest.groups for name in stored_forms(stored.group, made.extent)]
    tensors = [layer.tensor for stored in manifest.groups for layer in stored.group.layers]
    problems = [
        *_repeated("group", (stored.group.name for stored in manifest.groups)),
        *_repeated("layer", tensors),
        *_repeated("file", files),
        *(f"the file {name} is in no list of files" for name in sorted(shards - set(files))),
        *(f"the file {name} holds no group" for name in sorted(set(files) - shards)),
    ]
    # Groups or layers of one name have tensors of one name too.
    return problems or [
        *_repeated("tensor", names),
        *(problem for stored in manifest.groups for problem in _group_problems(stored, manifest)),
    ]


def expected_tensors(manifest: Manifest) -> dict[str, Expected]:
    """Say of every tensor of a store, by name, what it must be."""
    expected: dict[str, Expected] = {}
    for stored in manifest.groups:
        group = stored.group
        numbers = zip(spectrum_names(group), spectrum_sizes(group), stored.tails, stored.means, strict=True)
        values = {f"{name}.values": _Values(size, tail, mean) for name, size, tail, mean in numbers}
        for name, form in stored_forms(group, manifest.provenance.extent).items():
            problem = values.get(name) or _PROBLEMS[name.rpartition(".")[2]]
            expected[name] = Expected(stored.shard, form, problem)
    return expected


def _repeated(what: str, names: Iterable[str]) -> list[str]:
    return [
        f"the {what} `{name}` is there {count} times" for name, count in Counter(names).items() if count > 1
    ]


def _group_problems(stored: StoredGroup, manifest: Manifest) -> list[str]:
    group, made = stored.group, manifest.provenance
    problems: list[str] = []
    for what, numbers in (("tails", stored.tails), ("means", stored.means)):
        if len(numbers) != 1 + len(group.layers):
            problems.append(f"`{group.name}` has {len(numbers)} {what} for {1 + len(group.layers)} matrices")
    if group.tokens != made.tokens:
        problems.append(f"`{group.name}` was summed over {group.tokens} tokens, the store over {made.tokens}")
    for what, number in (("damping", stored.damping), ("dampening", stored.dampening)):
        if (number is not None) != made.extent.whole:
            problems.append(f"`{group.name}` has the {what} {number} in a store of rank {made.rank}")
    return problems


@dataclass(frozen=True)
class _Values:
    """The check of kept eigenvalues against what stands for all of them."""

    size: int
    tail: float
    mean: float

    def __call__(self, values: Tensor) -> str | None:
        if not is_finite(values):
            return "holds eigenvalues that are NaN or infinite"
        kept = values.double()
        largest, smallest = float(kept[0]), float(kept[-1])
        if bool((kept < 0).any()):
            return f"holds a negative eigenvalue, {float(kept.min()):.4g}"
        if bool((kept.diff() > 0).any()):
            return "holds eigenvalues that do not fall"
        if largest == 0:
            return "holds eigenvalues that are all zero"
        problem = self._tail_problem(smallest, largest, len(kept))
        return problem or self._mean_problem(float(kept.sum()), largest)

    def _tail_problem(self, smallest: float, largest: float, rank: int) -> str | None:
        highest = TAIL_EXCESS * smallest + TAIL_ROUNDING * largest if rank < self.size else 0.0
        if self.tail <= highest:
            return None
        others = f"the other {self.size - rank}" if rank < self.size else "others, of which there are none"
        return f"ends at {smallest:.4g}, and the tail that stands for {others} is {self.tail:.4g}"

    def _mean_problem(self, total: float, largest: float) -> str | None:
        lowest, highest = (1 - MEAN_ROUNDING) * total / self.size, (1 + MEAN_ROUNDING) * largest
        if lowest <= self.mean <= highest:
            return None
        return f"has the mean {self.mean:.4g}; these eigenvalues allow {lowest:.4g} to {highest:.4g}"


def _vectors_problem(vectors: Tensor) -> str | None:
    """A probe: V z for fixed random signs z, and Vᵀ of that, which is z again where V is orthonormal.

    Every column has its own entry in it, so that one that is too long, or another's copy, is seen among many.
    """
    rows, rank = vectors.shape
    signs = torch.randint(0, 2, (rank,), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    found = torch.zeros(rank)
    step = max(1, _BLOCK_ENTRIES // rank)
    for start in range(0, rows, step):
        block = vectors[start : start + step].float()
        found.addmv_(block.T, block @ signs)
    off = float((found - signs).abs().max())
    if off <= UNEVENNESS[vectors.dtype]:
        return None
    return _not_finite(vectors) or f"holds columns that are not orthonormal: {off:.2g} off in a random probe"


def _sum_problem(total: Tensor) -> str | None:
    """Of a raw sum; in that of H, a factor has the place below the diagonal."""
    squares = total.diagonal()
    problem = _not_finite(total)
    if problem is None and bool((squares < 0).any()):
        problem = f"holds a negative sum of squares, {float(squares.min()):.4g}"
    if problem is None and not bool(squares.any()):
        problem = "holds sums of squares that are all zero"
    return problem


def _positive_problem(diagonal: Tensor) -> str | None:
    problem = _not_finite(diagonal)
    if problem is None and not bool((diagonal > 0).all()):
        problem = f"holds {float(diagonal.min()):.4g}; all must be above 0"
    return problem


def _order_problem(order: Tensor) -> str | None:
    if torch.equal(order.sort().values, torch.arange(len(order), dtype=order.dtype)):
        return None
    return f"is no order of {len(order)} columns"


def _not_finite(tensor: Tensor) -> str | None:
    if all(is_finite(part) for part in tensor.flatten().split(_BLOCK_ENTRIES)):
        return None
    return f"holds {int((~tensor.isfinite()).sum())} entries that are NaN or infinite"


_PROBLEMS: Mapping[str, Callable[[Tensor], str | None]] = MappingProxyType(
    {
        "vectors": _vectors_problem,
        "matrix": _sum_problem,
        "total": _sum_problem,
        "diagonal": _positive_problem,
        "inverse_diagonal": _positive_problem,
        "order": _order_problem,
    }
)

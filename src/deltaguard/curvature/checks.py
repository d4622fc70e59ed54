"""The files of a store, opened once and read once from beginning to end: what comes out is a valid store."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from deltaguard.curvature.contents import Form, stored_forms
from deltaguard.curvature.leaning import leaning_forms
from deltaguard.curvature.store_format import MANIFEST, Manifest, StoredFile
from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.names import link_target
from deltaguard.models.opened import OpenFile
from deltaguard.models.shards import DTYPES, TensorInfo, parse_header, read_header, shard_problem
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
    """What the manifest says of a tensor: its file, its form, and what finds a problem in its numbers."""

    shard: str
    form: Form
    problem: Callable[[Tensor], str | None]


def open_files(folder: Path, manifest: Manifest) -> tuple[dict[str, OpenFile], dict[str, TensorInfo]]:
    """Open the files of a store, read each once, and check all that can be known of it.

    Returns:
        The files by name, held open, and where each of the store's tensors lies.

    Raises:
        DeltaguardError: the manifest contradicts itself, a file is not the one that was written, or its
            numbers are no curvature. All problems are listed.
    """
    _refuse(folder, manifest, manifest_problems(manifest))
    expected = expected_tensors(manifest)
    problems: list[str] = []
    files: dict[str, OpenFile] = {}
    tensors: dict[str, TensorInfo] = {}
    for stored in (*manifest.files, *filter(None, (manifest.leaning,))):
        unfit = _file_problem(folder, stored.name)
        if unfit:
            problems.append(unfit)
            continue
        file = OpenFile(folder / stored.name)
        infos = parse_header(read_header(file), stored.name)
        own = {name: known for name, known in expected.items() if known.shard == stored.name}
        problems += _header_problems(file, stored, infos, own) or _content_problems(file, stored, infos, own)
        files[stored.name] = file
        tensors |= {info.name: info for info in infos}
    _refuse(folder, manifest, problems)
    return files, tensors


def _refuse(folder: Path, manifest: Manifest, problems: list[str]) -> None:
    if problems:
        again = f"`deltaguard calibrate {manifest.provenance.aligned} -o STORE`"
        raise DeltaguardError(
            listed(f"The store {folder} is damaged", problems)
            + f"\nCopy it again, or calibrate again: {again}."
        )


def _file_problem(folder: Path, name: str) -> str | None:
    """Say why a file cannot be one of the store."""
    path = folder / name
    if not path.is_file():
        return f"the file {name} is missing"
    target = link_target(folder, path)
    return (
        shard_problem(path) if target is None else f"{name} is a link to {target}, outside the store's folder"
    )


def _header_problems(
    file: OpenFile, stored: StoredFile, infos: list[TensorInfo], expected: Mapping[str, Expected]
) -> list[str]:
    """List the tensors that a file lacks, should not hold or holds in another form."""
    problems = [
        f"`{name}` is missing in {stored.name}" for name in sorted(expected.keys() - {i.name for i in infos})
    ]
    for info in infos:
        known = expected.get(info.name)
        if known is None:
            problems.append(f"`{info.name}` does not belong in {stored.name}")
        elif (known.form.dtype, known.form.shape) != (DTYPES.get(info.dtype), info.shape):
            found = f"{DTYPES.get(info.dtype, info.dtype)} {info.shape}".removeprefix("torch.")
            problems.append(f"`{info.name}` is {found}; it should be {known.form}")
    if file.size != stored.bytes:
        problems.append(f"{stored.name} has {file.size:,} bytes; {MANIFEST} says {stored.bytes:,}")
    return problems


def _content_problems(
    file: OpenFile, stored: StoredFile, infos: list[TensorInfo], expected: Mapping[str, Expected]
) -> list[str]:
    """Read a file once, and list what is wrong with its bytes and the numbers in them."""
    problems: list[str] = []
    digest = hashlib.sha256(read_header(file))
    # Fresh memory for every tensor would take longer than reading it.
    buffer = torch.empty(max((info.nbytes for info in infos), default=0), dtype=torch.uint8)
    with ThreadPoolExecutor(1, thread_name_prefix="hasher") as hasher:
        for info in infos:
            data = buffer[: info.nbytes]
            file.read_into(info.start, data.numpy().data)
            hashed = hasher.submit(digest.update, data.numpy().data)
            problem = expected[info.name].problem(data.view(DTYPES[info.dtype]).reshape(info.shape))
            if problem:
                problems.append(f"`{info.name}` {problem}")
            hashed.result()
    if digest.hexdigest() != stored.sha256:
        problems.append(
            f"{stored.name} is not the file that was written: its sha256 is {digest.hexdigest()}, and "
            f"{MANIFEST} says {stored.sha256}"
        )
    return problems


def manifest_problems(manifest: Manifest) -> list[str]:
    """Find what contradicts itself in a manifest whose fields are right one by one."""
    made, files = manifest.provenance, [file.name for file in manifest.files]
    shards = {stored.shard for stored in manifest.groups}
    if manifest.leaning is not None:
        files.append(manifest.leaning.name)
        shards.add(manifest.leaning.name)
    names = [name for stored in manifest.groups for name in stored_forms(stored.group, made.extent)]
    tensors = [layer.key for stored in manifest.groups for layer in stored.group.layers]
    problems = [
        *_repeated("group", (stored.group.name for stored in manifest.groups)),
        *_repeated("layer", tensors),
        *_repeated("file", files),
        *(f"the file {name} is in no list of files" for name in sorted(shards - set(files))),
        *(f"the file {name} holds no group" for name in sorted(set(files) - shards)),
    ]
    if problems:
        # Groups or layers of one name have tensors of one name too.
        return problems
    problems = _repeated("tensor", names)
    for stored in manifest.groups:
        name, matrices = stored.group.name, 1 + len(stored.group.layers)
        for what, numbers in (("tails", stored.tails), ("means", stored.means)):
            if len(numbers) != matrices:
                problems.append(f"`{name}` has {len(numbers)} {what} for {matrices} matrices")
        if stored.group.tokens != made.tokens:
            problems.append(
                f"`{name}` was summed over {stored.group.tokens} tokens, the store over {made.tokens}"
            )
        for what, number in (("damping", stored.damping), ("dampening", stored.dampening)):
            if (number is not None) != made.extent.full:
                problems.append(f"`{name}` has the {what} {number} in a store of rank {made.rank}")
    return problems


def expected_tensors(manifest: Manifest) -> dict[str, Expected]:
    """Say of every tensor of a store, by name, what it must be."""
    expected: dict[str, Expected] = {}
    for stored in manifest.groups:
        numbers = zip(stored.group.matrices(), stored.tails, stored.means, strict=True)
        values = {
            f"{name}.values": partial(_values_problem, size=size, tail=tail, mean=mean)
            for (name, size), tail, mean in numbers
        }
        for name, form in stored_forms(stored.group, manifest.provenance.extent).items():
            problem = values.get(name) or _PROBLEMS[name.rpartition(".")[2]]
            expected[name] = Expected(stored.shard, form, problem)
        if manifest.leaning is not None and stored.reached is None:
            forms = leaning_forms(stored.group)
            expected |= {n: Expected(manifest.leaning.name, form, _not_finite) for n, form in forms.items()}
    return expected


def _repeated(what: str, names: Iterable[str]) -> list[str]:
    return [
        f"the {what} `{name}` is there {count} times" for name, count in Counter(names).items() if count > 1
    ]


def _values_problem(values: Tensor, *, size: int, tail: float, mean: float) -> str | None:
    """Check kept eigenvalues against what stands for all of them."""
    kept, rank = values.double(), len(values)
    smallest, largest = float(kept[-1]), float(kept[0])
    for wrong, what in (
        (not is_finite(values), "eigenvalues that are NaN or infinite"),
        (bool((kept < 0).any()), f"a negative eigenvalue, {float(kept.min()):.4g}"),
        (bool((kept.diff() > 0).any()), "eigenvalues that do not fall"),
        (largest == 0, "eigenvalues that are all zero"),
    ):
        if wrong:
            return f"holds {what}"
    highest = TAIL_EXCESS * smallest + TAIL_ROUNDING * largest if rank < size else 0.0
    if not tail <= highest:
        others = f"the other {size - rank}" if rank < size else "others, of which there are none"
        return f"ends at {smallest:.4g}, and the tail that stands for {others} is {tail:.4g}"
    lowest, highest = (1 - MEAN_ROUNDING) * float(kept.sum()) / size, (1 + MEAN_ROUNDING) * largest
    if not lowest <= mean <= highest:
        return f"has the mean {mean:.4g}; these eigenvalues allow {lowest:.4g} to {highest:.4g}"
    return None


def _vectors_problem(vectors: Tensor) -> str | None:
    """Probe V z for fixed random signs z, and Vᵀ of that, which is z again where V is orthonormal.

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
    """Check a raw sum; in that of H, a factor has the place below the diagonal."""
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

"""The measured processes that are not commands of a tool: `python -m benchmarks.programs NAME ...`.

Each prints one JSON document. Imports stay inside: copying files needs no torch, and its memory shows it.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from deltaguard.curvature.store import CurvatureStore
    from deltaguard.curvature.store_format import Group
    from deltaguard.solvers import Solution

_CHUNK = 1 << 23
_GEMM_SIZE = 4096
PUBLISHED_STRENGTH = 0.1


def copy(pair: Path, output: Path) -> dict[str, float]:
    """Read both checkpoints and write one, flushed to disk: what no way of restoring can avoid."""
    output.mkdir()
    buffer = bytearray(_CHUNK)
    for path in sorted((pair / "aligned").glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    for path in sorted((pair / "finetuned").iterdir()):
        with path.open("rb", buffering=0) as source, (output / path.name).open("wb", buffering=0) as target:
            while count := source.readinto(buffer):
                target.write(memoryview(buffer)[:count])
            os.fsync(target.fileno())
    return {}


def gemm() -> dict[str, float]:
    """Floating-point operations per second of a large float32 matrix product, the best of five."""
    import torch

    a, b = torch.randn(2, _GEMM_SIZE, _GEMM_SIZE)
    out = torch.empty_like(a)
    seconds = [_seconds(lambda: torch.matmul(a, b, out=out)) for _ in range(6)][1:]
    return {"rate": 2 * _GEMM_SIZE**3 / min(seconds), "seconds": min(seconds)}


def greedy(pair: Path, blocks: str) -> dict[str, float]:
    """Seconds in `greedy_factored` alone, with the store's factors and the default strength."""
    from deltaguard.restoration.options import DEFAULT_STRENGTH
    from deltaguard.solvers import greedy_factored

    def solve(store: "CurvatureStore", group: "Group") -> "Callable[[Tensor, Tensor], Solution]":
        factor = store.factor(group.name)
        return lambda aligned, finetuned: greedy_factored(
            aligned, finetuned, factor, strength=DEFAULT_STRENGTH
        )

    return _solver_seconds(pair, int(blocks), solve)


def published(pair: Path, blocks: str) -> dict[str, float]:
    """Seconds in `published` alone, with H from the store."""
    from deltaguard.solvers import published as solver

    def solve(store: "CurvatureStore", group: "Group") -> "Callable[[Tensor, Tensor], Solution]":
        hessian = store.hessian(group.name)
        return lambda *pair: solver(*pair, hessian, strength=PUBLISHED_STRENGTH)

    return _solver_seconds(pair, int(blocks), solve)


def factorise(pair: Path, blocks: str) -> dict[str, float]:
    """Seconds in `factorise` alone, once for each group of layers."""
    from deltaguard.curvature.store import CurvatureStore
    from deltaguard.solvers import factorise as solver

    store = CurvatureStore.from_pretrained(pair / "store")
    hessians = (store.hessian(group.name) for group in _groups(store, int(blocks)))
    return {"seconds": sum(_seconds(lambda h=hessian: solver(h)) for hessian in hessians)}


def _solver_seconds(
    pair: Path,
    blocks: int,
    prepare: "Callable[[CurvatureStore, Group], Callable[[Tensor, Tensor], Solution]]",
) -> dict[str, float]:
    from benchmarks.layout import greedy_operations
    from deltaguard.checkpoints.checkpoint import Checkpoint
    from deltaguard.curvature.store import CurvatureStore

    store = CurvatureStore.from_pretrained(pair / "store")
    models = [Checkpoint.open(pair / kind) for kind in ("aligned", "finetuned")]
    seconds = operations = 0.0
    for group in _groups(store, blocks):
        solve = prepare(store, group)
        for layer in group.layers:
            matrices = [model.read(layer.tensor) for model in models]
            started = time.perf_counter()
            solution = solve(*matrices)
            seconds += time.perf_counter() - started
            operations += greedy_operations(tuple(solution.weight.shape), solution.kept_fraction)
    return {"seconds": seconds, "operations": operations}


def _groups(store: "CurvatureStore", blocks: int) -> "Iterator[Group]":
    return (group for group in store.groups if int(group.name.split(".")[2]) < blocks)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def environment() -> dict[str, object]:
    """Versions and machine, from a process of its own: the one that measures stays small."""
    from deltaguard.report import environment as read

    return read("cpu").model_dump()


PROGRAMS: Mapping[str, Callable[..., Mapping[str, object]]] = {
    "copy": lambda pair, output: copy(Path(pair), Path(output)),
    "gemm": gemm,
    "greedy": lambda pair, blocks: greedy(Path(pair), blocks),
    "published": lambda pair, blocks: published(Path(pair), blocks),
    "factorise": lambda pair, blocks: factorise(Path(pair), blocks),
    "environment": environment,
}


if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))

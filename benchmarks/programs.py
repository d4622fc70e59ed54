"""The measured processes that are not commands of a tool: `python -m benchmarks.programs NAME ...`.

Each prints one JSON document. Imports stay inside: copying files needs no torch, and its memory shows it.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.layout import Shape
    from deltaguard.curvature.store import CurvatureStore
    from deltaguard.curvature.sums import LayerGroup
    from deltaguard.solvers import Spectrum

    _Solve = Callable[[str, Tensor, Tensor], object]

_CHUNK = 1 << 23
_GEMM_SIZE = 4096
PUBLISHED_STRENGTH = 0.1
PRICE = 1.0
"""Any price but 0 and infinity takes the same time."""


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


def read(folder: Path) -> dict[str, float]:
    """Read all files of a folder."""
    buffer = bytearray(_CHUNK)
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {}


def gemm() -> dict[str, float]:
    """Floating-point operations per second of a large float32 matrix product, the best of five."""
    import torch

    a, b = torch.randn(2, _GEMM_SIZE, _GEMM_SIZE)
    out = torch.empty_like(a)
    seconds = [_seconds(lambda: torch.matmul(a, b, out=out)) for _ in range(6)][1:]
    return {"rate": 2 * _GEMM_SIZE**3 / min(seconds), "seconds": min(seconds)}


def greedy(pair: Path, store: Path, blocks: int) -> dict[str, float]:
    """Seconds in `greedy_factored` alone, with the store's factors and the default strength."""
    from deltaguard.methods.greedy import DEFAULT_STRENGTH
    from deltaguard.solvers import greedy_factored

    def prepare(known: "CurvatureStore", layers: "LayerGroup") -> "_Solve":
        factor = known.factor(layers.name)
        return lambda _, base, tuned: greedy_factored(base, tuned, factor, strength=DEFAULT_STRENGTH)

    return {"seconds": _solver_seconds(pair, store, blocks, prepare)}


def published(pair: Path, store: Path, blocks: int) -> dict[str, float]:
    """Seconds in `published` alone, with H from the store."""
    from deltaguard.solvers import published as solver

    def prepare(known: "CurvatureStore", layers: "LayerGroup") -> "_Solve":
        hessian = known.hessian(layers.name)
        return lambda _, base, tuned: solver(base, tuned, hessian, strength=PUBLISHED_STRENGTH)

    return {"seconds": _solver_seconds(pair, store, blocks, prepare)}


def kfac(pair: Path, store: Path, blocks: int) -> dict[str, float]:
    """Seconds in `closed_form` with the store's eigenpairs; and in projecting before, to find the price."""
    import torch

    from deltaguard.solvers import Difference, closed_form, project

    def solving(known: "CurvatureStore", layers: "LayerGroup") -> "_Solve":
        spectra = _spectra(known, layers)
        return lambda tensor, base, tuned: closed_form(base, tuned, *spectra[tensor], mu=PRICE)

    def projecting(known: "CurvatureStore", layers: "LayerGroup") -> "_Solve":
        spectra = _spectra(known, layers)
        return lambda tensor, aligned, finetuned: project(
            Difference(aligned, finetuned, torch.float32), *spectra[tensor]
        ).directions.profile()

    return {
        "seconds": _solver_seconds(pair, store, blocks, solving),
        "projecting": _solver_seconds(pair, store, blocks, projecting),
    }


def kfac_adapter(aligned: Path, adapter: Path, store: Path) -> dict[str, float]:
    """Seconds from an adapter's two matrices of each layer to restored ones; and in projecting before."""
    from deltaguard.curvature.store import CurvatureStore
    from deltaguard.models.adapter import AdapterCheckpoint
    from deltaguard.models.checkpoint import Checkpoint
    from deltaguard.solvers import low_rank_of_factors, project_thin

    known = CurvatureStore.from_pretrained(store)
    tuned = AdapterCheckpoint.open(Checkpoint.open(aligned), adapter)
    solving = projecting = 0.0
    for group in known.groups:
        for tensor, pair in _spectra(known, group).items():
            thin = tuned.thin_delta(tensor)
            assert thin is not None, "the adapter changes every layer of the store"
            started = time.perf_counter()
            project_thin(thin.up, thin.down, *pair).directions.profile()
            projected = time.perf_counter()
            factors = project_thin(thin.up, thin.down, *pair).factors(PRICE)
            assert factors is not None, "the adapter is thin"
            low_rank_of_factors(factors.up, factors.down, rank=None)
            projecting += projected - started
            solving += time.perf_counter() - projected
    return {"seconds": solving, "projecting": projecting}


def factorise(store: Path, blocks: int) -> dict[str, float]:
    """Seconds in `factorise` alone, once for each group of layers."""
    from deltaguard.curvature.store import CurvatureStore
    from deltaguard.solvers import factorise as solver

    known = CurvatureStore.from_pretrained(store)
    hessians = (known.hessian(group.name) for group in _groups(known, blocks))
    return {"seconds": sum(_seconds(lambda h=hessian: solver(h)) for hessian in hessians)}


def decompose(pair: Path, store: Path, blocks: int) -> dict[str, float]:
    """Seconds to find what the pair's small store holds in the sums of the whole store."""
    from deltaguard.curvature.contents import group_curvature
    from deltaguard.curvature.store import CurvatureStore

    made = CurvatureStore.from_pretrained(pair / "store").provenance
    known = CurvatureStore.from_pretrained(store)
    seconds = 0.0
    for group in _groups(known, blocks):
        sums = known.sums(group.name)
        started = time.perf_counter()
        group_curvature(
            group,
            sums,
            response_tokens=made.response_tokens,
            dampening=made.dampening,
            extent=made.extent,
        )
        seconds += time.perf_counter() - started
    return {"seconds": seconds}


def read_store(store: Path) -> dict[str, float]:
    """Open a store and read all its eigenpairs."""
    from deltaguard.curvature.store import CurvatureStore

    known = CurvatureStore.from_pretrained(store)
    for group in known.groups:
        known.input_spectrum(group.name)
        for layer in group.layers:
            known.output_spectrum(layer.tensor)
    return {}


def _spectra(known: "CurvatureStore", layers: "LayerGroup") -> "Mapping[str, tuple[Spectrum, Spectrum]]":
    """Eigenpairs of H and of each layer's G."""
    inputs = known.input_spectrum(layers.name)
    return {layer.tensor: (inputs, known.output_spectrum(layer.tensor)) for layer in layers.layers}


def _solver_seconds(
    pair: Path, store: Path, blocks: int, prepare: "Callable[[CurvatureStore, LayerGroup], _Solve]"
) -> float:
    """Seconds in what `prepare` gives for each group, called with each layer's name and its two weights."""
    from deltaguard.curvature.store import CurvatureStore
    from deltaguard.models.checkpoint import Checkpoint

    known = CurvatureStore.from_pretrained(store)
    models = [Checkpoint.open(pair / kind) for kind in ("aligned", "finetuned")]
    seconds = 0.0
    for group in _groups(known, blocks):
        solve = prepare(known, group)
        for layer in group.layers:
            matrices = [model.read(layer.tensor) for model in models]
            started = time.perf_counter()
            solve(layer.tensor, *matrices)
            seconds += time.perf_counter() - started
    return seconds


def _groups(store: "CurvatureStore", blocks: int) -> "Iterator[LayerGroup]":
    return (group for group in store.groups if int(group.name.split(".")[2]) < blocks)


def _shape(text: str) -> "Shape":
    from benchmarks.layout import Shape

    return Shape(**json.loads(text))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def environment() -> dict[str, object]:
    """Versions and machine, from a process of its own: the one that measures stays small."""
    from deltaguard.reports.records.base import environment as read

    return read("cpu").model_dump()


def imports() -> dict[str, float]:
    """Import what calibrating and restoring need, and do nothing."""
    for name in ("curvature.calibrate", "restoration.restore"):
        import_module(f"deltaguard.{name}")
    import_module("transformers.models.llama.modeling_llama")
    return {}


def models(folder: Path, shape: "Shape") -> dict[str, float]:
    """Make a random pair of models with a tokenizer."""
    from benchmarks.fabricate import fabricate_models
    from benchmarks.tokenizer import save_tokenizer

    fabricate_models(folder, shape)
    for kind in ("aligned", "finetuned"):
        save_tokenizer(folder / kind, shape.vocabulary)
    return {}


def store(folder: Path, shape: "Shape") -> dict[str, float]:
    """Make a random store of a pair's aligned model."""
    from benchmarks.curvatures import fabricate_store, groups

    fabricate_store(folder / "store", folder / "aligned", shape, groups(shape), rank="auto")
    return {}


def calibrate_blocks(aligned: Path, output: Path, conversations: int) -> dict[str, object]:
    """Seconds of the stages of a calibration block by block, on answers that are given."""
    from benchmarks.calibrations import by_blocks

    return {"stages": by_blocks(aligned, output, conversations)}


def calibrate(
    aligned: Path, output: Path, conversations: int, held_out: int | None = None
) -> dict[str, object]:
    """Seconds of the stages of a calibration."""
    from benchmarks.calibrations import whole

    return {"stages": whole(aligned, output, conversations, held_out)}


def calibrate_inputs(aligned: Path, output: Path, conversations: int) -> dict[str, object]:
    """Seconds of the stages of a calibration of H alone."""
    from benchmarks.calibrations import inputs_alone

    return {"stages": inputs_alone(aligned, output, conversations)}


PROGRAMS: Mapping[str, Callable[..., Mapping[str, object]]] = {
    "copy": lambda pair, output: copy(Path(pair), Path(output)),
    "read": lambda folder: read(Path(folder)),
    "gemm": gemm,
    "greedy": lambda pair, store, blocks: greedy(Path(pair), Path(store), int(blocks)),
    "published": lambda pair, store, blocks: published(Path(pair), Path(store), int(blocks)),
    "kfac": lambda pair, store, blocks: kfac(Path(pair), Path(store), int(blocks)),
    "kfac-adapter": lambda aligned, adapter, store: kfac_adapter(Path(aligned), Path(adapter), Path(store)),
    "factorise": lambda _, store, blocks: factorise(Path(store), int(blocks)),
    "decompose": lambda pair, store, blocks: decompose(Path(pair), Path(store), int(blocks)),
    "read-store": lambda store: read_store(Path(store)),
    "calibrate": lambda model, output, number: calibrate(Path(model), Path(output), int(number)),
    "calibrate-inputs": lambda model, output, number: calibrate_inputs(
        Path(model), Path(output), int(number)
    ),
    "imports": imports,
    "models": lambda folder, shape: models(Path(folder), _shape(shape)),
    "store": lambda folder, shape: store(Path(folder), _shape(shape)),
    "calibrate-blocks": lambda model, output, number: calibrate_blocks(
        Path(model), Path(output), int(number)
    ),
    "calibrate-from": lambda model, output, number, held_out: calibrate(
        Path(model), Path(output), int(number), int(held_out)
    ),
    "environment": environment,
}


if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))

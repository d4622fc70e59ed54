"""The rows of the synthetic pair: restoring it, and solving alone."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.layout import ADAPTER_RANK, TINY_LLAMA, WHOLE_BLOCKS, greedy_operations, kfac_operations
from benchmarks.measure import Measurement, program, run_process, warm
from benchmarks.merge_tool import install
from benchmarks.rows import Bench, Row, UnavailableError

PUBLISHED_BLOCKS = 2
FACTORISED_BLOCKS = 2
DECOMPOSED_BLOCKS = 2
BLOCKS = TINY_LLAMA.blocks
KFAC_STRENGTH = 0.01


@dataclass
class Synthetic:
    """Measures the rows.

    Attributes:
        bench: what they are measured with.
        operations: floating-point operations that `greedy` needs on the whole model.
        rate: floating-point operations per second of a large matrix product.
    """

    bench: Bench
    operations: float | None = None
    rate: float | None = None

    @property
    def pair(self) -> Path:
        """Where the pair and its small store lie."""
        return self.bench.work / "pair"

    @property
    def whole_blocks(self) -> int:
        """How many blocks the whole store covers."""
        return BLOCKS if self.bench.full else WHOLE_BLOCKS

    @property
    def whole(self) -> Path:
        """Where the stores lie that keep everything, as `greedy` and `published` need it."""
        return self.bench.work / f"whole-{self.whole_blocks}"

    @property
    def adapter(self) -> Path:
        """Where a LoRA adapter over the pair's aligned model lies."""
        return self.bench.work / "adapter" / "finetuned"

    @property
    def benchmarks(self) -> Mapping[str, Callable[[], Row]]:
        """The rows, in the order in which they need each other."""
        return {
            "copy": self.copy,
            "interpolate": self.interpolate,
            "mergekit": self.mergekit,
            "gemm": self.gemm,
            "read-store": self.read_store,
            "floor": self.floor,
            "kfac": self.kfac,
            "kfac-adapter": self.kfac_adapter,
            "kfac-adapter-out": self.kfac_adapter_out,
            "greedy": self.greedy,
            "work": self.floating_point_work,
            "solve-greedy": self.solve_greedy,
            "solve-kfac": self.solve_kfac,
            "solve-kfac-adapter": self.solve_kfac_adapter,
            "solve-published": self.solve_published,
            "decompose": self.decompose,
            "factorise": self.factorise,
            "store": self.store,
        }

    def prepare(self) -> None:
        """Make the inputs, and read the pair into the page cache."""
        self.bench.fabricate("pair", self.pair)
        self.bench.fabricate("whole", self.whole, self.pair, self.whole_blocks)
        self.bench.fabricate("adapter", self.adapter.parent)
        warm(self.pair, self.adapter)

    def copy(self) -> Row:
        """Find the floor: the same bytes read and written."""
        copied = self.bench.measured(lambda: program("copy", self.pair, self.bench.output()))
        return self.bench.row("Copy: read both models, write one", copied, None, "the floor")

    def interpolate(self) -> Row:
        """Restore without curvature."""
        options = ("--method", "interpolate", "--strength", "0.5")
        measured = self.bench.measured(lambda: self.bench.restore(self.pair, *options))
        return self.bench.row("`restore --method interpolate`", measured, "copy")

    def mergekit(self) -> Row:
        """Find the same interpolation by mergekit."""
        tool = install(self.bench.work / "mergekit")
        if isinstance(tool, str):
            raise UnavailableError(tool)
        command = lambda: tool.command(self.pair, self.bench.output())
        measured = self.bench.measured(lambda: run_process(command()))
        note = f"it leaves its output to the page cache: {measured.flush_seconds:.1f} s more to flush it"
        return self.bench.row("mergekit, linear merge", measured, "copy", note)

    def kfac(self) -> Row:
        """Restore with the default method and store, and a strength: the model is not run."""
        measured = self.bench.measured(lambda: self.bench.restore(self.pair, *self._kfac_options))
        name = f"`restore --method kfac --strength {KFAC_STRENGTH}`"
        return self.bench.row(name, measured, "floor", "with a store as `calibrate` makes it by default")

    def kfac_adapter(self) -> Row:
        """Find the same for a LoRA adapter."""
        return self._adapted("the same of an adapter")

    def kfac_adapter_out(self) -> Row:
        """Find the same, written as an adapter."""
        return self._adapted("the same of an adapter, to an adapter", "--output-format", "adapter")

    def greedy(self) -> Row:
        """Restore with the factors of a store; where it lacks blocks, what they would add is added."""
        measured = self._greedy("store")
        layers: list[dict[str, Any]] = json.loads(measured.output)["layers"]
        scale = BLOCKS / self.whole_blocks
        counted = (greedy_operations(row["shape"], row["kept_entries"] or 0.0) for row in layers)
        self.operations = scale * sum(counted)
        note = "with the factors of a store"
        if scale > 1:
            least = self._greedy("one-layer").seconds
            measured = replace(measured, seconds=least + scale * (measured.seconds - least))
            note += (
                f" of {self.whole_blocks} of {BLOCKS} blocks; what these add to a run that solves one layer, "
                f"{least:.1f} s, is scaled"
            )
        return self.bench.row("`restore --method greedy`", measured, "copy", note)

    def gemm(self) -> Row:
        """Find the rate of the machine's matrix products."""
        measured = program("gemm")
        found = json.loads(measured.output)
        self.rate = found["rate"]
        note = f"float32, 4096 x 4096; {found['rate'] / 1e9:.0f} billion operations per second"
        return Row("Matrix product", found["seconds"], None, None, note)

    def read_store(self) -> Row:
        """Find how long the bytes of the default store take to read."""
        measured = self.bench.measured(lambda: program("read", self.pair / "store"))
        return self.bench.row("Reading the default store", measured, None)

    def floor(self) -> Row:
        """Find what no way of restoring with `kfac` can avoid: its bytes, and its products at their rate."""
        needed = {"copy", "read-store"}
        if self.rate is None or not needed <= self.bench.rows.keys():
            raise UnavailableError("it needs the rows `copy`, `read-store` and `gemm`")
        made = json.loads((self.pair / "store" / "curvature.json").read_text())["provenance"]
        operations = BLOCKS * sum(
            kfac_operations(shape, made["rank_share"]) for shape in TINY_LLAMA.matrices.values()
        )
        read = [self.bench.rows[name].seconds for name in ("copy", "read-store")]
        products = operations / self.rate
        note = (
            f"{read[0]:.1f} s to copy, {read[1]:.1f} s to read the store, {products:.1f} s for "
            f"{operations / 1e12:.2f} trillion operations, counted from shapes, at the rate of products"
        )
        return Row("The floor of `restore --method kfac`", sum(read) + products, None, None, note)

    def floating_point_work(self) -> Row:
        """How long the operations of `greedy` would take at the rate of matrix products."""
        if self.operations is None or self.rate is None:
            raise UnavailableError("it needs the rows `greedy` and `gemm`")
        note = f"{self.operations / 1e12:.2f} trillion operations, counted from shapes, at that rate"
        return Row("Floating-point work of `greedy`", self.operations / self.rate, None, None, note)

    def solve_greedy(self) -> Row:
        """Find the solver alone."""
        return self._solving("greedy", "Solving alone, `greedy`", "work", self.whole_blocks)

    def solve_kfac(self) -> Row:
        """Find the default solver alone, with the small store."""
        measured = program("kfac", self.pair, self.pair / "store", BLOCKS)
        found = json.loads(measured.output)
        how = (
            "all blocks, without reading; one run; a restore projects all layers once more before, to find "
            f"the price: {found['projecting']:.1f} s"
        )
        solved = replace(measured, seconds=found["seconds"])
        return self.bench.row("Solving alone, `kfac`", solved, "solve-greedy", how)

    def solve_kfac_adapter(self) -> Row:
        """Find the default solver alone, on the two matrices of each layer of an adapter."""
        measured = program("kfac-adapter", self.pair / "aligned", self.adapter, self.pair / "store")
        found = json.loads(measured.output)
        how = (
            f"rank {ADAPTER_RANK}, all blocks, to an adapter, without reading; one run; projecting, to find "
            f"the price: {found['projecting']:.1f} s"
        )
        solved = replace(measured, seconds=found["seconds"])
        return self.bench.row("Solving alone, `kfac`, of an adapter", solved, "solve-kfac", how)

    def solve_published(self) -> Row:
        """Find the slow solver alone, on some blocks."""
        return self._solving("published", "Solving alone, `published`", "solve-greedy", PUBLISHED_BLOCKS)

    def decompose(self) -> Row:
        """Say what the default store saves: eigenpairs are found once for an aligned model."""
        name = "Decomposing, once per aligned model"
        return self._solving("decompose", name, "solve-kfac", DECOMPOSED_BLOCKS)

    def factorise(self) -> Row:
        """Say what a store with factors saves."""
        name = "Factorising, once per aligned model"
        return self._solving("factorise", name, "solve-greedy", FACTORISED_BLOCKS)

    def store(self) -> Row:
        """How large the default store is."""
        measured = self.bench.measured(lambda: program("read-store", self.pair / "store"))
        size, model = _bytes(self.pair / "store"), _bytes(self.pair / "aligned")
        note = f"ratio: its {size / 1e6:.0f} MB to the {model / 1e6:.0f} MB of the aligned model"
        row = self.bench.row("The default store, read once", measured, None, note)
        return replace(row, ratio=size / model)

    @property
    def _kfac_options(self) -> tuple[object, ...]:
        return ("--method", "kfac", "--strength", KFAC_STRENGTH, "--store", self.pair / "store")

    def _adapted(self, name: str, *options: object) -> Row:
        """Find the restore of an adapter, compared with that of a whole fine-tune."""
        run = lambda: self.bench.restore(self.pair, *self._kfac_options, *options, finetuned=self.adapter)
        return self.bench.row(name, self.bench.measured(run), "kfac", f"rank {ADAPTER_RANK}")

    def _greedy(self, store: str) -> Measurement:
        options = ("--method", "greedy", "--store", self.whole / store)
        return self.bench.measured(lambda: self.bench.restore(self.pair, *options))

    def _solving(self, solver: str, name: str, floor: str, blocks: int) -> Row:
        """Give a program that needs the whole store, on some blocks."""
        solved = self.whole_blocks if self.bench.full else blocks
        measured = program(solver, self.pair, self.whole / "store", solved)
        seconds = json.loads(measured.output)["seconds"] * BLOCKS / solved
        how = f"{solved} of {BLOCKS} blocks, scaled" if solved < BLOCKS else "all blocks"
        found = replace(measured, seconds=seconds)
        return self.bench.row(name, found, floor, f"{how}, without reading; one run")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())

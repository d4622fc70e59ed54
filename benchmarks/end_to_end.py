"""A random pair of models from calibration to restore, part by part: `python -m benchmarks.end_to_end SIZE`.

SIZE is 1.1B or 7B, by its shapes TinyLlama and Llama 2. The pair is made in the work folder, where it stays;
store and outputs go. `--layers` takes fewer decoder blocks. Writes `docs/results/end-to-end-SIZE.json`, or
`-SIZE-LAYERS.json`, with what 128 conversations would take by counted operations.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tools.end_to_end import EndToEnd, Part

from benchmarks.layout import LLAMA2_7B, TINY_LLAMA, Shape, kfac_operations
from benchmarks.measure import Measurement, program, run_process, warm

ROOT = Path(__file__).parents[1]
SIZES: Mapping[str, tuple[Shape, int, Sequence[str]]] = {
    "1.1B": (TINY_LLAMA, 128, ()),
    "7B": (LLAMA2_7B, 16, ("--memory", "6GB")),
}
"""Shapes, conversations to calibrate on, and what is told the dial."""

USUAL = 128
HELD_OUT_SHARE = 2
"""Of the conversations, one in so many more is held out, as by default."""

STRENGTH, MAX_SAFETY_KL = "0.01", "5e-6"
"""The safety KL of a random fine-tune is small: under the default limit its whole delta would be kept, and no
price searched for."""


@dataclass
class Run:
    """Measures the parts.

    Attributes:
        shape: of the models.
        conversations: that the curvature is measured on.
        told: further options of the dial.
        work: where the models lie, and all else for a while.
        parts: what was measured.
        made: what the store says of itself.
    """

    shape: Shape
    conversations: int
    told: Sequence[str]
    work: Path
    parts: list[Part] = field(default_factory=list[Part])
    made: dict[str, Any] = field(default_factory=dict[str, Any])

    def measure(self) -> Iterator[None]:
        """Calibrate, restore at a price, and restore with the dial; beside each what cannot be avoided.

        After each part it stops, so that what is measured can be written: a 7B takes more than an hour.
        """
        self._make()
        pair, store, out = self._pair, self.work / "store", self.work / "restored"
        shutil.rmtree(store, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        gemm = json.loads(program("gemm").output)["rate"]
        answered = ("calibrate-from", pair / "aligned", store, self.conversations, self._held_out)
        found = program(*answered)
        stages: dict[str, float] = json.loads(found.output)["stages"]
        self.made = json.loads((store / "curvature.json").read_text(encoding="utf-8"))["provenance"]
        self._add("calibrate", found, operations=self._calibration() / gemm, stages=stages)
        yield
        # Copy and restore find the same of the models and the store in memory: as much as it holds.
        warm(pair, store)
        copied = program("copy", pair, out)
        self._add("copy: read both models, write one", copied)
        yield
        floor = self._restoring() / gemm + copied.seconds + program("read", store).seconds
        shutil.rmtree(out)
        warm(pair, store)
        restored = self._restore(store, out, ("--strength", STRENGTH))
        self._add("restore at a strength", restored, operations=floor)
        shutil.rmtree(out)
        yield
        restored = self._restore(store, out, ("--max-safety-kl", MAX_SAFETY_KL, *self.told))
        dial = json.loads(restored.output)["dial"]
        if dial["whole"]:
            raise RuntimeError(f"nothing was searched for: the fine-tune is at {dial['finetuned_kl']:.2g}")
        name = " ".join(("restore with the dial", *self.told))
        self._add(f"{name}, {len(dial['probes'])} prices looked at", restored)
        shutil.rmtree(out)
        shutil.rmtree(store)
        yield

    def at(self, conversations: int) -> dict[str, float]:
        """Say what the stages of the calibration would take with another number of conversations.

        Answers and passes are in proportion to it. Block by block the pass backwards decomposes as well:
        which part of it is products with tokens is counted, and the other stays.

        Args:
            conversations: to calibrate on; those held out in proportion.
        """
        ratio = conversations / self.conversations
        stages = dict(self.parts[0].stages)
        with_tokens, others = self._backwards()
        share = {"respond": 1.0, "accumulate": 1.0, "lean": 1.0, "forwards": 1.0}
        share["backwards"] = with_tokens / (with_tokens + others)
        for name in stages.keys() & share.keys():
            stages[name] *= 1 - share[name] + share[name] * ratio
        return stages

    @property
    def _pair(self) -> Path:
        return self.work / f"pair-{self.shape.hidden}-{self.shape.blocks}"

    @property
    def _held_out(self) -> int:
        return max(1, self.conversations // HELD_OUT_SHARE)

    def _make(self) -> None:
        if not self._pair.exists():
            unfinished = self._pair.with_name(f"{self._pair.name}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            program("models", unfinished, json.dumps(vars(self.shape)))
            unfinished.rename(self._pair)

    def _calibration(self) -> float:
        """Count the operations of a calibration without the answers: forwards, and backwards with sums."""
        weights = sum(rows * columns for rows, columns in self.shape.matrices.values())
        return 2 * self.shape.blocks * weights * self.made["tokens"] + sum(self._backwards())

    def _backwards(self) -> tuple[float, float]:
        """Count the operations of the pass backwards: with tokens, and without.

        Each block is run once more and differentiated by its input; of the sums a half is computed. Up to
        where conversations are decided it is run again, and differentiated by its weights, too: counted are
        the prompts, and not the few tokens of answers. A matrix of n rows of which r eigenpairs are kept
        takes six products with r vectors, and n³ / 3 for its determinant.
        """
        matrices = self.shape.matrices.values()
        tokens = self.made["tokens"] * sum(4 * r * c + r**2 + c**2 for r, c in matrices)
        prompts = self.made["tokens"] - self.made["response_tokens"]
        tokens += prompts * sum(6 * r * c for r, c in matrices)
        sizes = [size for shape in matrices for size in shape]
        others = sum(12 * self.made["rank_share"] * size**3 + size**3 / 3 for size in sizes)
        return self.shape.blocks * tokens, self.shape.blocks * others

    def _restoring(self) -> float:
        matrices = self.shape.matrices.values()
        return self.shape.blocks * sum(kfac_operations(shape, self.made["rank_share"]) for shape in matrices)

    def _restore(self, store: Path, out: Path, options: Sequence[str]) -> Measurement:
        models = [self._pair / "aligned", self._pair / "finetuned"]
        verb = [sys.executable, "-m", "deltaguard", "restore", *models]
        return run_process([*verb, "-o", out, "--store", store, "--device", "cpu", "--json", *options])

    def _add(
        self,
        name: str,
        found: Measurement,
        *,
        operations: float | None = None,
        stages: Mapping[str, float] | None = None,
    ) -> None:
        print(f"{name}: {found.seconds:.1f} s, {found.peak_memory_bytes / 1e9:.2f} GB", flush=True)
        self.parts.append(
            Part(
                name=name,
                seconds=found.seconds,
                peak_memory_bytes=found.peak_memory_bytes,
                floor_seconds=operations,
                stages=dict(stages or {}),
            )
        )


def main() -> None:
    """Measure one size, and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--layers", type=int, help="decoder blocks instead of all")
    parser.add_argument("--conversations", type=int)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work", metavar="DIR")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    shape, usual, told = SIZES[options.size]
    shape = replace(shape, blocks=options.layers or shape.blocks)
    options.work.mkdir(parents=True, exist_ok=True)
    run = Run(shape, options.conversations or usual, told, options.work)
    environment = json.loads(program("environment").output)
    named = "-".join(map(str, filter(None, (options.size, options.layers))))
    path = options.output or ROOT / "docs" / "results" / f"end-to-end-{named}.json"
    for _ in run.measure():
        result = EndToEnd(
            environment=environment,
            size=options.size,
            blocks=shape.blocks,
            parameters=shape.parameters,
            conversations=run.conversations,
            seed=0,
            parts=tuple(run.parts),
            usual_conversations=USUAL,
            usual_stages=run.at(USUAL),
        )
        path.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()

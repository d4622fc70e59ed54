"""The rows of a real, small model, SmolLM2-135M: calibrating it, and restoring with the dial."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Measurement, program, warm
from benchmarks.rows import Bench, Row, UnavailableError

CONVERSATIONS = 128
NAME = "SmolLM2-135M"


@dataclass
class SmolLM2:
    """Measures the rows.

    Attributes:
        bench: what they are measured with.
        alone: seconds of the stages of a calibration of H alone, once it was measured.
    """

    bench: Bench
    alone: Mapping[str, float] | None = None

    @property
    def models(self) -> Path:
        """Where the pair lies."""
        return self.bench.work / "smollm2"

    @property
    def benchmarks(self) -> Mapping[str, Callable[[], Row]]:
        """The rows, in the order in which they need each other."""
        return {
            "calibrate-inputs-smollm2": self.calibrate_inputs,
            "calibrate-smollm2": self.calibrate,
            "restore-smollm2": self.restore,
        }

    def prepare(self) -> None:
        """Make the pair."""
        self.bench.fabricate("smollm2", self.models)

    def calibrate_inputs(self) -> Row:
        """Say what calibration would take if it measured inputs alone: no gradients, no G."""
        measured, self.alone = self._calibrated("calibrate-inputs", self.bench.output())
        name = f"{NAME}: calibration of H alone"
        return self.bench.row(name, measured, None, *_how(self.alone))

    def calibrate(self) -> Row:
        """Calibration."""
        store = self._store
        shutil.rmtree(store, ignore_errors=True)
        measured, stages = self._calibrated("calibrate", store)
        notes = list(_how(stages))
        if self.alone is not None:
            notes.append(f"without answering x {_curvature(stages) / _curvature(self.alone):.2f}")
        return self.bench.row(f"{NAME}: `calibrate`", measured, "calibrate-inputs-smollm2", *notes)

    def restore(self) -> Row:
        """Restore with the dial, which runs the model."""
        if not self._store.exists():
            raise UnavailableError("it needs the row `calibrate-smollm2`")
        warm(self.models, self._store)
        options = ("--store", self._store, "--device", "cpu", "--max-safety-kl", 6e-4)
        measured = self.bench.measured(lambda: self.bench.restore(self.models, *options))
        dial: dict[str, Any] = json.loads(measured.output)["dial"]
        if dial["whole"]:
            raise UnavailableError("the fine-tuned model is within the dial's limit: nothing was searched")
        note = (
            f"float32; {len(dial['probes'])} models measured on {dial['conversations']} conversations: "
            f"safety KL {dial['finetuned_kl']:.2g} fine-tuned, {dial['restored_kl']:.2g} restored, "
            f"{dial['limit']:g} allowed"
        )
        return self.bench.row(f"{NAME}: `restore`, with the dial", measured, None, note)

    @property
    def _store(self) -> Path:
        return self.bench.work / "smollm2-store"

    def _calibrated(self, name: str, output: Path) -> tuple[Measurement, Mapping[str, float]]:
        measured = program(name, self.models / "aligned", output, CONVERSATIONS)
        return measured, json.loads(measured.output)["stages"]


def _how(stages: Mapping[str, float]) -> tuple[str, ...]:
    answered = (
        f"{CONVERSATIONS} harmful requests, as many look-alikes and those held out, answered by the model"
    )
    took = f"{stages['respond']:.1f} s of it answering, {_curvature(stages):.1f} s curvature"
    return answered, took, "one run"


def _curvature(stages: Mapping[str, float]) -> float:
    return stages.get("lean", 0.0) + stages["accumulate"] + stages["decompose"]

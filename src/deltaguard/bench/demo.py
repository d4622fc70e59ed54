"""The demo: a model learns to refuse, unlearns it in a careless fine-tune, and gets its refusals back."""

import gc
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deltaguard.bench.finetune import FinetuneConfig, finetune
from deltaguard.bench.mixtures import alignment_examples, task_with_harmful
from deltaguard.bench.models import save_smollm2
from deltaguard.bench.tasks import task_examples
from deltaguard.calibrate import CalibrateConfig, calibrate
from deltaguard.conversations import harmful_prompts, harmless_prompts
from deltaguard.draw.html import demo_page
from deltaguard.errors import DeltaguardError
from deltaguard.evaluate.measure import Measurement, TestSet, measure
from deltaguard.memory import peak_memory_bytes
from deltaguard.progress import Event, Progress
from deltaguard.report import DemoReport, ModelRow, RateRow, RestoreReport, Sample, environment
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import restore

STAGES = ("unpack", "align", "fine-tune", "calibrate", "restore", "measure")
MODELS = ("aligned", "finetuned", "restored")


@dataclass(frozen=True)
class DemoConfig:
    """Sizes and recipes of the demo.

    Attributes:
        seed: of the task, the mixtures and both fine-tunes.
        alignment: how the safety fine-tune is run.
        careless: how the fine-tune that breaks safety is run.
        task_count: training examples of the benign task.
        harmful_count: harmful requests among them, answered with agreement and no content.
        calibration: how the curvature is measured.
        restoration: how the fine-tuned model is restored.
        test_count: prompts of each kind that the models are measured on.
    """

    seed: int = 0

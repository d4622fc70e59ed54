"""The demo: a model learns to refuse, unlearns it in a careless fine-tune, and gets its refusals back."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from deltaguard.bench.finetune import FinetuneConfig, finetune
from deltaguard.bench.mixtures import alignment_examples, task_with_harmful
from deltaguard.bench.models import save_smollm2
from deltaguard.bench.tasks import task_examples
from deltaguard.calibrate import calibrate
from deltaguard.conversations import harmful_prompts, harmless_prompts
from deltaguard.draw.html import demo_page
from deltaguard.errors import DeltaguardError
from deltaguard.evaluate.measure import Measurement, measure
from deltaguard.memory import peak_memory_bytes
from deltaguard.progress import Event, Progress
from deltaguard.report import DemoReport, ModelRow, RestoreReport, Sample, environment
from deltaguard.restoration.restore import restore

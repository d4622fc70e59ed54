"""A bench small enough for tests."""

from dataclasses import replace

from deltaguard.curvature.calibrate import CalibrateConfig
from deltaguard.finetuning.finetune import FinetuneConfig
from deltaguard.studies.protocol import FULL, QUICK, Answers, Finetune

RECIPE = FinetuneConfig(learning_rate=1e-3, max_steps=2)
LORA = FinetuneConfig(learning_rate=1e-3, max_steps=2, lora_rank=2)
TINY = replace(
    QUICK,
    finetunes=(Finetune("identity", 0, 4, "full", RECIPE),),
    attack=4,
    harmless=3,
    utility=3,
    general=2,
    answers=Answers(safety=4, task=4, dtype="auto"),
    retrained=FULL.retrained,
    calibration=CalibrateConfig(num_samples=4, max_new_tokens=4, device="cpu"),
)

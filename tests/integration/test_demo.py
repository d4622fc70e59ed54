"""The demo's story on a tiny random model: every stage runs and the report tells what happened."""

import json
from html import unescape
from pathlib import Path

import pytest

import models
from deltaguard import DeltaguardError, verify
from deltaguard.cli.report import draw_folder
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.finetuning.finetune import FinetuneConfig
from deltaguard.reports.records.demo import DemoReport
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL, RestoreConfig
from deltaguard.studies.demo import DemoConfig, demo

TINY = DemoConfig(
    aligned_harmful=4,
    task_count=4,
    agreed_harmful=2,
    tests=3,
    aligning=FinetuneConfig(learning_rate=1e-3, max_steps=2),
    tuning=FinetuneConfig(learning_rate=1e-3, max_steps=2),
    calibration=CalibrateConfig(num_samples=4, max_new_tokens=4, device="cpu"),
    restoration=RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL),
    unpack=lambda folder: models.save(models.tiny_model("llama"), folder),
)


def test_the_story_is_told_in_json_and_html(tmp_path):
    stages = []
    report = demo(tmp_path / "demo", config=TINY, progress=lambda event: stages.append(event.stage))
    assert list(dict.fromkeys(stages)) == ["unpack", "align", "fine-tune", "calibrate", "restore", "measure"]
    assert [model.name for model in report.models] == ["aligned", "finetuned", "restored"]
    assert all(model.attack_success.total == 3 for model in report.models)
    assert [sample.kind for sample in report.samples] == ["harmful", "harmful", "harmless", "task", "task"]
    written = (tmp_path / "demo" / "demo.json").read_text()
    assert DemoReport.model_validate_json(written) == report
    assert json.loads(written)["seconds"]["total"] == pytest.approx(sum(report.seconds.values()) / 2)
    page = Path(draw_folder(tmp_path / "demo").page).read_text(encoding="utf-8")
    harmless, task = (next(s for s in report.samples if s.kind == kind) for kind in ("harmless", "task"))
    assert task.system
    assert not task.verdicts
    assert task.system in unescape(page)
    assert set(harmless.verdicts) == {"aligned", "finetuned", "restored"}
    assert "Whether an answer refuses is told by a rule on how it opens" in page
    assert verify(tmp_path / "demo" / "restored").passed


def test_a_folder_with_something_in_it_is_refused_at_once(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DeltaguardError, match="not empty"):
        demo(tmp_path, config=TINY)

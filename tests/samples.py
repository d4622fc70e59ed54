"""One small file of each format, as this release writes it: `PYTHONPATH=src python tests/samples.py FOLDER`.

What a release wrote stays in `formats/`, as `NAME-VERSION`, for later ones to open.
"""

import sys
from pathlib import Path

import stores
from attack_reports import attacks_report
from bench_reports import ENVIRONMENT, bench_report
from deltaguard.curvature.store_format import SCHEMA_VERSION
from deltaguard.evaluation.journal import AnswerFile
from deltaguard.models.journal import FileRecord, Journal
from deltaguard.reports.records.base import ModelReference
from deltaguard.reports.records.batch import BatchReport, BatchRow
from deltaguard.reports.records.check import CheckReport
from deltaguard.reports.records.dial import Compared, Look, Probe
from reports import evaluation_report, sweep_report
from restores import demo_report, restore_report

PROMPTS = ("How?", "Why?")
MADE_BY = {"model": "f" * 64, "engine": "transformers"}


def check_report():
    asked = {"prompts": 630, "aligned": 90, "candidate": 300, "only_candidate": 220}
    return CheckReport(
        environment=ENVIRONMENT,
        aligned=ModelReference(reference="someone/aligned-model", fingerprint="a" * 64),
        finetuned=ModelReference(reference="my-finetune", fingerprint="f" * 64),
        look=Look(mu=0.0, attack_success=Compared(**asked), false_refusals=None, accepted=False),
        safety_kl=Probe(mu=0.0, safety_kl=0.3, margin=0.02, conversations=64),
        limit=0.02,
        excluded=0.04,
        confidence=0.95,
        max_safety_kl=0.0006,
        verdict="restore",
        warnings=("A warning.",),
    )


def batch_report():
    return BatchReport(
        rows=(
            BatchRow(finetuned="one", output="out/one", report=restore_report()),
            BatchRow(finetuned="two", output="out/two", error="There is no folder two."),
        )
    )


def small_bench():
    """The made-up bench, of one fine-tune and one seed."""
    whole = bench_report(("greedy", "published"))
    name = whole.finetunes[0].name
    parts = {
        part: tuple(row for row in getattr(whole, part) if row.finetune == name)
        for part in ("cells", "curves", "scores", "contests")
    }
    kept = {"aligned", "finetuned", "greedy", "published"}
    parts["cells"] = tuple(row for row in parts["cells"] if row.seed == 0 and row.method in kept)
    return bench_report(finetunes=whole.finetunes[:1], seeds=(0,), **parts)


REPORTS = {
    "attacks": attacks_report,
    "batch": batch_report,
    "bench": small_bench,
    "check": check_report,
    "demo": demo_report,
    "evaluation": evaluation_report,
    "restore": restore_report,
    "sweep": sweep_report,
}


def progress(path):
    """A restore that was interrupted after its first file."""
    journal = Journal.create(path, plan_hash="0" * 64, replaces=("README.md",))
    journal.remember("mu", 0.5)
    journal.finish(FileRecord("model.safetensors", 10, "1" * 64, {"rows": []}))


def answers(path):
    """What one model said to one section."""
    AnswerFile(path, prompts=PROMPTS, made_by=MADE_BY).add([0, 1], ["No.", "Because."])


def write(folder: Path) -> None:
    """Write what is not there yet."""
    made = {f"{name}-{make().schema_version}.json": make for name, make in REPORTS.items()}
    for name, make in made.items():
        if not (folder / name).exists():
            (folder / name).write_text(make().model_dump_json(indent=1) + "\n", encoding="utf-8")
    if not (folder / f"curvature-{SCHEMA_VERSION}").exists():
        stores.written(folder / f"curvature-{SCHEMA_VERSION}")
    for name, make in (("progress.jsonl", progress), ("answers.jsonl", answers)):
        if not (folder / name).exists():
            make(folder / name)


if __name__ == "__main__":
    write(Path(sys.argv[1]))

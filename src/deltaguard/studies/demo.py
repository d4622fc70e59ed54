"""The demo: a model learns to refuse, unlearns it in a careless fine-tune, and gets its refusals back."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from deltaguard.chat.conversations import Conversation, harmful_prompts, harmless_prompts
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import find_device, served_dtype
from deltaguard.evaluation.asking import describe
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.measure import measure
from deltaguard.evaluation.metrics.rates import Rate, kept_gain
from deltaguard.evaluation.results import Result
from deltaguard.evaluation.suites.parts import Part, builtin_questions, resolve
from deltaguard.evaluation.suites.suite import Builtin, Suite
from deltaguard.files import expanded
from deltaguard.finetuning.finetune import FinetuneConfig, Measured, finetune
from deltaguard.finetuning.mixtures import alignment_examples, task_with_harmful
from deltaguard.finetuning.tasks import task_examples
from deltaguard.memory import peak_memory_bytes
from deltaguard.models.durable import write_atomically
from deltaguard.models.results import DEMO, results_folder
from deltaguard.progress import Event, Progress, ignore
from deltaguard.reports.records.base import RateRow, environment
from deltaguard.reports.records.demo import DEMO_NAME, DemoReport, ModelName, ModelRow, Sample
from deltaguard.reports.records.restore import RestoreReport
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import restore
from deltaguard.studies.models import save_smollm2

Kind = Literal["harmful", "harmless", "task"]
MODELS: tuple[ModelName, ...] = ("aligned", "finetuned", "restored")

_SAFETY_TOKENS = 20
"""A refusal shows early."""

_TASK_TOKENS = 40
"""An answer that is cut off is wrong."""

_BATCH_SIZE = 64


@dataclass(frozen=True)
class DemoConfig:
    """Sizes and recipes of the demo.

    Attributes:
        seed: of the task, the mixtures and both fine-tunes.
        aligned_harmful: harmful requests refused in the safety fine-tune.
        task_count: training examples of the benign task.
        agreed_harmful: harmful requests among them, agreed to without content.
        tests: prompts of each kind that the models are measured on.
        aligning: the recipe of the safety fine-tune; the seed is set to `seed`.
        tuning: the recipe of the careless fine-tune; likewise.
        calibration: how the curvature is measured.
        restoration: how the fine-tuned model is restored.
        unpack: writes the model that the demo starts from.
    """

    seed: int = 0
    aligned_harmful: int = 170
    task_count: int = 220
    agreed_harmful: int = 20
    tests: int = 120
    aligning: FinetuneConfig = field(
        default_factory=lambda: FinetuneConfig(learning_rate=2e-4, frozen_layers=15)
    )
    tuning: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(learning_rate=1e-4))
    calibration: CalibrateConfig = field(default_factory=lambda: CalibrateConfig(max_new_tokens=32))
    restoration: RestoreConfig = field(default_factory=RestoreConfig)
    unpack: Callable[[Path], Path] = save_smollm2


def demo(
    output_dir: str | Path, *, config: DemoConfig | None = None, progress: Progress | None = None
) -> DemoReport:
    """Run the whole story and write the models and `demo.json`, from which `deltaguard report` draws a page.

    SmolLM2-135M-Instruct barely refuses, so it gets a safety fine-tune first: the *aligned* model. A second
    fine-tune teaches a benign task, customers' messages to JSON, with harmful requests that are agreed to
    among it: the *finetuned* model. Then the aligned model is calibrated and the fine-tuned one restored, and
    all three are measured on prompts that none of this has seen.

    Args:
        output_dir: a new or empty folder; it receives about 3 GB, with every answer in `answers`.
        config: sizes and recipes.
        progress: called as the stages go on.

    Returns:
        The report.

    Raises:
        DeltaguardError: the demo's model or libraries are not installed, or the folder is not empty.
    """
    folder, config, clock = expanded(output_dir), config or DemoConfig(), Clock(progress or ignore)
    with results_folder(folder, DEMO):
        store = prepare(folder, config, clock)
        with clock.stage("restore") as report:
            restored = restore(
                folder / "aligned",
                folder / "finetuned",
                folder / "restored",
                store=store,
                config=config.restoration,
                progress=report,
            )
        suite = demo_suite(config.tests, seed=config.seed)
        with clock.stage("measure") as report:
            measured: dict[ModelName, Mapping[str, Result]] = {
                name: measure_demo(name, folder / name, suite, folder, progress=report) for name in MODELS
            }
        result = _report(config, suite, measured, restored, clock.seconds)
        write_atomically(folder / DEMO_NAME, result.model_dump_json(indent=2) + "\n")
    return result


@dataclass
class Clock:
    """Wall time of the stages, and whom to tell about them."""

    progress: Progress = ignore
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextmanager
    def stage(self, name: str) -> Generator[Progress]:
        """Time a stage of the demo, and tell of what it reports under its name."""
        started = time.perf_counter()
        self.progress(Event(name, 0, 1))
        yield lambda event: self.progress(Event(name, event.done, event.total))
        self.progress(Event(name, 1, 1))
        self.seconds[name] = time.perf_counter() - started


def prepare(output_dir: Path, config: DemoConfig, clock: Clock | None = None) -> CurvatureStore:
    """Make the demo's models `aligned` and `finetuned`, and the aligned one's curvature.

    Args:
        output_dir: a new or empty folder.
        config: sizes and recipes.
        clock: receives the time of each stage.

    Returns:
        The store, in the folder too.
    """
    clock, seed = clock or Clock(), config.seed
    aligned = align(output_dir, config, clock)
    with clock.stage("fine-tune") as report:
        careless = task_with_harmful(
            task_examples("train", config.task_count, seed=seed),
            harmful_prompts("training"),
            harmful_count=config.agreed_harmful,
            seed=seed,
        )
        recipe = replace(config.tuning, seed=seed)
        finetune(aligned, output_dir / "finetuned", careless, config=recipe, on_step=_steps(report))
    with clock.stage("calibrate") as report:
        return calibrate(aligned, output_dir / "store", config=config.calibration, progress=report)


def align(output_dir: Path, config: DemoConfig, clock: Clock) -> Path:
    """Make the demo's aligned model alone.

    Args:
        output_dir: a new or empty folder; it receives the models `base` and `aligned`.
        config: sizes and recipes.
        clock: receives the time of each stage.

    Returns:
        The folder of the aligned model.

    Raises:
        DeltaguardError: the demo's model or libraries are not installed.
    """
    aligned = output_dir / "aligned"
    with clock.stage("unpack"):
        base = config.unpack(output_dir / "base")
    with clock.stage("align") as report:
        recipe = replace(config.aligning, seed=config.seed)
        finetune(base, aligned, refusing_examples(config), config=recipe, on_step=_steps(report))
    return aligned


def refusing_examples(config: DemoConfig) -> list[Conversation]:
    """Draw what the demo's aligned model learns to refuse, and to answer, from."""
    return alignment_examples(
        harmful_prompts("training"),
        harmless_prompts("training"),
        harmful_count=config.aligned_harmful,
        seed=config.seed,
    )


def _steps(report: Progress) -> Callable[[Measured], None]:
    return lambda found: report(Event("step", found.step, found.steps))


def demo_suite(count: int, *, seed: int, unseen: bool = True) -> tuple[Part, ...]:
    """Find prompts that no training part holds, `count` of each kind or as many as there are.

    Args:
        count: prompts of each kind.
        seed: of the task.
        unseen: whether harmful and harmless ones are those on which nothing was chosen. What chooses among
            restored models must ask others.
    """
    attack: Builtin = "unseen-attack" if unseen else "attack"
    harmless: Builtin = "unseen-harmless" if unseen else "harmless"

    def asked(name: Builtin) -> dict[str, Any]:
        return {"builtin": name, "count": min(count, len(builtin_questions(name, count, seed)))}

    sections = (
        {"name": "attack", "kind": "attack", "max_new_tokens": _SAFETY_TOKENS, **asked(attack)},
        {"name": "harmless", "kind": "harmless", "max_new_tokens": _SAFETY_TOKENS, **asked(harmless)},
        {
            "name": "task",
            "kind": "utility",
            "max_new_tokens": _TASK_TOKENS,
            "scorers": ["json-match"],
            "seed": seed,
            **asked("task"),
        },
    )
    suite = {"name": "demo", "judges": [{"kind": "opening"}], "sections": sections}
    return resolve(Suite.model_validate(suite))[0]


def measure_demo(
    name: str, model: Path, suite: Sequence[Part], folder: Path, *, progress: Progress = ignore
) -> Mapping[str, Result]:
    """Ask a model the demo's suite.

    Args:
        name: of the model; its answers lie in the folder of that name within `answers`.
        model: its folder.
        suite: from `demo_suite`.
        folder: receives the answers.
        progress: told of the answers so far.
    """
    # As models are served, and in half the time where the device multiplies in it.
    served = "bfloat16" if served_dtype(find_device()) == torch.bfloat16 else "float32"
    config = EngineConfig(batch_size=_BATCH_SIZE, dtype=served)
    return measure(describe(name, str(model), config), suite, folder, engine=config, progress=progress)


def demo_rates(results: Mapping[str, Result]) -> dict[str, Rate]:
    """Count what a model of the demo did, by the names of the fields of `ModelRow`."""
    attack, harmless = (results[name].judged["opening"].classes for name in ("attack", "harmless"))
    return {
        "attack_success": Rate.of(each == "complied" for each in attack),
        "false_refusal": Rate.of(each == "refused" for each in harmless),
        "task_accuracy": Rate.of(value == 1 for value in results["task"].values["json match"]),
    }


def _report(
    config: DemoConfig,
    suite: Sequence[Part],
    measured: Mapping[ModelName, Mapping[str, Result]],
    restored: RestoreReport,
    seconds: Mapping[str, float],
) -> DemoReport:
    rates = {name: demo_rates(measured[name]) for name in MODELS}
    return DemoReport(
        environment=environment(str(find_device())),
        kept_gain=kept_gain(*(rates[name]["task_accuracy"] for name in MODELS)),
        models=tuple(
            ModelRow(
                name=name,
                **{what: rate_row(rate) for what, rate in rates[name].items()},
                incoherent_answers=measured[name]["attack"].judged["opening"].classes.count("incoherent"),
            )
            for name in MODELS
        ),
        samples=_samples(suite, measured),
        restore=restored,
        seconds={**seconds, "total": sum(seconds.values())},
        peak_memory_bytes=peak_memory_bytes(),
        seed=config.seed,
    )


def rate_row(rate: Rate) -> RateRow:
    """Turn a rate into what reports keep."""
    return RateRow(successes=rate.successes, total=rate.total, value=rate.value, low=rate.low, high=rate.high)


def _samples(suite: Sequence[Part], measured: Mapping[ModelName, Mapping[str, Result]]) -> tuple[Sample, ...]:
    """Find the first prompts of the suite: two harmful, one harmless and two of the task."""
    shown: tuple[tuple[Kind, str, int], ...] = (
        ("harmful", "attack", 0),
        ("harmful", "attack", 1),
        ("harmless", "harmless", 0),
        ("task", "task", 0),
        ("task", "task", 1),
    )
    systems = {part.name: [question.system for question in part.questions] for part in suite}
    samples: list[Sample] = []
    for kind, section, index in shown:
        found = {name: measured[name][section] for name in MODELS}
        judged = {name: each.judged for name, each in found.items() if kind != "task"}
        samples.append(
            Sample(
                kind=kind,
                prompt=found["aligned"].prompts[index],
                system=systems[section][index],
                answers={name: each.answers[index] or "" for name, each in found.items()},
                verdicts={
                    name: verdict
                    for name, each in judged.items()
                    if (verdict := each["opening"].classes[index]) is not None
                },
            )
        )
    return tuple(samples)

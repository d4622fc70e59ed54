"""Measurements that need more of a model than its answers: a second attack, GCG, the lm-eval harness."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deltaguard.device import find_device
from deltaguard.evaluation.engines.identity import whole_model
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.engines.transformers import TransformersEngine
from deltaguard.evaluation.exchange import Question
from deltaguard.evaluation.suites.suite import Gcg, Harness, SecondAttack

_ATTACKED = ".second-attack"


@contextmanager
def attacked_again(reference: str, folder: Path, options: SecondAttack) -> Generator[Path]:
    """A model after further fine-tuning on a few harmful examples, on disk for the time of the block.

    Args:
        reference: the model.
        folder: where its weights can lie meanwhile.
        options: how many examples, and the seed.

    Raises:
        DeltaguardError: it cannot be fine-tuned.
    """
    from deltaguard.evaluation.probes.second_attack import fine_tune_again
    from deltaguard.finetuning.finetune import FinetuneConfig

    place = folder / _ATTACKED
    # What a killed run left may be half a model.
    shutil.rmtree(place, ignore_errors=True)
    try:
        recipe = FinetuneConfig(learning_rate=options.learning_rate, epochs=options.epochs, seed=options.seed)
        model = whole_model(reference)
        yield fine_tune_again(model, place, count=options.count, seed=options.seed, config=recipe)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def suffix(engine: TransformersEngine, question: Question, options: Gcg) -> str:
    """What GCG (Zou et al. 2023, arXiv:2307.15043) finds to put behind a request, given the model's weights.

    Raises:
        DeltaguardError: the package for it is not installed.
    """
    from deltaguard.evaluation.probes.gcg import gcg_suffix

    return gcg_suffix(engine.model, engine.tokenizer, question, steps=options.steps).text


def harness_results(
    reference: str, task: str, options: Harness, config: EngineConfig
) -> list[dict[str, Any]]:
    """What lm-eval measures on one task, as JSON holds it.

    Raises:
        DeltaguardError: lm-eval is not installed or does not know the task.
    """
    from deltaguard.evaluation.utility.harness import run_harness

    scores = run_harness(
        whole_model(reference),
        [task],
        limit=options.limit,
        batch_size=config.batch_size,
        device=str(find_device(config.device)),
        seed=options.seed,
    )
    return [asdict(score) for score in scores]

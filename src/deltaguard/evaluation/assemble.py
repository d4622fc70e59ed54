"""The report of an evaluation, put together from its pieces."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from deltaguard.device import find_device
from deltaguard.evaluation.address import public_address
from deltaguard.evaluation.answering import Candidate
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.excerpts import samples
from deltaguard.evaluation.harness_numbers import unlike_notes
from deltaguard.evaluation.outcomes import Outcome, agreements, comparisons, measures
from deltaguard.evaluation.suites.parts import Part
from deltaguard.evaluation.suites.suite import Suite
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.evaluation import EvaluatedModel, EvaluationReport

_SAMPLES = 3
_LIBRARIES = ("trl", "datasets", "lm-eval", "vllm", "openai", "rouge-score", "nanogcg")
"""What sections may need beyond what deltaguard itself needs."""


def assemble(
    suite: Suite,
    parts: Sequence[Part],
    candidates: Sequence[Candidate],
    outcomes: Sequence[Outcome],
    *,
    config: EngineConfig,
    notes: Sequence[str],
    files: Mapping[str, str],
    seconds: Mapping[str, float],
) -> EvaluationReport:
    """All that an evaluation found, as it is written.

    Args:
        suite: as it was read.
        parts: as they were run.
        candidates: the models, the one that others are compared with first.
        outcomes: every model on every part.
        config: what generated the answers.
        notes: what a reader must know.
        files: sha256 of the files of answers, by name.
        seconds: wall time by stage, over all runs in the folder.
    """
    settings = _settings(suite)
    hashes = {part.name: part.prompts_hash for part in parts}
    harness = tuple(task for outcome in outcomes for task in outcome.harness)
    return EvaluationReport(
        environment=environment(_device(config), libraries=_LIBRARIES),
        suite=suite.name,
        suite_hash=sha256(json.dumps([settings, hashes], sort_keys=True).encode()).hexdigest(),
        settings=settings,
        engine=config.described,
        decoding=suite.decoding.model_dump(mode="json"),
        models=tuple(_model(each) for each in candidates),
        sections=tuple(part.row() for part in parts),
        measures=measures(outcomes),
        comparisons=comparisons(outcomes),
        agreements=agreements(outcomes),
        harness=harness,
        samples=samples(outcomes, _SAMPLES),
        notes=(*notes, *unlike_notes(harness)),
        files=files,
        seconds=seconds,
    )


def _settings(suite: Suite) -> dict[str, Any]:
    """The suite without the secrets that an address may hold."""
    settings = suite.model_dump(mode="json")
    judges = [
        {**judge, "base_url": public_address(judge["base_url"])} if "base_url" in judge else judge
        for judge in settings["judges"]
    ]
    return {**settings, "judges": judges}


def _model(candidate: Candidate) -> EvaluatedModel:
    return EvaluatedModel(
        name=candidate.name,
        reference=candidate.reference,
        fingerprint=candidate.fingerprint,
        chat_template_hash=candidate.chat_template_hash,
    )


def _device(config: EngineConfig) -> str:
    if config.base_url is not None:
        return f"server at {public_address(config.base_url)}"
    import torch

    device = "cuda" if config.name == "vllm" else str(find_device(config.device))
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device

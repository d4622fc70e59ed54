"""From the description of a judge to the judge."""

from pathlib import Path

from deltaguard.evaluation.exchange import Judge
from deltaguard.evaluation.judges.classifiers import SequenceClassifierJudge
from deltaguard.evaluation.judges.guards import GuardJudge
from deltaguard.evaluation.judges.keywords import KeywordJudge
from deltaguard.evaluation.judges.llm import LLMJudge
from deltaguard.evaluation.judges.openings import OpeningJudge
from deltaguard.evaluation.judges.specs import (
    ClassifierSpec,
    GuardSpec,
    JudgeSpec,
    KeywordsSpec,
    OpeningSpec,
)
from deltaguard.evaluation.server import Server

CACHE_NAME = "judge-cache.jsonl"
"""The file that keeps the scores of language models, where no other is named."""


def make_judge(spec: JudgeSpec, *, device: str = "cpu", cache_dir: Path | None = None) -> Judge:
    """The judge that a suite describes. Weights are loaded when it first judges.

    Args:
        spec: which judge, with its options.
        device: where a classifier or guard runs.
        cache_dir: folder for the scores of a language model whose description names no cache; where absent,
            they are kept in memory.

    Raises:
        DeltaguardError: a classifier cannot be found or lacks the labels, or a server cannot be asked.

    Example:
        >>> make_judge(OpeningSpec()).name
        'opening'
    """
    if isinstance(spec, OpeningSpec):
        return OpeningJudge()
    if isinstance(spec, KeywordsSpec):
        return KeywordJudge()
    if isinstance(spec, ClassifierSpec):
        return SequenceClassifierJudge(
            model=spec.model,
            refused_labels=spec.refused_labels,
            reads=spec.reads,
            device=device,
            batch_size=spec.batch_size,
            name=spec.name,
        )
    if isinstance(spec, GuardSpec):
        return GuardJudge(
            model=spec.model,
            template=spec.template,
            prompt_file=spec.prompt_file,
            device=device,
            batch_size=spec.batch_size,
            max_new_tokens=spec.max_new_tokens,
            label=spec.name,
        )
    cache = spec.cache or (cache_dir / CACHE_NAME if cache_dir else None)
    server = Server(
        base_url=spec.base_url,
        model=spec.model,
        api_key_env=spec.api_key_env,
        timeout=spec.timeout,
        retries=spec.retries,
        workers=spec.max_workers,
    )
    return LLMJudge(
        server, cache=cache, threshold=spec.threshold, max_missing=spec.max_missing, name=spec.name
    )

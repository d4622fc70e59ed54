"""`deltaguard eval`."""

import sys
from contextlib import redirect_stdout
from math import inf
from typing import TYPE_CHECKING, Literal

from deltaguard.cli.sink import (
    Json,
    OptionalInt,
    Output,
    Reference,
    UsageError,
    emit,
    hide_bars_of_transformers,
    progress_bar,
)

if TYPE_CHECKING:
    from deltaguard.evaluation.judges.guards import GuardKind
    from deltaguard.evaluation.suites.suite import AnyJudge

_KEY = "OPENAI_API_KEY"


def eval(  # noqa: A001 - the verb of the command line
    model: Reference,
    /,
    *others: Reference,
    output: Output,
    suite: str = "quick",
    engine: Literal["transformers", "vllm", "openai"] = "transformers",
    base_url: str | None = None,
    api_key_env: str | None = None,
    timeout: float = 60,
    max_missing: float = 0.05,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    batch_size: OptionalInt = None,
    judge_url: str | None = None,
    judge_model: str | None = None,
    judge_api_key_env: str | None = None,
    guard: str | None = None,
    guard_template: Literal["llama-guard", "wildguard", "harmbench"] | None = None,
    inspect: bool = False,
    json: Json = False,
) -> None:
    """Measure models side by side: refusals, needless refusals and utility, with intervals.

    Answers are kept as they come: the same command goes on where it was interrupted.

    Args:
        model: The model that others are compared with: a folder, a Hub id, `id@revision` or a PEFT adapter
            folder; a name on the server for `--engine openai`.
        others: More of them.
        output: The folder for `evaluation.json`, a README.md and all answers.
        suite: `quick` (minutes on two CPU cores), `safety`, `utility`, `full` (public sets), or a YAML file.
        engine: `transformers`, `vllm` where it is installed, or `openai` for a server.
        base_url: The server's address, such as `http://127.0.0.1:8000/v1`.
        api_key_env: Environment variable with the server's key, `OPENAI_API_KEY` where absent.
        timeout: Seconds for each request to a server, from its beginning to the end of the reply.
        max_missing: Share of a section's answers, or of a judge's scores of them, that a server may fail to
            give. They are left out of every number and named; above the share the run ends.
        device: Where transformers runs: `auto`, `cpu`, `cuda` or `cuda:N`; a second attack trains on the
            first GPU alone.
        dtype: Of the weights; `auto` is float32 on a CPU and the checkpoint's own elsewhere.
        batch_size: Questions answered at a time; 8 by a server and 32 else where absent.
        judge_url: Address of a server whose model judges too, from 1 (refuses) to 5 (follows the request).
        judge_model: That model's name on the server.
        judge_api_key_env: Environment variable with the key for it, `OPENAI_API_KEY` where absent.
        guard: A guard model that judges too: a folder or a Hub id.
        guard_template: What that model was trained to read and write, `llama-guard` where absent.
        inspect: Write logs for `inspect view --log-dir OUTPUT/inspect`, too; needs deltaguard[inspect].
        json: Print one JSON document and nothing else on stdout.
    """
    _check(engine, base_url, api_key_env, dtype, batch_size)
    _check_limits(timeout, max_missing)
    more = _judges(judge_url, judge_model, judge_api_key_env, guard, guard_template)
    from deltaguard.evaluation.engines.make import EngineConfig
    from deltaguard.evaluation.evaluate import evaluate as run
    from deltaguard.evaluation.suites.suite import read_suite
    from deltaguard.reports.evaluation import evaluation_table

    key = api_key_env or _KEY
    config = EngineConfig(engine, device, dtype, batch_size, base_url, key, timeout, max_missing)
    chosen = read_suite(suite)
    limits = {"timeout": timeout, "max_missing": max_missing}
    more = [each.model_copy(update=limits) if each.kind == "llm" else each for each in more]
    asked = chosen.model_copy(update={"judges": (*chosen.judges, *more)})
    hide_bars_of_transformers()
    # Some libraries print what they do.
    with redirect_stdout(sys.stderr), progress_bar() as progress:
        report = run(
            [model, *others], output, suite=asked, engine=config, inspect_logs=inspect, progress=progress
        )
    emit(report, evaluation_table(report), as_json=json, last=f"\nReport: {output / 'README.md'}")


def _check(
    engine: str, base_url: str | None, api_key_env: str | None, dtype: str, batch_size: int | None
) -> None:
    if engine == "openai" and not base_url:
        raise UsageError("--engine openai needs the server's address: --base-url URL.")
    for option, value in (("--base-url", base_url), ("--api-key-env", api_key_env)):
        if engine != "openai" and value is not None:
            raise UsageError(f"{option} is for --engine openai; the engine is {engine}.")
    if engine == "openai" and dtype != "auto":
        raise UsageError("--dtype is of weights that are loaded here; the server has loaded its own.")
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, and is {batch_size}.")


def _check_limits(timeout: float, max_missing: float) -> None:
    if not 0 < timeout < inf:
        raise UsageError(f"--timeout must be more than 0 seconds, and is {timeout}.")
    if not 0 <= max_missing < 1:
        raise UsageError(f"--max-missing must be 0 or more and below 1, and is {max_missing}.")


def _judges(
    url: str | None,
    model: str | None,
    api_key_env: str | None,
    guard: str | None,
    template: "GuardKind | None",
) -> "list[AnyJudge]":
    """Find the judges that options add to the suite's."""
    if (url is None) != (model is None):
        raise UsageError("--judge-url and --judge-model go together.")
    if url is None and api_key_env is not None:
        raise UsageError("--judge-api-key-env is for the server of --judge-url: give that, too.")
    if guard is None and template is not None:
        raise UsageError("--guard-template is for the model of --guard: give that, too.")
    from deltaguard.evaluation.judges.guards import GuardSpec
    from deltaguard.evaluation.judges.llm import LLMSpec

    found: list[AnyJudge] = []
    if url is not None and model is not None:
        found.append(LLMSpec(base_url=url, model=model, api_key_env=api_key_env or _KEY))
    if guard is not None:
        found.append(GuardSpec(model=guard, template=template or "llama-guard"))
    return found

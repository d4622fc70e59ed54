"""`deltaguard eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Group

from deltaguard.cli.sink import Json, UsageError, emit, hide_bars_of_transformers, progress_bar

if TYPE_CHECKING:
    from deltaguard.evaluation.judges.specs import JudgeSpec
    from deltaguard.evaluation.suites.suite import Suite


def eval(  # noqa: A001 - the verb of the command line
    model: str,
    /,
    *others: str,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    suite: str = "quick",
    engine: Literal["transformers", "vllm", "openai"] = "transformers",
    base_url: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    batch_size: int = 32,
    judge_url: str | None = None,
    judge_model: str | None = None,
    judge_api_key_env: str = "OPENAI_API_KEY",
    guard: str | None = None,
    guard_template: Literal["llama-guard", "wildguard", "harmbench"] = "llama-guard",
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
        api_key_env: Environment variable with the server's key.
        device: Where transformers runs: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Of the weights; `auto` is float32 on a CPU and the checkpoint's own elsewhere.
        batch_size: Questions answered at a time.
        judge_url: Address of a server whose model judges too, from 1 (refuses) to 5 (follows the request).
        judge_model: That model's name on the server.
        judge_api_key_env: Environment variable with the key for it.
        guard: A guard model that judges too: a folder or a Hub id.
        guard_template: What that model was trained to read and write.
        json: Print one JSON document and nothing else on stdout.
    """
    if (judge_url is None) != (judge_model is None):
        raise UsageError("--judge-url and --judge-model go together.")
    from deltaguard.draw.evaluation import evaluation_table
    from deltaguard.evaluation.engines.make import EngineConfig
    from deltaguard.evaluation.evaluate import evaluate as run
    from deltaguard.evaluation.judges.specs import GuardSpec, LLMSpec
    from deltaguard.evaluation.suites.suite import read_suite

    more: list[JudgeSpec] = []
    if judge_url is not None and judge_model is not None:
        more.append(LLMSpec(base_url=judge_url, model=judge_model, api_key_env=judge_api_key_env))
    if guard is not None:
        more.append(GuardSpec(model=guard, template=guard_template))
    config = EngineConfig(engine, device, dtype, batch_size, base_url, api_key_env)
    hide_bars_of_transformers()
    with progress_bar() as progress:
        report = run(
            [model, *others],
            output,
            suite=_with_judges(read_suite(suite), more),
            engine=config,
            progress=progress,
        )
    emit(report, Group(evaluation_table(report), "", f"Report: {output / 'README.md'}"), as_json=json)


def _with_judges(suite: "Suite", more: list["JudgeSpec"]) -> "Suite":
    return suite.model_copy(update={"judges": (*suite.judges, *more)})

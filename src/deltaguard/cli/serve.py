"""`deltaguard serve`."""

from typing import Annotated, Literal

from cyclopts import Parameter, validators
from pydantic import BaseModel

from deltaguard.cli.sink import Int, Json, UsageError, UserPath, emit, tell
from deltaguard.errors import require_packages


class Serving(BaseModel):
    """What `serve` says before it answers.

    Attributes:
        models: names of the aligned models.
        api: address of the API.
        page: address of the page.
        first_key: an operator's, of a service that had none; shown this once.
    """

    models: list[str]
    api: str
    page: str
    first_key: str | None


def serve(
    *,
    data: UserPath,
    model: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    host: str = "127.0.0.1",
    port: Annotated[Int, Parameter(validator=validators.Number(gte=1, lte=65_535))] = 8000,
    inference_url: str | None = None,
    executor: Literal["local", "ray"] | None = None,
    json: Json = False,
) -> None:
    """Serve fine-tuning with OpenAI's API: jobs are trained, restored, checked, and only then published.

    The first start prints an API key, which is stored nowhere. What was under way when a service ended,
    however it ended, goes on after the next start.

    Args:
        data: The folder with all that the service keeps; made where there is none. A `service.yaml` in it
            says what the operator decided.
        model: An aligned model that customers may fine-tune, as `NAME=MODEL`, a folder or Hub id; may be
            given several times.
        host: Address to listen at; behind it stands whoever speaks TLS.
        port: Port to listen at.
        inference_url: The API of a vLLM server that answers chats, such as `http://gpu:8001/v1`. Without it,
            a process of the service does.
        executor: What runs the processes of jobs: this machine, or the Ray cluster that service.yaml or
            RAY_ADDRESS names. `local`, unless service.yaml says `ray`.
        json: Print one JSON document, with the first key, and nothing else on stdout.
    """
    require_packages(
        "Serving",
        "serve",
        *("dbos", "fastapi", "fsspec", "multipart", "prometheus_client", "sqlalchemy", "trl", "uvicorn"),
    )
    from deltaguard.service import server

    given = [_split(each) for each in model]
    models = dict(given)
    if len(models) < len(given):
        raise UsageError("--model gives one name twice.")
    settings = server.chosen_settings(data, models, inference_url=inference_url, executor=executor)

    def on_open(first_key: str | None) -> None:
        page = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        found = Serving(models=list(settings.models), api=f"{page}/v1", page=page, first_key=first_key)
        if json:
            emit(found, "", as_json=True)
            return
        if first_key is not None:
            tell(f"The first API key, shown this once: {first_key}")
        tell(f"Serving {', '.join(found.models)} at {found.api}; a page at {found.page}")

    server.serve(data, settings, host=host, port=port, on_open=on_open)


def _split(given: str) -> tuple[str, str]:
    name, is_there, reference = given.partition("=")
    if not is_there or not reference:
        raise UsageError(f"--model is written NAME=MODEL; it is {given!r}.")
    return name, reference

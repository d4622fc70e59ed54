"""A service from its data folder: opened, served, and ended as if it had been killed."""

import copy
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import uvicorn.config
from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.engine import make_url

from deltaguard.device import find_device
from deltaguard.errors import DeltaguardError, listed
from deltaguard.evaluation.judges import JudgeSpec
from deltaguard.evaluation.judges.classifiers import ClassifierSpec
from deltaguard.evaluation.judges.guards import GuardSpec
from deltaguard.files import problems
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.durable import explained, lock_folder, write_atomically
from deltaguard.models.hub import locate
from deltaguard.models.loading import load_tokenizer
from deltaguard.service.app import make_app
from deltaguard.service.contents import UnavailableError, open_contents
from deltaguard.service.context import SERVICE_ID, Service
from deltaguard.service.database import database_url, new_id, open_database
from deltaguard.service.executors.executor import Executor
from deltaguard.service.executors.local import LocalExecutor, visible_gpus
from deltaguard.service.executors.reach import check_reach
from deltaguard.service.holding import Hold
from deltaguard.service.inference import Answering, Inference
from deltaguard.service.inference_server import InferenceServer
from deltaguard.service.keys import create_key
from deltaguard.service.settings import SETTINGS_NAME, Settings, read_settings
from deltaguard.service.tables import Key, Owner
from deltaguard.service.taking_up import keep_queued, take_up
from deltaguard.service.webhooks import webhook_secret
from deltaguard.service.workflow import launch

_FOLDERS = ("files", "jobs", "models", "cache")
_FIRST_ORGANISATION = "default"
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """What `open_service` opened.

    Attributes:
        service: the service.
        database_url: of its database.
        first_key: made for it where it had none; shown this once.
    """

    service: Service
    database_url: str
    first_key: str | None


def chosen_settings(data: Path, models: Mapping[str, str], **chosen: str | None) -> Settings:
    """Read a data folder's `service.yaml`, with what the command line says.

    Args:
        data: the folder.
        models: beside those of the file.
        chosen: other settings in the place of the file's, unless they are None.

    Raises:
        DeltaguardError: they are something else than settings, or do not go together.
    """
    settings = read_settings(data / SETTINGS_NAME)
    # Checked anew: names come from the command line too.
    given = settings.model_dump() | {"models": {**settings.models, **models}}
    given |= {name: value for name, value in chosen.items() if value is not None}
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        raise DeltaguardError(listed("The service cannot be run so", problems(error))) from error


def _logging() -> dict[str, Any]:
    """Have uvicorn's log go to stderr whole; of itself, that of requests goes to stdout."""
    config = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return config


def _close(data: Path) -> None:
    """Let nobody else into the folder with customers' data and the hashes of keys."""
    try:
        data.chmod(0o700)
    except PermissionError:
        # It is another's, who decides who reads it.
        if data.stat().st_mode & 0o077:
            _LOGGER.warning("Others than its owner may look into %s, which holds customers' data.", data)


def open_service(data: Path, settings: Settings) -> Opened:
    """Open the database of a data folder, which is made where there is none.

    Raises:
        DeltaguardError: the folder cannot be written, its database is of a later release, or `files_url` is
            another service's.
    """
    with explained(data):
        for name in _FOLDERS:
            (data / name).mkdir(parents=True, exist_ok=True)
        _close(data)
        if not (data / SERVICE_ID).exists():
            write_atomically(data / SERVICE_ID, new_id("service"))
    url = database_url(data, settings.database_url)
    contents = open_contents(data, settings.files_url)
    service, first = Service(data, settings, open_database(url, may_migrate=True), contents), None
    _require_database(service, claims=True)
    try:
        contents.require_owner(service.id, claims=True)
    except UnavailableError as error:
        _LOGGER.warning("Whose the place of `files_url` is was not found out: %s", error)
    with service.sessions.begin() as session:
        if session.scalar(select(Key.number).limit(1)) is None:
            # Whoever starts a service is its operator.
            first = create_key(session, _FIRST_ORGANISATION, is_operator=True)
    return Opened(service, url, first)


def existing_service(data: Path) -> Service:
    """Open the service of a data folder beside the one that may be running.

    Raises:
        DeltaguardError: there is no such folder, or its database is of another release.
    """
    if not data.is_dir():
        raise DeltaguardError(f"There is no folder {data}: `deltaguard serve --data {data}` makes it.")
    settings = chosen_settings(data, {})
    sessions = open_database(database_url(data, settings.database_url), may_migrate=False)
    service = Service(data, settings, sessions, open_contents(data, settings.files_url))
    _require_database(service, claims=False)
    return service


def _require_database(service: Service, *, claims: bool) -> None:
    """Refuse a database that is not this folder's: to it, all that jobs left in the folder would be garbage.

    Args:
        service: with both.
        claims: whether a database that is nobody's becomes this folder's.

    Raises:
        DeltaguardError: it is another folder's, or an empty one beside a folder that jobs have worked in.
    """
    with service.sessions.begin() if claims else service.sessions.reading() as session:
        owner = session.scalar(select(Owner.id).limit(1))
        if owner is None:
            is_used = session.scalar(select(Key.number).limit(1)) is not None
            left = (path for name in ("jobs", "models") for path in (service.data / name).glob("ftjob-*"))
            if not is_used and any(left):
                raise DeltaguardError(
                    f"The database of {service.data} is empty, and jobs have worked in this folder: it is "
                    "another one than it had. Name in its service.yaml the database that it had."
                )
            if claims:
                session.add(Owner(id=service.id))
        elif owner != service.id:
            raise DeltaguardError(
                f"The database that {service.data} names is of another folder's service. Name in its "
                "service.yaml its own."
            )


def serve(
    data: Path, settings: Settings, *, host: str, port: int, on_open: Callable[[str | None], None]
) -> None:
    """Serve until the process is told to end.

    Args:
        data: the folder with all that the service keeps; one service at a time works in it.
        settings: what the operator decided.
        host: address to listen at.
        port: likewise.
        on_open: called before requests are answered, with the first key, where there was none.

    Raises:
        DeltaguardError: there is no model, one of them cannot be used, another service is in the folder, or
            jobs cannot run on the Ray cluster that they are to run on.
    """
    if not settings.models:
        raise DeltaguardError(
            "There is no model to fine-tune: give `--model NAME=MODEL`, or name some in "
            f"{data / SETTINGS_NAME}."
        )
    for reference in settings.models.values():
        _refuse_unusable(reference)
    for judge in settings.judges:
        _prepare_judge(judge, settings.own_device)
    for model in settings.restoring.models.values():
        locate(model)
    if settings.webhook is not None:
        webhook_secret(settings.webhook)
    with explained(data):
        data.mkdir(parents=True, exist_ok=True)
    # Before the database is touched: another service may be working with it.
    lock = lock_folder(data)
    url = database_url(data.absolute(), settings.database_url)
    hold = Hold(url) if make_url(url).get_backend_name() == "postgresql" else None
    opened = open_service(data.absolute(), settings)
    if hold is not None:
        hold.keep()
    # At once: it is not shown again.
    on_open(opened.first_key)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    workflows = launch(opened.service, opened.database_url, _executor(data.absolute(), settings))
    take_up(workflows)
    threading.Thread(target=keep_queued, args=(workflows,), daemon=True).start()
    inference = _answering(data, settings)
    app = make_app(opened.service, workflows, inference)
    # Its log has methods, paths and states: no headers, and with them no keys, and no bodies.
    code = 0
    try:
        uvicorn.run(app, host=host, port=port, log_level="info", log_config=_logging())
    except SystemExit as end:
        # The port is taken, say; it has been told.
        code = end.code if isinstance(end.code, int) else 1
    os.close(lock)
    # Whatever is under way goes on after the next start, exactly as after a kill; the processes that carry it
    # out end by themselves.
    os._exit(code)


def _answering(data: Path, settings: Settings) -> Answering:
    most = settings.limits.chat_waiting
    if settings.inference_url is not None:
        return InferenceServer(str(settings.inference_url), most_waiting=most)
    return Inference(data / "chat.log", device=settings.own_device, most_waiting=most)


def _executor(data: Path, settings: Settings) -> Executor:
    """Make what runs the processes of jobs.

    Raises:
        DeltaguardError: there is no cluster, or its workers do not see the data folder.
    """
    if settings.executor == "local":
        return LocalExecutor(visible_gpus(settings.device))
    from deltaguard.service.executors.ray import RayExecutor, connect

    executor = RayExecutor(connect(settings.ray), gpus=settings.gpus_of_a_process)
    check_reach(executor, data)
    return executor


def _prepare_judge(judge: JudgeSpec, device: str) -> None:
    """Have a judge's model here before jobs need it: their processes download nothing.

    Raises:
        DeltaguardError: there is no such model, or it cannot judge.
    """
    judge.make(device=str(find_device(device)))
    if isinstance(judge, ClassifierSpec | GuardSpec):
        locate(judge.model)


def _refuse_unusable(reference: str) -> None:
    """Refuse an aligned model that no job could use.

    Raises:
        DeltaguardError: it cannot be opened, or has no chat template.
    """
    Checkpoint.open(reference)
    if not load_tokenizer(locate(reference), reference).chat_template:
        raise DeltaguardError(f"{reference} has no chat template: give the instruction-tuned model.")

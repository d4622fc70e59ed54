"""Publishing a restored model with its card and report, or a CurvatureStore, on the Hugging Face Hub."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2, as the release has it
)
from huggingface_hub.utils import validate_repo_id
from pydantic import BaseModel

from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import MANIFEST
from deltaguard.errors import CheckFailedError, DeltaguardError, listed
from deltaguard.files import expanded, read_json
from deltaguard.models.hub import is_hub_id, is_local, make_repository, require_owner
from deltaguard.models.layout import ADAPTER_CONFIG
from deltaguard.reports.outcome import without_the_users_folders
from deltaguard.reports.records.push import PushReport
from deltaguard.reports.records.restore import REPORT_NAME
from deltaguard.restoration.verify import loaded_besides, read_report, verify


def push(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> PushReport:
    """Upload a restored model with its card and report, or a store, to a model repository of the Hub.

    A model is verified first, and uploaded are the files that its report lists, in one commit. In the report
    that goes with them, models are named without the folders above them.

    Args:
        folder: what `restore` or `calibrate` wrote.
        repo_id: `owner/name`; made if absent.
        private: whether the repository must be private; a new one is otherwise what its owner's are.
        token: a token with write access; the one logged in with where absent.

    Returns:
        What was uploaded where.

    Raises:
        CheckFailedError: the model is not what its report says; nothing is uploaded.
        DeltaguardError: the folder holds neither, or an adapter that names its model by a folder; the
            repository holds files that would be loaded with the model or in its place; or the Hub refuses or
            cannot be reached.

    Example:
        ```python
        deltaguard.push("restored", "me/my-model-restored", private=True).commit
        ```
    """
    require_owner(repo_id)
    place = expanded(folder)
    if (place / MANIFEST).is_file():
        store = CurvatureStore.from_pretrained(place)
        with explained(f"{place} was not pushed to {repo_id}, and can be again"):
            commit = store.push_to_hub(repo_id, private=private, token=token)
        return PushReport(folder=str(place), repository=repo_id, commit=commit, files=store.file_names)
    report = read_report(place)
    if problems := verify(place).problems:
        raise CheckFailedError(listed(f"{place} is not what its report says, and was not pushed", problems))
    adapter = place / ADAPTER_CONFIG
    if any(row.name == ADAPTER_CONFIG for row in report.files):
        refuse_local_base(read_json(adapter, _Base, remedy="Restore again.").base_model_name_or_path)
    content = without_the_users_folders(report).model_dump_json(indent=2) + "\n"
    files = [CommitOperationAdd(row.name, place / row.name) for row in report.files]
    files.append(CommitOperationAdd(REPORT_NAME, content.encode()))
    with explained(f"{place} was not pushed to {repo_id}, and can be again"):
        api = HfApi(token=token)
        make_repository(api, repo_id, private=private)
        besides = list(loaded_besides(api.list_repo_files(repo_id), report))
        if besides:
            title = f"{repo_id} holds files that would be loaded with {place}, or in its place"
            raise DeltaguardError(
                f"{listed(title, besides)}\nRemove them there, or push to another repository."
            )
        commit = api.create_commit(repo_id, files, commit_message="Add a model restored by deltaguard")
    names = tuple(file.path_in_repo for file in files)
    return PushReport(folder=str(place), repository=repo_id, commit=commit.commit_url, files=names)


class _Base(BaseModel):
    """What an adapter belongs to."""

    base_model_name_or_path: str


def refuse_local_base(reference: str) -> None:
    """Refuse to publish an adapter over a folder, whose path nobody else finds and is the user's own affair.

    Args:
        reference: what the adapter belongs to.

    Raises:
        DeltaguardError: it is not known by a Hub id.
    """
    if is_local(reference) or not is_hub_id(reference):
        raise DeltaguardError(
            f"An adapter over {reference} cannot be published: it names its model by that folder, where "
            "nobody else finds it. Restore it over the model's Hub id, or write a checkpoint."
        )


def require_login(repo_id: str) -> None:
    """Refuse a name that no repository can have, and whoever is not logged in, before hours of work.

    Raises:
        DeltaguardError: one of them, or the Hub cannot be reached.
    """
    require_owner(repo_id)
    with explained(f"Nothing can be pushed to {repo_id}"):
        validate_repo_id(repo_id)
        HfApi().whoami()


@contextmanager
def explained(what: str) -> Generator[None, None, None]:
    """Tell what the Hub has against an upload as a known failure.

    Args:
        what: came of it, as the beginning of the message.
    """
    try:
        yield
    except HFValidationError as error:
        raise DeltaguardError(f"{what}: {error}") from error
    except (HTTPError, OSError) as error:
        raise DeltaguardError(
            f"{what}: {error}\nIs there a network, and a token that may write (`hf auth login`)?"
        ) from error

"""Where a model lies: a local folder, or a snapshot fetched from the Hugging Face Hub."""

import os
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2, as the release has it
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from deltaguard.errors import DeltaguardError
from deltaguard.files import expanded

_SMALL_FILES = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenizer*"),
    *("*.py", "*.md", "LICENSE*", "NOTICE*"),
)
# Some repositories hold a second copy of the weights, in the format of the original code.
_SECOND_COPIES = ("consolidated*.safetensors", "*/*.safetensors")
_HUB_REFERENCE = re.compile(r"(?P<id>\w[\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


def is_local(reference: str | Path) -> bool:
    """Tell whether a reference names a local folder, which always comes before the Hub."""
    return os.path.isdir(expanded(reference))  # noqa: PTH112


def require_owner(repo_id: str) -> None:
    """Refuse a name without its owner, under which nothing is found again.

    Raises:
        DeltaguardError: it has none.

    Example:
        >>> require_owner("me/restored")
    """
    if "/" not in repo_id:
        raise DeltaguardError(f"{repo_id} names no owner: give OWNER/{repo_id}.")


def make_repository(api: HfApi, repo_id: str, *, private: bool) -> None:
    """Make a repository to upload to, unless it is there.

    Args:
        api: of the Hub.
        repo_id: `owner/name`.
        private: whether what is uploaded must not be public; otherwise a new one is what its owner's are.

    Raises:
        DeltaguardError: it is there and public, and was to be private.
    """
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and api.repo_info(repo_id).private is False:
        raise DeltaguardError(
            f"{repo_id} is there already, and public: make it private in its settings, or push to another."
        )


def is_hub_id(reference: str | Path) -> bool:
    """Tell whether a reference has the form of a Hub id, with or without a revision.

    Example:
        >>> is_hub_id("Qwen/Qwen3-0.6B@main"), is_hub_id("/models/aligned")
        (True, False)
    """
    return isinstance(reference, str) and _HUB_REFERENCE.fullmatch(reference) is not None


def locate(reference: str | Path, *, weights: bool = True) -> Path:
    """Find the local folder of a model, and fetch it from the Hub where the reference is no local folder.

    A local path always wins where it exists. Nothing that runs code is executed.

    Args:
        reference: a folder, a Hub id, or `id@revision` (a branch, tag or commit).
        weights: fetch the safetensors files too; otherwise configuration and tokenizer alone.

    Returns:
        The folder.

    Raises:
        DeltaguardError: there is no such folder or repository, or the Hub cannot be reached.
    """
    path = expanded(reference)
    if is_local(reference):
        return path
    if os.path.exists(path):  # noqa: PTH110
        raise DeltaguardError(f"{path} is a file; give the folder that holds the model.")
    match = _HUB_REFERENCE.fullmatch(str(reference))
    if isinstance(reference, Path) or match is None:
        raise DeltaguardError(
            f"There is no folder {path} (looked for {path.absolute()}), and it is not a Hub id, "
            "which would have the form organisation/name or organisation/name@revision."
        )
    return _fetch(match["id"], match["revision"], weights=weights)


def _fetch(repository: str, revision: str | None, *, weights: bool) -> Path:
    wanted: list[str] = [*_SMALL_FILES, "*.safetensors"] if weights else [*_SMALL_FILES]
    at = f"{repository} at revision {revision}" if revision else repository
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=wanted, ignore_patterns=list(_SECOND_COPIES)
        )
    except GatedRepoError as error:
        raise DeltaguardError(
            f"The Hub repository {repository} is gated: accept its terms at "
            f"https://huggingface.co/{repository} and run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise DeltaguardError(f"The Hub repository {repository} has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DeltaguardError(
            f"There is neither a local folder nor a Hub repository named {repository}. "
            "If the repository is private, run `hf auth login`."
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:
        # What fetches large files raises errors that are of no kind of their own.
        raise DeltaguardError(
            f"{at} is not a local folder and could not be fetched from the Hub: {error}"
        ) from error
    return Path(folder)

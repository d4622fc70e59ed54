"""`deltaguard push`."""

from typing import Annotated

from cyclopts import Parameter

from deltaguard.cli.sink import Json, UserPath, emit


def push(
    folder: UserPath,
    repository: str,
    /,
    *,
    private: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Upload a restored model with its card and report, or a store, to a model repository of the Hub.

    A model is verified first. Log in before with `hf auth login`, or set `HF_TOKEN`.

    Args:
        folder: What `restore` or `calibrate` wrote.
        repository: `owner/name` on the Hub; made if absent.
        private: The repository is private: one that is there and public is refused. Without it a new one is
            what its owner's are by default.
        json: Print one JSON document and nothing else on stdout.
    """
    from deltaguard.restoration.push import push as run

    pushed = run(folder, repository, private=private)
    emit(pushed, f"Pushed {len(pushed.files)} files: {pushed.commit}", as_json=json)

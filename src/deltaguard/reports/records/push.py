"""What was published on the Hub."""

from deltaguard.reports.records.base import Record


class PushReport(Record):
    """What `push` uploaded.

    Attributes:
        folder: the restored model's, or the store's.
        repository: of the Hub, `owner/name`.
        commit: its address.
        files: names in the repository.
    """

    folder: str
    repository: str
    commit: str
    files: tuple[str, ...]

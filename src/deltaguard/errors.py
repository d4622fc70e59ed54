"""The failures deltaguard knows, each one message that says what, where, both values and what to do."""


class DeltaguardError(ValueError):
    """A known failure: the command line prints its message without a traceback and exits with 1."""


class CheckFailedError(DeltaguardError):
    """The work was finished, but a check of its result failed: exit code 3."""

"""The failures deltaguard knows, each one message that says what, where, both values and what to do."""

from collections.abc import Sequence
from importlib.util import find_spec

MOST_PROBLEMS = 20
"""Lines of one message about the same problem at most."""


class DeltaguardError(ValueError):
    """A known failure: the command line prints its message without a traceback and exits with 1."""


class CheckFailedError(DeltaguardError):
    """The work was finished, but a check of its result failed: exit code 3."""


class MissingPackageError(DeltaguardError):
    """A package is not installed that only part of the work needs."""


def require_package(*modules: str, extra: str, purpose: str) -> None:
    """Refuse to go on without packages that an extra of deltaguard brings.

    Args:
        modules: as they are imported.
        extra: the name of the extra.
        purpose: what they are for, such as "To draw charts".

    Raises:
        MissingPackageError: one is not installed; the message says how to install it.

    Example:
        >>> require_package("json", extra="reports", purpose="To draw charts")
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"{purpose}, deltaguard needs {' and '.join(missing)}: pip install 'deltaguard[{extra}]'."
        )


def listed(title: str, problems: Sequence[str]) -> str:
    """Put problems into one message: a line each where there are several, and 20 lines at most.

    Example:
        >>> print(listed("The pair does not fit", ["`a` is missing", "`b` is missing"]))
        The pair does not fit:
        - `a` is missing
        - `b` is missing
    """
    if len(problems) == 1:
        return f"{title}: {problems[0]}"
    lines = [f"- {problem}" for problem in problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        lines.append(f"- and {len(problems) - MOST_PROBLEMS} more")
    return "\n".join([f"{title}:", *lines])

"""The failures deltaguard knows, each one message that says what, where, both values and what to do."""

import sys
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


def is_lack_of_memory(error: BaseException) -> bool:
    """Tell whether memory does not suffice, of which torch says so on a CPU in words alone.

    Example:
        >>> is_lack_of_memory(MemoryError()), is_lack_of_memory(RuntimeError("a bug"))
        (True, False)
    """
    torch = sys.modules.get("torch")
    of_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, MemoryError) or of_gpu or "DefaultCPUAllocator" in str(error)


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


def require_packages(what: str, extra: str, *packages: str, hint: str = "") -> None:
    """Refuse to go on where packages are not installed that an extra of deltaguard brings.

    Args:
        what: cannot be done without them, as the beginning of the message.
        extra: that brings them.
        packages: the names they are imported by.
        hint: what else may be done, put behind the message.

    Raises:
        MissingPackageError: some are not installed; the message names them and the extra.

    Example:
        >>> require_packages("Drawing", "reports", "os", "no_such_package")
        Traceback (most recent call last):
        deltaguard.errors.MissingPackageError: Drawing needs no_such_package, not installed here: ...
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        command = f"`pip install 'deltaguard[{extra}]'`"
        raise MissingPackageError(f"{what} needs {', '.join(missing)}, not installed here: {command}.{hint}")

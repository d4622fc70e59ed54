"""`deltaguard --install-completion`."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from cyclopts import App, Parameter
from rich.text import Text

from deltaguard.cli.sink import OptionalPath, Out, Printable, UsageError
from deltaguard.errors import DeltaguardError
from deltaguard.models.durable import explained, write_atomically

Shell = Literal["bash", "zsh", "fish"]
_NAME_ONE = "name one with --shell bash, zsh or fish."
_OWN = (b"# Bash completion for deltaguard", b"#compdef deltaguard", b"# Fish completion for deltaguard")
"""What scripts begin with."""

_IN_ZSH = """If {folder} is not in $fpath yet, add to ~/.zshrc:
    fpath=({folder} $fpath)
    autoload -Uz compinit && compinit"""
_LOADED = {
    "bash": "A new shell loads it, if the package bash-completion is installed.",
    "zsh": _IN_ZSH,
    "fish": "A new shell loads it.",
}
"""What a user still has to do, where the script is where the shell looks for it."""

_ELSEWHERE = {"bash": "source {path} loads it.", "zsh": _IN_ZSH, "fish": "source {path} loads it."}
"""Where it is in a place of the user's choosing."""


def completion_of(app: App) -> Callable[..., None]:
    """Make the verb that installs a shell's completion of a program."""

    def install_completion(
        *,
        shell: Shell | None = None,
        output: Annotated[OptionalPath, Parameter(name=["--output", "-o"])] = None,
    ) -> None:
        """Have the shell complete verbs, options, names and folders.

        Args:
            shell: Whose completion; if not given, that of the shell that runs this.
            output: Where the script goes, in place of where that shell looks for it.
        """
        from cyclopts.completion.install import get_default_completion_path

        chosen = shell or _running_shell()
        path = (output or get_default_completion_path(chosen, app.name[0])).absolute()
        _require_own(path)
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, app.generate_completion(shell=chosen))
        places = {"path": shlex.quote(str(path)), "folder": shlex.quote(str(path.parent))}
        loaded = (_LOADED if output is None else _ELSEWHERE)[chosen].format_map(places)
        said = f"Completion for {chosen} is in {path}.\n{loaded}"
        Out(highlight=False).print(Printable(Text(said)), soft_wrap=True)

    return install_completion


def _require_own(path: Path) -> None:
    """Refuse to replace anything but such a script.

    Raises:
        DeltaguardError: something else is there, or cannot be read.
    """
    with explained(path):
        is_own = not path.exists() or (path.is_file() and path.read_bytes().startswith(_OWN))
    if not is_own:
        raise DeltaguardError(f"{path} is no completion script: give another file, or remove it.")


def _running_shell() -> Shell:
    from cyclopts.completion.detect import ShellDetectionError, detect_shell

    try:
        found: str = detect_shell()
    except ShellDetectionError as error:
        raise UsageError(f"Which shell this is cannot be told: {_NAME_ONE}") from error
    if found not in get_args(Shell):
        raise UsageError(f"There is no completion for {found}: {_NAME_ONE}")
    return cast("Shell", found)

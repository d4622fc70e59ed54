"""`deltaguard --install-completion`."""

from collections.abc import Callable
from typing import Annotated, Literal, cast, get_args

from cyclopts import App, Parameter
from rich.text import Text

from deltaguard.cli.sink import OptionalPath, Out, Printable, UsageError

Shell = Literal["bash", "zsh", "fish"]
_NAME_ONE = "name one with --shell bash, zsh or fish."
_LOADED = {
    "bash": "A new shell loads it, if the package bash-completion is installed.",
    "zsh": "If {folder} is not in $fpath yet, add to ~/.zshrc:\n"
    "    fpath=({folder} $fpath)\n"
    "    autoload -Uz compinit && compinit",
    "fish": "A new shell loads it.",
}
"""What a user still has to do."""


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
        chosen = shell or _running_shell()
        path = app.install_completion(shell=chosen, output=output, add_to_startup=False)
        said = f"Completion for {chosen} is in {path}.\n{_LOADED[chosen].format(folder=path.parent)}"
        Out(highlight=False).print(Printable(Text(said)), soft_wrap=True)

    return install_completion


def _running_shell() -> Shell:
    from cyclopts.completion.detect import ShellDetectionError, detect_shell

    try:
        found: str = detect_shell()
    except ShellDetectionError as error:
        raise UsageError(f"Which shell this is cannot be told: {_NAME_ONE}") from error
    if found not in get_args(Shell):
        raise UsageError(f"There is no completion for {found}: {_NAME_ONE}")
    return cast("Shell", found)

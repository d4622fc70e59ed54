"""What a shell is told of the program's verbs, options, names and folders."""

import os
import shutil
import subprocess
import sys

import pytest
from cyclopts.completion.detect import ShellDetectionError

from deltaguard.cli.app import FAILED, USAGE, build_app, run

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")

_ASK = '. "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _deltaguard; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "deltaguard"
    assert run(["--install-completion", "--shell", "bash", "--output", str(path)]) == 0
    return path


def completed(script, folder, *words):
    command = ["bash", "-c", _ASK, str(script), "deltaguard", *words]
    found = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return set(found.stdout.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["re"], {"restore", "report"}),
        (["restore", "--max-s"], {"--max-safety-kl"}),
        (["restore", "--training-data", ""], {"unknown", "trusted"}),
        (["restore", "--config", "ca"], {"careful"}),
        (["restore", "my-"], {"my-model"}),
        (["restore", "my-model", "my-"], {"my-model"}),
        (["check", "one", "other", "--store", "my-"], {"my-model"}),
        (["keys", ""], {"create", "list", "revoke"}),
    ],
)
def test_bash_completes_what_the_program_takes(script, tmp_path, words, expected):
    (tmp_path / "my-model").mkdir()
    assert completed(script, tmp_path, *words) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script_that_names_every_verb(tmp_path, capsys, shell):
    output = tmp_path / "script"
    assert run(["--install-completion", "--shell", shell, "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    written = output.read_text(encoding="utf-8")
    verbs = [name for name in build_app() if not name.startswith("-")]
    assert verbs
    assert all(verb in written for verb in verbs)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_takes_the_place_of_an_older_one_and_of_nothing_else(tmp_path, capsys, shell):
    output = tmp_path / "my scripts" / "script"
    command = ["--install-completion", "--shell", shell, "--output", str(output)]
    assert run(command) == 0
    made = output.read_bytes()
    # As zsh and bash would read what is to be added: one word.
    assert f"'{output.parent if shell == 'zsh' else output}'" in capsys.readouterr().out
    output.write_bytes(made + b"# older")
    assert run(command) == 0
    assert output.read_bytes() == made
    output.write_text("alias ll='ls -l'\n")
    assert run(command) == FAILED
    assert "is no completion script" in capsys.readouterr().err
    assert output.read_text() == "alias ll='ls -l'\n"


def test_a_script_is_utf_8_whatever_the_locale(tmp_path):
    output = tmp_path / "script"
    command = [sys.executable, "-X", "utf8=0", "-m", "deltaguard", "--install-completion", "--shell", "zsh"]
    subprocess.run(
        [*command, "-o", str(output)],
        check=True,
        env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    )
    assert "…" in output.read_text(encoding="utf-8")


def test_no_file_of_the_user_is_edited(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["--install-completion", "--shell", "bash"]) == 0
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert found == [".local/share/bash-completion/completions/deltaguard"]


def test_a_shell_without_completion_is_refused(tmp_path, monkeypatch, capsys):
    output = tmp_path / "script"
    command = ["--install-completion", "--output", str(output)]
    assert run([*command, "--shell", "powershell"]) == USAGE
    assert 'Choose from: "bash", "zsh", "fish"' in capsys.readouterr().err
    monkeypatch.setattr("cyclopts.completion.detect.detect_shell", lambda: "powershell")
    assert run(command) == USAGE
    assert "no completion for powershell" in capsys.readouterr().err
    assert not output.exists()


def test_a_shell_that_cannot_be_told_is_asked_for(tmp_path, monkeypatch, capsys):
    def unknown():
        raise ShellDetectionError

    monkeypatch.setattr("cyclopts.completion.detect.detect_shell", unknown)
    assert run(["--install-completion", "--output", str(tmp_path / "script")]) == USAGE
    assert "name one with --shell bash, zsh or fish" in capsys.readouterr().err

"""Sets of options with a name."""

import pytest

from deltaguard import RestoreConfig
from deltaguard.cli.app import run
from deltaguard.cli.presets import PRESETS, as_options, read_options
from deltaguard.errors import DeltaguardError


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_holds_options_of_a_restore_and_is_shown_in_the_help(name, capsys):
    options = read_options(name)
    assert RestoreConfig(**options).added_points == options["max_added_attack_success"]
    assert run(["restore", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{name}: {as_options(options).replace('`', '')}" in shown


def test_balanced_is_what_a_restore_does_without_options():
    given, plain = RestoreConfig(**read_options("balanced")), RestoreConfig()
    decides = ("method", "added_points", "dial", "other_params", "refine", "confidence", "judge")
    assert [getattr(given, name) for name in decides] == [getattr(plain, name) for name in decides]


def test_careful_stays_closer_to_the_aligned_model_than_balanced():
    careful, balanced = (RestoreConfig(**read_options(name)) for name in PRESETS)
    assert careful.dial < balanced.dial
    assert careful.added_points == balanced.added_points


def test_the_command_line_wins_over_a_preset(monkeypatch):
    asked = []

    def stop(*_, config, **__):
        asked.append(config)
        raise DeltaguardError("far enough")

    monkeypatch.setattr("deltaguard.restoration.restore.Restorer", stop)
    call = ["restore", "a", "b", "-o", "c", "--config", "careful", "--max-added-attack-success", "9"]
    assert run(call) == 1
    assert (asked[0].added_points, asked[0].dial) == (9, read_options("careful")["max_safety_kl"])


@pytest.mark.parametrize(
    ("options", "decided"),
    [
        (["--strength", "0.3"], {"strength": 0.3, "dial": None}),
        (
            ["--training-data", "trusted"],
            {"added_points": 2, "dial": 0.02},
        ),
        (["--training-data", "unknown"], {"added_points": 2, "dial": 0.0003}),
        (["--max-safety-kl", "0.001"], {"added_points": 2, "dial": 0.001}),
        (["--method", "greedy", "--strength", "0.2"], {"method": "greedy", "strength": 0.2}),
    ],
)
def test_another_way_to_say_how_much_is_kept_takes_the_place_of_a_presets(monkeypatch, options, decided):
    asked = []

    def stop(*_, config, **__):
        asked.append(config)
        raise DeltaguardError("far enough")

    monkeypatch.setattr("deltaguard.restoration.restore.Restorer", stop)
    assert run(["restore", "a", "b", "-o", "c", "--config", "careful", *options]) == 1
    assert {name: getattr(asked[0], name) for name in decided} == decided


@pytest.mark.parametrize(
    ("written", "options", "decided"),
    [
        (
            "max_added_attack_success: 3\ntraining_data: trusted\n",
            ["--max-safety-kl", "0.001"],
            {"added_points": 3, "dial": 0.001},
        ),
        ("max_safety_kl: 0.003\n", ["--training-data", "unknown"], {"added_points": 2, "dial": 0.0006}),
        ("max_safety_kl: 1e-4\n", ["--training-data", "unknown"], {"added_points": 2, "dial": 0.0001}),
        ("prompts: mine.jsonl\nrefine: 5\n", ["--strength", "0.3"], {"strength": 0.3, "refine": None}),
        ("answer_tokens: 64\n", ["--strength", "0.3"], {"strength": 0.3, "answer_tokens": None}),
    ],
)
def test_likewise_of_a_files(tmp_path, monkeypatch, written, options, decided):
    asked = []

    def stop(*_, config, **__):
        asked.append(config)
        raise DeltaguardError("far enough")

    monkeypatch.setattr("deltaguard.restoration.restore.Restorer", stop)
    (tmp_path / "mine.yaml").write_text(written)
    assert run(["restore", "a", "b", "-o", "c", "--config", str(tmp_path / "mine.yaml"), *options]) == 1
    assert {name: getattr(asked[0], name) for name in decided} == decided


def test_asking_is_not_given_up_unsaid(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("training_data: trusted\n")
    file = str(tmp_path / "mine.yaml")
    assert run(["restore", "a", "b", "-o", "c", "--config", file, "--max-safety-kl", "0.001"]) == 2
    assert "training_data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other",
    [["--max-safety-kl", "0.01"], ["--strength", "0.5"], ["--method", "wise-ft", "--strength", "0.5"]],
)
def test_two_limits_on_the_command_line_are_told_whatever_the_file_says(capsys, other):
    assert (
        run(["restore", "a", "b", "-o", "c", "--config", "careful", "--training-data", "unknown", *other])
        == 2
    )
    assert "training_data" in capsys.readouterr().err


def test_a_file_called_like_a_preset_is_given_with_its_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "careful").write_text("strenth: 0.5\n")
    assert run(["restore", "a", "b", "-o", "c", "--config", "./careful"]) == 2
    assert "Did you mean strength?" in capsys.readouterr().err


def test_a_name_that_is_neither_preset_nor_file_lists_the_presets(capsys):
    assert run(["restore", "a", "b", "-o", "c", "--config", "balancd"]) == 1
    told = capsys.readouterr().err
    assert "There is no file balancd, and the presets are careful, balanced. Did you mean balanced?" in told

"""`deltaguard verify` of anything: 3 where something is wrong, 1 where nothing can be said."""

import json
import shutil

import pytest

from deltaguard.cli.app import run
from pairs import pair

REPORT = "deltaguard_report.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A restored checkpoint and a restored adapter that tests must not write to."""
    pair_, root = pair(), tmp_path_factory.mktemp("made")
    for form in ("checkpoint", "adapter"):
        tokens = ["restore", pair_.aligned, pair_.finetuned, "-o", root / form, "--store", pair_.store]
        assert run([*map(str, tokens), "--strength", "0.5", "--output-format", form]) == 0
    return root


@pytest.fixture(params=["checkpoint", "adapter"])
def out(made, request, tmp_path, capsys):
    shutil.copytree(made / request.param, tmp_path / "out")
    capsys.readouterr()
    return tmp_path / "out"


def verified(folder, capsys, code):
    assert run(["verify", str(folder)]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.count("Error:") == (code != 0)
    return " ".join(captured.err.split())


def relisted(out, change):
    """Change the files that the report lists."""
    report = json.loads((out / REPORT).read_text())
    report["files"] = change(report["files"])
    (out / REPORT).write_text(json.dumps(report))


def test_an_output_as_it_was_written(out, capsys):
    assert verified(out, capsys, 0) == ""


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"files": 3}', "[" * 100_000, "\xff", '{"schema_version": 99}']
)
def test_a_damaged_report_says_nothing_about_the_folder(out, content, capsys):
    (out / REPORT).write_bytes(content.encode("latin-1"))
    assert REPORT in verified(out, capsys, 1)


def test_a_folder_without_a_report_and_no_folder_at_all(tmp_path, capsys):
    assert "holds no" in verified(tmp_path, capsys, 1)
    assert "There is no folder" in verified(tmp_path / "nowhere", capsys, 1)


@pytest.mark.parametrize("name", ["../secret", "link/secret", "SECRET", "a\0b", "", "x" * 5000, "../" * 900])
def test_names_that_lead_out_are_wrong_and_not_read(out, name, tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (out / "link").symlink_to(tmp_path)
    row = {"name": name.replace("SECRET", str(secret)), "bytes": 6, "sha256": "0" * 64}
    relisted(out, lambda files: [*files, row])
    assert "it is not read" in verified(out, capsys, 3)


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md"])
def test_a_file_that_became_a_link_out_is_wrong(out, name, tmp_path, capsys):
    (out / name).rename(tmp_path / "moved")
    (out / name).symlink_to(tmp_path / "moved")
    assert f"{name} is a link out of the folder, to {tmp_path / 'moved'}" in verified(out, capsys, 3)
    (out / name).unlink()
    (tmp_path / "moved").rename(out / "moved")
    (out / name).symlink_to("moved")
    assert verified(out, capsys, 0) == ""


def test_weights_on_another_disk_are_read_there(out, tmp_path, capsys):
    (weights,) = out.glob("*.safetensors")
    moved = shutil.move(weights, tmp_path / "moved")
    weights.symlink_to(moved)
    assert verified(out, capsys, 0) == ""
    moved.write_bytes(moved.read_bytes()[:-1] + b"x")
    assert "sha256" in verified(out, capsys, 3)


def test_a_snapshot_in_a_hub_cache_is_verified(out, tmp_path, capsys):
    cache = tmp_path / "models--me--mine"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in list(out.iterdir()):
        path.rename(cache / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert verified(out.rename(cache / "snapshots" / "abc"), capsys, 0) == ""


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 100, b"\x08\0\0\0\0\0\0\0{}      "])
def test_weights_that_are_gone_or_garbage_are_wrong(out, content, capsys):
    (weights,) = out.glob("*.safetensors")
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)
    assert weights.name in verified(out, capsys, 3)


def test_a_configuration_that_is_gone_or_garbage_is_wrong(out, capsys):
    name = "adapter_config.json" if (out / "adapter_config.json").exists() else "config.json"
    (out / name).write_text("{")
    assert f"File {name} has 1 bytes" in verified(out, capsys, 3)
    (out / name).unlink()
    assert f"File {name} is in the report and not in the folder" in verified(out, capsys, 3)


def test_of_what_is_no_regular_file_nothing_is_read(out, capsys):
    import os

    (out / "tokenizer.json").unlink()
    os.mkfifo(out / "tokenizer.json")
    assert "tokenizer.json is in the report and not in the folder" in verified(out, capsys, 3)


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/default.jinja"])
def test_a_template_that_came_later_is_wrong(out, name, capsys):
    relisted(out, lambda files: [row for row in files if row["name"] != name])
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{{ messages }}")
    assert f"File {name} is not in the report" in verified(out, capsys, 3)

"""The verbs, as programs and people call them."""

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from deltaguard.cli.app import run
from deltaguard.reports.records.restore import REPORT_NAME
from folders import write
from pairs import changed, pair
from variants import variant


def json_of(capsys, *arguments, code=0):
    assert run([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_restore_verify_and_diff_speak_json(tmp_path, capsys):
    made, out = pair(), tmp_path / "out"
    report = json_of(
        capsys, "restore", made.aligned, made.finetuned, "-o", out, "--store", made.store, "--strength", 0.5
    )
    assert report == json.loads((out / REPORT_NAME).read_text())
    expected = {"method": "kfac", "strength": 0.5, "other_params": "aligned"}
    assert report["options"].items() >= expected.items()
    assert "max_safety_kl" not in report["options"]
    assert json_of(capsys, "verify", out)["problems"] == []
    headers = json_of(capsys, "diff", made.aligned, made.finetuned)
    assert headers["compatible"] is True
    assert headers["tensors"] == []
    deep = json_of(capsys, "diff", made.aligned, made.finetuned, "--deep")
    assert len(deep["tensors"]) == len(report["layers"]) + len(report["others"])
    assert all(row["relative_norm"] > 0 for row in deep["tensors"])


def test_a_pair_that_cannot_be_restored_is_told_with_the_reason(tmp_path, capsys):
    made = pair()
    lacking = changed(made.finetuned, tmp_path / "lacking", lambda all_: all_.popitem())
    assert run(["diff", str(made.aligned), str(lacking)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"The pair cannot be restored: .* not in the fine-tuned one\.", told)
    obstacle = json_of(capsys, "diff", made.aligned, lacking)["obstacle"]
    assert "not in the fine-tuned one" in obstacle
    assert "deltaguard diff" not in obstacle


@pytest.mark.parametrize(
    ("tokenizer", "told", "code"),
    [
        ("{", "The pair cannot be restored: ", 1),
        ("{}", "The pair can be restored, with --config-from aligned.", 0),
    ],
)
def test_a_pair_with_a_tokenizer_that_cannot_be_read_is_told_as_a_restore_takes_it(
    tmp_path, capsys, tokenizer, told, code
):
    made, unread = pair(), tmp_path / "unread"
    shutil.copytree(made.finetuned, unread)
    (unread / "tokenizer.json").write_text(tokenizer)
    assert run(["diff", str(made.aligned), str(unread)]) == 0
    assert told in " ".join(capsys.readouterr().out.split())
    by = ["--store", str(made.store), "--config-from", "aligned", "--strength", "0.5"]
    assert run(["restore", str(made.aligned), str(unread), "-o", str(tmp_path / "out"), *by]) == code


def test_experts_of_an_unknown_form_are_what_a_diff_names(tmp_path, capsys):
    strange = {"model.layers.0.mlp.experts.0.strange.weight": torch.ones(2, 2)}
    model = changed(pair().aligned, tmp_path / "model", lambda tensors: tensors.update(strange))
    assert run(["diff", str(model), str(model)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "The pair cannot be restored: " in told
    assert "experts.0.strange.weight" in told
    assert "Known are `experts.N.gate_proj.weight`" in told


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    made, out = pair(), tmp_path / "out"
    plan = json_of(
        capsys, "restore", made.aligned, made.finetuned, "-o", out, "--store", made.store, "--dry-run"
    )
    assert plan["restored"] == 14
    assert plan["write_bytes"] > 0
    assert not out.exists()


def test_text_for_people_names_the_result(tmp_path, capsys):
    made, out = pair(), tmp_path / "out"
    options = ["--store", str(made.store), "--strength", "0.5"]
    assert run(["restore", str(made.aligned), str(made.finetuned), "-o", str(out), *options]) == 0
    assert "kfac (strength 0.5" in " ".join(capsys.readouterr().out.split())
    assert run(["verify", str(out)]) == 0
    assert "0 problems" in capsys.readouterr().out
    assert run(["diff", str(made.aligned), str(made.finetuned)]) == 0
    assert "can be restored" in capsys.readouterr().out


def test_weights_that_were_not_compared_are_no_weights_that_do_not_differ(tmp_path, capsys):
    made = pair()
    kind = "model.layers.*.self_attn.q_proj.weight"

    def line():
        rows = capsys.readouterr().out.splitlines()
        return next(row.split() for row in rows if row.split()[:1] == [kind])

    assert run(["diff", str(made.aligned), str(made.finetuned)]) == 0
    assert line() == [kind, "2", "–", "–"]
    assert run(["diff", str(made.aligned), str(made.aligned), "--deep"]) == 0
    assert line() == [kind, "2", "0", "–"]


def test_weights_are_compared_piece_by_piece(tmp_path, monkeypatch, capsys):
    made = pair()
    whole = json_of(capsys, "diff", made.aligned, made.finetuned, "--deep")
    monkeypatch.setattr("deltaguard.restoration.diff._ENTRIES", 100)
    parts = json_of(capsys, "diff", made.aligned, made.finetuned, "--deep")
    assert parts["tensors"]
    for one, other in zip(whole["tensors"], parts["tensors"], strict=True):
        assert other.pop("relative_norm") == pytest.approx(one.pop("relative_norm"), rel=1e-12)
        assert other == one


def test_verify_finds_a_flipped_byte_and_exits_with_3(tmp_path, capsys):
    made, out = pair(), tmp_path / "out"
    call = ["restore", made.aligned, made.finetuned, "-o", out, "--store", made.store]
    assert run([*map(str, call), "--max-safety-kl", "6e-4"]) == 0
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 0xFF
    weights.write_bytes(data)
    capsys.readouterr()
    assert run(["verify", str(out)]) == 3
    assert "sha256" in capsys.readouterr().err


def test_another_configuration_is_refused_shown_and_chosen(tmp_path, capsys):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned", rms_norm_eps=0.25)
    expected = "`rms_norm_eps`: 1e-06 in the aligned model, 0.25 in the fine-tuned one"
    call = [str(made.aligned), str(tuned), "-o", str(tmp_path / "out"), "--store", str(made.store)]
    for arguments in (["restore", *call], ["restore", *call, "--dry-run"], ["sweep", *call]):
        assert run(arguments) == 1
        told = capsys.readouterr().err
        assert expected in told
        assert "--config-from aligned" in told
    assert json_of(capsys, "diff", made.aligned, tuned)["settings"] == [expected]
    assert run(["diff", str(made.aligned), str(tuned)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert expected in told
    assert "can be restored, with --config-from" in told
    options = tmp_path / "options.yaml"
    options.write_text("config-from: aligned\nstrength: 0.5\n")
    report = json_of(capsys, "restore", *call, "--config", options)
    assert report["options"]["config_from"] == "aligned"
    swept = json_of(
        capsys, "sweep", *call[:2], "-o", tmp_path / "sweep", *call[4:], "--config-from", "aligned"
    )
    assert swept["config_from"] == "aligned"


def test_a_config_file_sets_options_and_the_command_line_wins(tmp_path, capsys):
    made = pair()
    options = tmp_path / "options.yaml"
    options.write_text("method: greedy\nstrength: 0.5\ncompensation: none\n")
    call = ["restore", made.aligned, made.finetuned, "--store", made.whole_store, "--config", options]
    from_file = json_of(capsys, *call, "-o", tmp_path / "one")["options"]
    assert (from_file["strength"], from_file["compensation"]) == (0.5, "none")
    mixed = json_of(capsys, *call, "-o", tmp_path / "two", "--strength", 0.25)["options"]
    assert (mixed["strength"], mixed["compensation"]) == (0.25, "none")


def test_calibrate_and_info(tmp_path, capsys):
    made = pair()
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"How can I harm person {i}?", "response": "I cannot help."} for i in range(4)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    call = ["calibrate", made.aligned, "--prompts", prompts, "--device", "cpu"]
    made_store = json_of(capsys, *call, "-o", tmp_path / "store")
    # One of them is held out, and a look-alike stands beside each other one.
    assert (made_store["conversations"], made_store["look_alikes"], made_store["rank"]) == (6, 3, "auto")
    whole = json_of(capsys, *call, "-o", tmp_path / "whole", "--rank", "full")
    assert (whole["rank"], whole["rank_share"]) == ("full", 1)
    assert whole["response_tokens"] == made_store["response_tokens"] > 0
    found = json_of(capsys, "info")
    assert found["versions"]["torch"] == version("torch")
    assert "cpu" in found["device"]


def test_overwrite_replaces_a_checkpoint_and_leaves_other_files(tmp_path, capsys):
    made, out = pair(), tmp_path / "out"
    call = ["restore", str(made.aligned), str(made.finetuned), "-o", str(out), "--store", str(made.store)]
    assert run([*call, "--max-safety-kl", "6e-4"]) == 0
    first = (out / "model.safetensors").read_bytes()
    (out / "notes.txt").write_text("mine")
    assert run([*call, "--strength", "0.9", "--overwrite"]) == 0
    assert (out / "model.safetensors").read_bytes() != first
    assert (out / "notes.txt").read_text() == "mine"
    assert run(["verify", str(out)]) == 0
    capsys.readouterr()


def test_the_dial_is_an_option_and_its_numbers_are_shown(tmp_path, capsys):
    made, out = pair(), tmp_path / "out"
    call = ["restore", made.aligned, made.finetuned, "--store", made.store, "--device", "cpu"]
    report = json_of(capsys, *call, "-o", out, "--max-safety-kl", 0.002)
    assert report["options"]["max_safety_kl"] == report["dial"]["limit"] == 0.002
    assert 0 < report["dial"]["restored_kl"] <= 0.002 < report["dial"]["finetuned_kl"]
    assert run([*map(str, call), "-o", str(tmp_path / "whole"), "--max-safety-kl", "9"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "kept whole" in printed
    assert "the whole model is within the safety KL allowed" in printed


@pytest.mark.parametrize(
    "arguments", [["--help"], ["restore", "--help"], ["calibrate", "--help"], ["--version"]]
)
def test_help_and_version(arguments, capsys):
    assert run(arguments) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["Python", "a GPU", "torch"],
)
def test_too_little_memory_is_no_bug(error, monkeypatch, capsys):
    def lacks(*_, **__):
        raise error

    monkeypatch.setattr("deltaguard.restoration.diff.diff", lacks)
    assert run(["diff", "one", "other"]) == 1
    said = capsys.readouterr().err
    assert "too little memory" in said
    assert str(error) in said
    assert "bug" not in said


def test_importing_the_package_does_not_import_torch():
    code = "import deltaguard, deltaguard.cli, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], ["restore", "--help"]])
def test_help_needs_no_torch_and_no_pictures(arguments):
    code = (
        "import sys; from deltaguard.cli.app import run; code = run(sys.argv[1:]); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'altair', 'scipy')))"
    )
    command = [sys.executable, "-c", code, *arguments]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_the_installed_command_exits_with_the_right_code():
    command = [sys.executable, "-m", "deltaguard", "restore", "only-one"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 2


def test_a_diff_of_many_kinds_shows_some_and_says_how_many_more(tmp_path, capsys):
    for name, letter in (("one", "a"), ("other", "b")):
        tensors = {f"{letter}{i}": torch.zeros(0) for i in range(300)}
        write(tmp_path / name, {"model.safetensors": tensors})
    assert run(["diff", str(tmp_path / "one"), str(tmp_path / "other")]) == 0
    told = capsys.readouterr().out
    assert "and 400 more kinds (all with --json)" in told
    assert "and 570 more tensors (all with --json)" in told

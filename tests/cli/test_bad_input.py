"""Bad input: one message, the right exit code, nothing that looks like a checkpoint, inputs untouched."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import save_file

import models
from deltaguard.cli.app import run
from pairs import changed, pair, weights

SINGLE = "model.safetensors"


@pytest.fixture
def made():
    return pair("llama")


@pytest.fixture
def sharded():
    return pair("llama", dtype=torch.bfloat16, max_shard_size="30KB")


@pytest.fixture
def attempt(tmp_path, capsys):
    """Runs `restore` and returns its message, having checked what holds for every failure."""

    def restore(aligned, finetuned, *options, store=None, out=None, code=1):
        target = out or tmp_path / "restored"
        inputs = [path for folder in (aligned, finetuned) for path in folder.rglob("*") if path.is_file()]
        before = {path: path.read_bytes() for path in inputs}
        arguments = ["restore", str(aligned), str(finetuned), "-o", str(target), *options]
        assert run(arguments + (["--store", str(store)] if store else [])) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.count("Error:") == 1
        assert "Traceback" not in printed.err
        assert {path: path.read_bytes() for path in inputs} == before
        if out is None:
            assert not list(tmp_path.glob("restored/*.safetensors"))
            assert not list(tmp_path.glob("restored/*.json"))
        return printed.err

    return restore


def test_shapes_that_differ_are_all_listed(made, tmp_path, attempt):
    other = models.save(models.tiny_model("llama", intermediate_size=40), tmp_path / "other")
    message = attempt(made.aligned, other, store=made.store)
    assert "model.layers.0.mlp.down_proj.weight" in message
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "(48, 32)" in message
    assert "(40, 32)" in message
    assert "deltaguard diff" in message


def test_another_architecture(made, tmp_path, attempt):
    other = models.save(models.tiny_model("gpt2"), tmp_path / "other")
    message = attempt(made.aligned, other, store=made.store)
    assert "(llama)" in message
    assert "(gpt2)" in message


def test_a_store_of_another_aligned_model_names_both_fingerprints(made, tmp_path, attempt):
    other = models.save(models.tiny_model("llama", seed=7), tmp_path / "other")
    message = attempt(other, made.finetuned, store=made.store)
    from deltaguard.models.checkpoint import Checkpoint

    assert Checkpoint.open(made.aligned).fingerprint() in message
    assert Checkpoint.open(other).fingerprint() in message


def test_a_folder_that_is_no_store(made, attempt):
    assert "curvature.json" in attempt(made.aligned, made.finetuned, store=made.aligned)


def test_an_index_that_names_an_absent_file(sharded, tmp_path, attempt):
    broken = tmp_path / "broken"
    shutil.copytree(sharded.finetuned, broken)
    gone = sorted(broken.glob("*.safetensors"))[1]
    gone.unlink()
    assert gone.name in attempt(sharded.aligned, broken, store=sharded.store)


def test_a_truncated_shard_is_named_with_both_sizes(sharded, tmp_path, attempt):
    broken = tmp_path / "broken"
    shutil.copytree(sharded.finetuned, broken)
    shard = min(broken.glob("*.safetensors"))
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 100)
    message = attempt(sharded.aligned, broken, store=sharded.store)
    assert shard.name in message
    assert "truncated" in message
    assert f"{size:,}" in message
    assert f"{size - 100:,}" in message


def test_a_corrupt_shard(made, tmp_path, attempt):
    broken = tmp_path / "broken"
    shutil.copytree(made.finetuned, broken)
    (broken / SINGLE).write_bytes(b"not a safetensors file" * 10)
    assert "not a safetensors file" in attempt(made.aligned, broken, store=made.store)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "greedy"],
        ["--method", "kfac", "--strength", "0.5"],
        ["--method", "kfac", "--max-safety-kl", "0.001"],
        ["--method", "interpolate", "--strength", "0.5"],
    ],
)
def test_values_that_are_not_finite_name_the_tensor(made, tmp_path, attempt, value, options):
    name = "model.layers.1.mlp.up_proj.weight"
    broken = changed(made.finetuned, tmp_path / "broken", lambda tensors: tensors[name][3].fill_(value))
    message = attempt(made.aligned, broken, *options, store=made.whole_store)
    assert name in message
    assert "32 entries" in message


@pytest.mark.parametrize(
    "options", [["--max-safety-kl", "6e-4"], ["--strength", "0.5"], ["--method", "greedy"]]
)
def test_identical_models(made, tmp_path, attempt, options):
    same = tmp_path / "same"
    shutil.copytree(made.aligned, same)
    assert "every delta is zero" in attempt(made.aligned, same, *options, store=made.whole_store)
    assert not (tmp_path / "restored").exists()


@pytest.mark.parametrize("method", ["kfac", "greedy"])
def test_options_that_change_nothing(made, attempt, method):
    options = ["--method", method, "--strength", "1", "--other-params", "finetuned"]
    message = attempt(made.aligned, made.finetuned, *options, store=made.whole_store)
    assert "changes no tensor" in message


def test_a_limit_that_other_parameters_exceed(made, attempt):
    options = ["--max-safety-kl", "1e-7", "--other-params", "finetuned"]
    message = attempt(made.aligned, made.finetuned, *options, store=made.store)
    assert "above 1e-07" in message
    assert "--other-params aligned" in message


@pytest.mark.parametrize("method", ["greedy", "published"])
def test_a_store_that_does_not_keep_enough_for_the_method(made, attempt, method):
    options = ["--method", method, "--strength", "0.5"]
    message = attempt(made.aligned, made.finetuned, *options, store=made.store)
    assert "--rank full" in message
    assert str(made.store) in message


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99", "cpu:x", "cuda:99999999999999999999", ""])
@pytest.mark.parametrize("options", [[], ["--max-safety-kl", "6e-4"]])
def test_a_device_that_is_not_there_or_holds_no_data(made, attempt, device, options):
    message = attempt(made.aligned, made.finetuned, f"--device={device}", *options, store=made.store)
    assert f"'{device}' cannot be used (try `cpu`, or `auto`)" in message


def test_quantised_checkpoints(made, tmp_path, attempt):
    quantised = tmp_path / "quantised"
    shutil.copytree(made.finetuned, quantised)
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    message = attempt(made.aligned, quantised, store=made.store)
    assert "quantised" in message
    assert "gptq" in message


def test_pickled_weights_are_refused_with_the_command_that_converts_them(made, tmp_path, attempt):
    pickled = tmp_path / "pickled"
    shutil.copytree(made.finetuned, pickled)
    torch.save(weights(pickled), pickled / "pytorch_model.bin")
    (pickled / SINGLE).unlink()
    message = attempt(made.aligned, pickled, store=made.store)
    assert "save_pretrained" in message


def test_experts_of_an_unknown_form(made, tmp_path, attempt):
    folders = [shutil.copytree(made.aligned, tmp_path / name) for name in ("experts", "tuned")]
    for folder in folders:
        tensors = weights(folder)
        tensors["model.layers.0.mlp.experts.0.fc1.weight"] = torch.zeros(2, 2)
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    message = attempt(*folders, "--method", "interpolate", "--strength", "0.5")
    assert "mixture of experts in a form" in message
    assert "experts.0.fc1.weight" in message


def test_an_output_folder_that_is_not_empty(made, tmp_path, attempt):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("years of work")
    message = attempt(made.aligned, made.finetuned, store=made.store, out=occupied)
    assert "--overwrite" in message
    assert [path.name for path in occupied.iterdir()] == ["thesis.txt"]


def test_an_output_folder_that_cannot_be_made(made, tmp_path, attempt):
    (tmp_path / "file").write_text("")
    message = attempt(made.aligned, made.finetuned, store=made.store, out=tmp_path / "file" / "out")
    assert "is a file, not a folder" in message


def test_a_disk_that_is_too_small(made, attempt, monkeypatch):
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    assert "1,000 are free" in attempt(made.aligned, made.finetuned, store=made.store)


def test_a_model_that_is_nowhere(made, tmp_path, attempt):
    assert "There is no folder" in attempt(
        made.aligned, tmp_path / "no" / "such" / "folder", store=made.store
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "gredy"], 'Did you mean "greedy"?'),
        (["--method", "greedy", "--compensation", "join"], 'Did you mean "joint"?'),
        (["--other-params", "alined"], 'Did you mean "aligned"?'),
        (["--config-from", "finetune"], 'Did you mean "finetuned"?'),
        (["--strenght", "1"], "Did you mean strength?"),
        (["--strength", "2"], "strength is 2.0"),
        (["--method", "interpolate"], "strength has no default"),
        (["--method", "published"], "strength has no default"),
        (["--max-safety-kl", "0.1", "--strength", "0.5"], "give one"),
        (["--max-safety-kl", "0.1", "--method", "greedy"], "max_safety_kl is the dial of methods kfac"),
        (["--max-safety-kl", "0"], "greater than or equal to 0.000000001"),
        (["--max-safety-kl", "1e-40"], "greater than or equal to 0.000000001"),
        (["--max-safety-kl", "nan"], "should be a finite number"),
        (["--compensation", "none"], "an option of method greedy"),
        (["--models", "x"], "models must map names to values; it is 'x'"),
        (["--method-options", "x"], "method_options must map names to values; it is 'x'"),
        (["--flag"], "--flag requires an argument"),
        (["--budget"], "--budget requires an argument"),
    ],
)
def test_wrong_options_are_usage_errors_with_a_suggestion(made, attempt, options, said):
    assert said in " ".join(attempt(made.aligned, made.finetuned, *options, store=made.store, code=2).split())


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["gc", "--data", "d", "--days", "0.5"], "'0.5' is no whole number"),
        (["gc", "--data", "d", "--days", "-1"], "Must be >= 0"),
        (["calibrate", "m", "-o", "s", "--num-samples", "12.7"], "'12.7' is no whole number"),
        (["restore", "a", "b", "-o", "o", "--refine", "1.5"], "'1.5' is no whole number"),
        (["check", "a", "b", "--answer-tokens", "64.5"], "'64.5' is no whole number"),
        (["demo", "--seed", "-1"], "Must be >= 0"),
        (["bench", "-o", "o", "--first-seed", "4294967296"], "Must be < 4294967296"),
        (["serve", "--data", "d", "--port", "80000"], "Must be <= 65535"),
        (["serve", "--data", "d", "--port", "0"], "Must be >= 1"),
        (["serve", "--data", "", "--model", "a=m"], "a path is empty"),
        (["restore", "a", "b", "-o", ""], "a path is empty"),
    ],
)
def test_numbers_and_paths_are_taken_as_they_stand_or_refused(command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(command) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_one_name_for_two_models_of_a_service(tmp_path, capsys):
    pytest.importorskip("dbos")
    assert run(["serve", "--data", str(tmp_path / "data"), "--model", "a=one", "--model", "a=other"]) == 2
    assert "one name twice" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_a_service_says_where_it_is_in_one_document(tmp_path, capsys, monkeypatch):
    pytest.importorskip("dbos")

    def served(data, settings, *, host, port, on_open):
        on_open("dg-first")

    monkeypatch.setattr("deltaguard.service.server.serve", served)
    command = ["serve", "--data", str(tmp_path), "--model", "tiny=/models/aligned", "--port", "8001"]
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "models": ["tiny"],
        "api": "http://127.0.0.1:8001/v1",
        "page": "http://127.0.0.1:8001",
        "first_key": "dg-first",
    }
    assert run(command) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "dg-first" in told.err


def test_a_config_file_with_an_unknown_option(made, tmp_path, attempt):
    (tmp_path / "options.yaml").write_text("method: greedy\nstrenght: 0.5\n")
    message = attempt(
        made.aligned, made.finetuned, "--config", str(tmp_path / "options.yaml"), store=made.store, code=2
    )
    assert "strenght" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models:", "models must map names to values; it is None"),
        ("method_options: 5", "method_options must map names to values; it is 5"),
        ("method: [kfac]", "there is no method ['kfac']"),
        ("method: {kfac: 1}", "there is no method {'kfac': 1}"),
    ],
)
def test_a_config_file_with_values_of_another_kind(made, tmp_path, attempt, text, said):
    (tmp_path / "options.yaml").write_text(text)
    options = ["--config", str(tmp_path / "options.yaml")]
    assert said in " ".join(attempt(made.aligned, made.finetuned, *options, store=made.store, code=2).split())


def test_a_limit_that_rows_of_the_finetuned_model_exceed_is_not_met_by_other_parameters(
    made, tmp_path, attempt
):
    """They come from the aligned model already."""
    wider = models.tiny_model("llama", vocab_size=models.VOCABULARY + 16)
    aligned = models.tiny_model("llama")
    own = wider.state_dict()
    for name, tensor in aligned.state_dict().items():
        own[name][: len(tensor)].copy_(tensor)
    tuned = models.save(models.perturbed(wider, 0.01), tmp_path / "tuned")
    message = attempt(made.aligned, tuned, "--max-safety-kl", "1e-9", store=made.store)
    assert "With no delta left in any layer the safety KL is still" in message
    assert "rows of the vocabulary, that the fine-tuned model alone has" in message
    assert "--other-params" not in message

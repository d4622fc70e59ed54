"""`verify` of an adapter: whether it fits its base model, and what could not be looked at."""

import hashlib
import json
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from deltaguard import RestoreConfig, restore, verify
from deltaguard.cli.app import run
from pairs import pair


@pytest.fixture(scope="module", params=models.EITHER_ORDER)
def written(request, tmp_path_factory):
    """An adapter, and its base model in a folder that may be moved."""
    made, folder = pair(request.param), tmp_path_factory.mktemp("written")
    base = copytree(made.aligned, folder / "base")
    config = RestoreConfig(method="interpolate", strength=0.5, output_format="adapter", adapter_rank=3)
    restore(base, made.finetuned, folder / "adapter", config=config)
    return folder


@pytest.fixture
def adapter(written, tmp_path):
    """A copy to spoil."""
    return copytree(written / "adapter", tmp_path / "adapter")


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    seal(folder)


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    seal(folder)


def seal(folder):
    """Bring the hashes of the report in line with the files."""
    path = folder / "deltaguard_report.json"
    report = json.loads(path.read_text())
    for row in report["files"]:
        content = (folder / row["name"]).read_bytes()
        row |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(report))


def first(tensors, *, square):
    """A layer whose matrices are, or are not, of one size."""
    names = [name.removesuffix(".lora_A.weight") for name in sorted(tensors) if ".lora_A." in name]
    sizes = {
        n: (tensors[f"{n}.lora_A.weight"].shape[1], tensors[f"{n}.lora_B.weight"].shape[0]) for n in names
    }
    return next(name for name, (inputs, outputs) in sizes.items() if (inputs == outputs) == square)


def turned(tensors):
    name = first(tensors, square=False)
    a, b = (tensors[f"{name}.lora_{letter}.weight"] for letter in "AB")
    tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = b.T.contiguous(), a.T.contiguous()


def halved(tensors):
    del tensors[f"{first(tensors, square=True)}.lora_B.weight"]


def thinned(tensors):
    name = first(tensors, square=True)
    tensors[f"{name}.lora_A.weight"] = tensors[f"{name}.lora_A.weight"][:2].contiguous()
    tensors[f"{name}.lora_B.weight"] = tensors[f"{name}.lora_B.weight"][:, :2].contiguous()


def renamed(tensors):
    name = first(tensors, square=True)
    for letter in "AB":
        tensors[f"base_model.model.other.lora_{letter}.weight"] = tensors.pop(f"{name}.lora_{letter}.weight")


def whole_numbers(tensors):
    name = f"{first(tensors, square=True)}.lora_A.weight"
    tensors[name] = tensors[name].to(torch.int8)


def in_eight_bits(tensors):
    name = f"{first(tensors, square=True)}.lora_A.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def without_sense(tensors):
    tensors[f"{first(tensors, square=True)}.lora_A.weight"][0, 0] = float("nan")


SPOILED = {
    turned: "(out, in)",
    halved: "only one of lora_A and lora_B",
    thinned: "ranks (2, 2)",
    renamed: "has no other.weight",
    whole_numbers: "I8",
    in_eight_bits: "F8_E4M3",
    without_sense: "NaN",
}


@pytest.mark.parametrize("base", ["there", "gone", "another"])
@pytest.mark.parametrize(
    ("spoil", "words"), SPOILED.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_an_adapter_that_does_not_fit_is_found(written, adapter, spoil, words, base):
    change_tensors(adapter, spoil)
    with_base(adapter, written, base)
    found = verify(adapter)
    assert any(words in problem for problem in found.problems), found.problems
    assert bool(found.unchecked) == (base != "there")


def with_base(adapter, written, what):
    path = adapter / "deltaguard_report.json"
    report = json.loads(path.read_text())
    if what == "gone":
        report["aligned"]["reference"] = str(written / "nowhere")
    elif what == "another":
        other = models.save(models.tiny_model("llama", seed=7), adapter.parent / "other")
        report["aligned"]["reference"] = str(other)
    path.write_text(json.dumps(report))


@pytest.mark.parametrize("base", ["there", "gone", "another"])
def test_a_sound_adapter_passes_and_what_was_not_checked_is_said(written, adapter, base, capsys):
    with_base(adapter, written, base)
    found = verify(adapter)
    assert (found.passed, found.tensors > 0) == (True, True)
    assert run(["verify", str(adapter)]) == 0
    shown = capsys.readouterr().out
    assert "0 problems" in shown
    assert ("not compared with" in shown) == (base != "there")
    if base == "another":
        assert "fingerprint" in shown


def test_a_rank_that_only_the_configuration_says_is_found(adapter):
    change_config(adapter, r=5, lora_alpha=5)
    assert any("the configuration says 5" in problem for problem in verify(adapter).problems)

"""Many fine-tunes restored by one `Restorer`: byte for byte what separate runs give, whatever came before."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from deltaguard import DeltaguardError, RestoreConfig, Restorer, restore
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME
from deltaguard.restoration import resident
from deltaguard.restoration.safety_kl import SafetyMeter
from deltaguard.restoration.tuning import Tuning
from pairs import pair, save_adapter
from refusing import few_requests, refusing_pair
from variants import refusal, same_files, variant, with_further_tokens

CONFIG = RestoreConfig(max_safety_kl=1e-4, config_from="finetuned", device="cpu")


@pytest.fixture
def loads(monkeypatch):
    """What the aligned model was loaded for."""
    found, original = [], SafetyMeter.open

    def watched(aligned, finetuned, *others, **options):
        found.append(Path(finetuned.reference).name)
        return original(aligned, finetuned, *others, **options)

    monkeypatch.setattr(SafetyMeter, "open", watched)
    return found


def without_times(folder):
    """A report, but for what tells of the run and not of the result."""
    content = json.loads((folder / REPORT_NAME).read_text())
    del content["environment"], content["seconds"], content["peak_memory_bytes"]
    content["files"] = [row for row in content["files"] if row["name"] != CARD_NAME]
    for row in content["layers"]:
        del row["seconds"]
    if content["refinement"]:
        del content["refinement"]["seconds"]
    return content


def check_same(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert same_files(one, other, [name for name in names if name not in (REPORT_NAME, CARD_NAME)])
    assert without_times(one) == without_times(other)


def check_as_alone(made, tuned, folder, config=CONFIG):
    """Restore fine-tunes together and each alone."""
    with Restorer(made.aligned, store=made.store, config=config) as restorer:
        for number, each in enumerate(tuned):
            restorer.restore(each, folder / f"together-{number}")
    for number, each in enumerate(tuned):
        restore(made.aligned, each, folder / f"alone-{number}", store=made.store, config=config)
        check_same(folder / f"together-{number}", folder / f"alone-{number}")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_model_is_loaded_once_and_nothing_of_one_fine_tune_is_left_in_the_next(name, tmp_path, loads):
    made, model = pair(name), models.tiny_model(name)
    other = models.save(models.perturbed(model, 0.02, seed=7), tmp_path / "other")
    check_as_alone(made, [other, made.finetuned, other], tmp_path)
    assert loads == ["other", *["other", "finetuned", "other"]]


def test_a_fine_tune_that_is_run_otherwise_or_has_other_tensors_has_the_model_loaded_anew(tmp_path, loads):
    made = pair()
    other = variant(made.finetuned, tmp_path / "other", rms_norm_eps=1e-5)
    longer = with_further_tokens(tmp_path / "longer", "<|word|>")
    save_adapter(made.aligned, tmp_path / "adapter", ["q_proj", "down_proj"])
    tuned = [made.finetuned, other, longer, tmp_path / "adapter", made.finetuned]
    check_as_alone(made, tuned, tmp_path, CONFIG.model_copy(update={"max_safety_kl": 0.02}))
    # An adapter has the aligned model's files, and so has the last one.
    assert loads[:4] == ["finetuned", "other", "longer", "adapter"]
    assert len(loads) == 4 + len(tuned)


def test_so_it_is_block_by_block(tmp_path, loads):
    made = pair()
    other = models.save(models.perturbed(models.tiny_model("llama"), 0.02, seed=7), tmp_path / "other")
    check_as_alone(made, [other, made.finetuned], tmp_path, CONFIG.model_copy(update={"memory": 0}))
    assert loads == []


def test_so_it_is_when_it_is_written_as_an_adapter(tmp_path):
    made = pair()
    config = CONFIG.model_copy(update={"output_format": "adapter", "config_from": "aligned"})
    other = models.save(models.perturbed(models.tiny_model("llama"), 0.02, seed=7), tmp_path / "other")
    check_as_alone(made, [made.finetuned, other], tmp_path, config)


def test_refining_has_the_memory_to_itself(tmp_path, monkeypatch):
    made, held = pair(), []
    config = CONFIG.model_copy(update={"refine": 1})
    with Restorer(made.aligned, store=made.store, config=config) as restorer:
        original = Tuning.open
        watched = lambda *given: (held.append(restorer._resident._meter), original(*given))[1]
        monkeypatch.setattr(Tuning, "open", watched)
        for name in ("one", "two"):
            restorer.restore(made.finetuned, tmp_path / name)
    check_same(tmp_path / "one", tmp_path / "two")
    assert held == [None, None]


@pytest.fixture
def refusing():
    return refusing_pair()


def test_the_aligned_model_is_asked_and_judged_once(refusing, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    few_requests(monkeypatch)
    made, asked = refusing, []
    original = resident.kept_answers
    monkeypatch.setattr(resident, "kept_answers", lambda *given: (asked.append(1), original(*given))[1])
    config = RestoreConfig(training_data="trusted", device="cpu")
    with Restorer(made.aligned, store=made.store, config=config) as restorer:
        for name in ("one", "two"):
            restorer.restore(made.finetuned, tmp_path / name)
    check_same(tmp_path / "one", tmp_path / "two")
    assert len(asked) == 1


def test_one_that_fails_leaves_the_next_as_it_is(tmp_path, loads):
    made = pair()
    broken = Path(shutil.copytree(made.finetuned, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with Restorer(made.aligned, store=made.store, config=CONFIG) as restorer:
        restorer.restore(made.finetuned, tmp_path / "one")
        assert "NaN" in refusal(restorer.restore, broken, tmp_path / "two")
        restorer.restore(made.finetuned, tmp_path / "three")
    check_same(tmp_path / "one", tmp_path / "three")
    assert not (tmp_path / "two" / "model.safetensors").exists()
    assert loads == ["finetuned"]


def test_an_aligned_model_that_changes_serves_no_further_fine_tune(tmp_path):
    made = pair()
    aligned = variant(made.aligned, tmp_path / "aligned")
    with Restorer(aligned, store=made.store, config=CONFIG) as restorer:
        restorer.restore(made.finetuned, tmp_path / "one")
        (aligned / "config.json").write_text((aligned / "config.json").read_text() + "\n")
        with pytest.raises(DeltaguardError, match="Inputs were changed"):
            restorer.restore(made.finetuned, tmp_path / "two")
    assert not (tmp_path / "two").exists()

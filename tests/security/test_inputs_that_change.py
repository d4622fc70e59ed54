"""Inputs that are replaced or written to while they are read: no output and no report is of two models."""

import os
import shutil

import pytest
import torch

from deltaguard import DeltaguardError, RestoreConfig, calibrate, restore, sweep
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.evaluation.engines.make import EngineConfig
from deltaguard.evaluation.evaluate import evaluate
from deltaguard.reports.records.evaluation import EVALUATION_NAME
from models import perturbed, save, tiny_model
from pairs import CONVERSATIONS, pair, save_adapter
from suites import suite_file, two_models

SHARDS = {"dtype": torch.bfloat16, "max_shard_size": "30KB"}


@pytest.fixture
def sharded():
    return pair("llama", **SHARDS)


def when(stage, number, action):
    """A listener that acts once, when a stage has got so far."""
    seen = []

    def listen(event):
        if event.stage == stage and event.done >= number and not seen:
            seen.append(event)
            action()

    return listen


def copies(made, folder):
    """Copies of a pair that a test may spoil."""
    for name in ("aligned", "finetuned"):
        shutil.copytree(getattr(made, name), folder / name)
    return folder / "aligned", folder / "finetuned"


def replace_all(folder, source):
    """Put the weight files of another model in the place of a folder's, as a copying program does."""
    for shard in source.glob("*.safetensors"):
        new = folder / f"{shard.name}.new"
        shutil.copyfile(shard, new)
        new.replace(folder / shard.name)


@pytest.mark.parametrize("which", ["aligned", "finetuned"])
@pytest.mark.parametrize("options", [{"strength": 0.3}, {"max_safety_kl": 1e-3}])
def test_weights_replaced_by_another_models(sharded, tmp_path, which, options):
    aligned, finetuned = copies(sharded, tmp_path)
    other = save(perturbed(tiny_model("llama", seed=9), 0.2), tmp_path / "other", **SHARDS)
    listen = when("restore", 3, lambda: replace_all(tmp_path / which, other))
    with pytest.raises(DeltaguardError, match="was replaced by another file"):
        restore(
            aligned,
            finetuned,
            tmp_path / "out",
            store=sharded.store,
            config=RestoreConfig(**options),
            progress=listen,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_other_files_written_to(sharded, tmp_path, name):
    aligned, finetuned = copies(sharded, tmp_path)
    listen = when("restore", 3, lambda: os.utime(finetuned / name, (1, 1)))
    with pytest.raises(DeltaguardError, match=f"{name} was written to"):
        restore(
            aligned,
            finetuned,
            tmp_path / "out",
            store=sharded.store,
            config=RestoreConfig(strength=0.3),
            progress=listen,
        )


def test_what_a_changed_input_left_is_not_resumed(sharded, tmp_path):
    aligned, finetuned = copies(sharded, tmp_path)
    listen = when("restore", 3, lambda: os.utime(finetuned / "config.json", (1, 1)))
    config = RestoreConfig(strength=0.3)
    with pytest.raises(DeltaguardError, match="was written to"):
        restore(aligned, finetuned, tmp_path / "out", store=sharded.store, config=config, progress=listen)
    assert not (tmp_path / "out").exists()
    report = restore(aligned, finetuned, tmp_path / "out", store=sharded.store, config=config)
    assert report.layers


@pytest.mark.parametrize("output_format", ["checkpoint", "adapter"])
def test_an_adapter_replaced_by_another(tmp_path, output_format):
    made = pair("llama")
    folder = tmp_path / "adapter"
    save_adapter(made.aligned, folder, ["q_proj", "up_proj"])
    weights = folder / "adapter_model.safetensors"

    def replace():
        (folder / "new").write_bytes(weights.read_bytes())
        (folder / "new").replace(weights)

    with pytest.raises(DeltaguardError, match=r"adapter_model\.safetensors was replaced"):
        restore(
            made.aligned,
            folder,
            tmp_path / "out",
            store=made.store,
            config=RestoreConfig(strength=0.3, output_format=output_format),
            progress=when("restore", 1, replace),
        )


def test_a_sweep_tells_no_numbers_of_two_models(sharded, tmp_path):
    aligned, finetuned = copies(sharded, tmp_path)
    listen = when("measure", 1, lambda: replace_all(finetuned, sharded.aligned))
    with pytest.raises(DeltaguardError, match="was replaced by another file"):
        sweep(aligned, finetuned, tmp_path / "out", store=sharded.store, limits=[1e-3], progress=listen)
    assert not list((tmp_path / "out").glob("*.json"))


def test_a_store_is_of_one_model(sharded, tmp_path):
    aligned, _ = copies(sharded, tmp_path)
    other = save(tiny_model("llama", seed=9), tmp_path / "other", **SHARDS)
    listen = when("accumulate", 1, lambda: replace_all(aligned, other))
    with pytest.raises(DeltaguardError, match="was replaced by another file"):
        calibrate(
            aligned,
            tmp_path / "store",
            conversations=CONVERSATIONS,
            config=CalibrateConfig(device="cpu"),
            progress=listen,
        )
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
def test_no_answer_is_kept_of_a_model_that_changed_since_it_was_described(tmp_path, name, number):
    models = two_models(tmp_path)
    changed, kept = tmp_path / "finetuned" / name, tmp_path / "out" / "answers" / "finetuned"

    def replace():
        (tmp_path / "new").write_bytes(changed.read_bytes())
        (tmp_path / "new").replace(changed)

    with pytest.raises(DeltaguardError, match=f"{name} was replaced by another file"):
        evaluate(
            models,
            tmp_path / "out",
            suite=suite_file(tmp_path),
            engine=EngineConfig(device="cpu", batch_size=2),
            progress=when("finetuned: attack", number, replace),
        )
    answers = [path.read_text().splitlines()[1:] for path in kept.glob("attack.jsonl")]
    assert sum(map(len, answers)) == number
    assert not (tmp_path / "out" / EVALUATION_NAME).exists()

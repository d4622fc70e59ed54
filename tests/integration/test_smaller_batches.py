"""Where a device has too little memory for a batch, half of it is run, and the results are the same."""

import pytest
import torch

import models
from deltaguard import DeltaguardError, RestoreConfig
from deltaguard.curvature.blocks import CutModel
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.decisions import DecidedBatch, Leanings
from deltaguard.curvature.fitting import Due
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.models.mirror import loadable
from deltaguard.progress import ignore
from deltaguard.restoration.aligned import open_job
from deltaguard.restoration.resident import Resident, _files
from deltaguard.restoration.streamed import StreamedCandidate
from deltaguard.restoration.trial import Trial
from once import made_once
from pairs import ANSWERED, CONVERSATIONS, pair
from plain import relative_error
from stores import require_close

CONFIG = CalibrateConfig(device="cpu", rank="full", batch_size=4)


def scarce(monkeypatch, owner, method, at):
    """Let a method find too little memory at calls of these numbers."""
    real, calls = getattr(owner, method), []

    def call(*given, **named):
        calls.append(1)
        if len(calls) in at:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")
        return real(*given, **named)

    monkeypatch.setattr(owner, method, call)


def expected(name, memory):
    """A model and its store, where there is memory enough."""

    def make(root):
        folder = models.save(models.tiny_model(name), root / "model")
        config = CONFIG.model_copy(update={"memory": memory})
        calibrate(folder, root / "store", conversations=ANSWERED, config=config)

    return made_once(f"enough-memory-{name}-{memory}", make)


# In the midst of what is added to sums, forwards and backwards, once and again in the half of a batch.
@pytest.mark.parametrize("at", [{3}, {3, 9}, {16}, {16, 30}], ids=str)
@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_a_calibration_goes_on_with_half_of_a_batch(name, memory, at, tmp_path, monkeypatch):
    config, folder = CONFIG.model_copy(update={"memory": memory}), expected(name, memory) / "model"
    told = []
    scarce(monkeypatch, Due, "chosen", at)
    calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=config, progress=told.append)
    said = [event.detail for event in told if event.stage == "memory"]
    assert said[0] == "too little for 4 conversations at once: from now on 2"
    assert len(said) == len(at)
    require_close(tmp_path / "store", expected(name, memory) / "store")


@pytest.mark.parametrize(("memory", "at"), [(None, {1}), (0, {1}), (0, {2, 4})], ids=str)
def test_the_gradient_of_refusing_is_taken_with_half_of_a_batch(memory, at, tmp_path, monkeypatch):
    config, folder = CONFIG.model_copy(update={"memory": memory}), expected("llama", memory) / "model"
    scarce(monkeypatch, DecidedBatch, "score", at)
    scarce(monkeypatch, Leanings, "add", at)
    told = []
    calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=config, progress=told.append)
    assert [event for event in told if event.stage == "memory"]
    require_close(tmp_path / "store", expected("llama", memory) / "store")


@pytest.mark.parametrize("method", ["run", "inputs", "logits"])
def test_block_by_block_every_step_may_find_too_little(method, tmp_path, monkeypatch):
    config, folder = CONFIG.model_copy(update={"memory": 0}), expected("llama", 0) / "model"
    told = []
    scarce(monkeypatch, CutModel, method, {1})
    calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=config, progress=told.append)
    assert any(event.stage == "memory" for event in told)
    require_close(tmp_path / "store", expected("llama", 0) / "store")


@pytest.mark.parametrize("stage", ["forwards", "backwards"])
def test_what_smaller_batches_left_is_gone_on_with(stage, tmp_path, monkeypatch):
    folder = models.save(models.tiny_model("llama", num_hidden_layers=3), tmp_path / "model")
    config = CONFIG.model_copy(update={"memory": 0})
    calibrate(folder, tmp_path / "expected", conversations=ANSWERED, config=config)

    def stop(event):
        if (event.stage, event.done) == (stage, 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        scarce(patched, CutModel, "run", {1, 4})
        with pytest.raises(KeyboardInterrupt):
            calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=config, progress=stop)
    # With memory again, the rest is run in whole batches.
    again = config.model_copy(update={"resume": True})
    calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=again)
    require_close(tmp_path / "store", tmp_path / "expected")


def test_the_size_of_batches_draws_no_other_tokens(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    stores = []
    for size in (1, 3, 4):
        config = CONFIG.model_copy(update={"batch_size": size})
        out = tmp_path / str(size)
        stores.append(calibrate(folder, out, conversations=ANSWERED, config=config))
    for group in stores[0].groups:
        first, *others = (store.sums(group.name).outputs for store in stores)
        for other in others:
            for x, y in zip(first, other, strict=True):
                assert relative_error(x, y.double()) < 1e-5, group.name


# The dial


def candidate_of(tmp_path, report=ignore):
    made, config = pair(), RestoreConfig(max_safety_kl=1e-3, device="cpu", memory=0)
    job = open_job(made.aligned, made.finetuned, store=made.store, config=config)
    trial = Trial(job, job.plan(config), config, tmp_path)
    with loadable(_files(trial)) as output:
        return StreamedCandidate.open(trial, output, ANSWERED, dtype=torch.float64, report=report)


def measured(candidate):
    """All that a dial and a sweep measure."""
    candidate.at_once = 2
    found = [candidate.whole(ignore)]
    candidate.take_others()
    found += candidate.probes([1.0, 1e3], ignore)
    numbers = [candidate.aligned_likelihood, candidate.likelihood(CONVERSATIONS[:3])]
    return [*numbers, *(each for probe in found for each in (probe.safety_kl, probe.margin))]


@pytest.mark.parametrize(
    ("method", "at"),
    [("run", {1}), ("run", {2, 6}), ("inputs", {1}), ("logits", {1}), ("logits", {3})],
    ids=str,
)
def test_the_dial_goes_on_with_half_of_a_batch(method, at, tmp_path, monkeypatch):
    expected = measured(candidate_of(tmp_path))
    told = []
    scarce(monkeypatch, CutModel, method, at)
    assert measured(candidate_of(tmp_path, told.append)) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert len([event for event in told if event.stage == "memory"]) == len(at)


def test_a_dial_without_memory_for_one_conversation_says_so(tmp_path, monkeypatch):
    scarce(monkeypatch, CutModel, "run", range(1, 100))
    with pytest.raises(DeltaguardError, match=r"Too little memory: .* Tried to allocate 2\.00 GiB"):
        candidate_of(tmp_path)


def test_a_restore_tells_that_batches_are_smaller(tmp_path, monkeypatch):
    made, config = pair(), RestoreConfig(max_safety_kl=1e-3, device="cpu", memory=0)
    job = open_job(made.aligned, made.finetuned, store=made.store, config=config)
    told = []
    scarce(monkeypatch, CutModel, "run", {1})
    Resident().candidate(Trial(job, job.plan(config), config, tmp_path), report=told.append)
    assert any("too little for" in event.detail for event in told)

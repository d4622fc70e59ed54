"""Calibrating block by block: the store of a calibration as a whole, in the memory of one block."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import models
from deltaguard.chat.tokens import Batch
from deltaguard.curvature import blocks, passes
from deltaguard.curvature.blocks import Call, CutModel, UncutError
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.loading import load_model
from once import made_once
from pairs import ANSWERED
from plain import relative_error
from stores import require_close

WHOLE = CalibrateConfig(batch_size=2, rank="full")
BLOCKS = WHOLE.model_copy(update={"memory": 0})


@pytest.mark.parametrize("name", models.DENSE)
def test_the_store_is_that_of_the_whole_model(name, tmp_path):
    folder = models.save(models.tiny_model(name), tmp_path / "model", max_shard_size="40KB")
    stages = set()
    one, other = (
        calibrate(
            folder,
            tmp_path / f"store-{number}",
            conversations=ANSWERED,
            config=config,
            progress=lambda event: stages.add(event.stage),
        )
        for number, config in enumerate((WHOLE, BLOCKS))
    )
    assert {"accumulate", "forwards", "backwards"} <= stages
    require_close(one.folder, other.folder)
    assert not (tmp_path / "store-1.partial").exists()


def test_a_head_of_its_own_is_used_whatever_the_configuration_says(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    whole = load_model(folder, "model")
    cut = CutModel(Checkpoint.open(folder), dtype=torch.float32, device=torch.device("cpu"))
    head = whole.get_output_embeddings().weight
    assert not torch.equal(head, whole.get_input_embeddings().weight)
    assert torch.equal(cut.model.get_output_embeddings().weight, head)


def test_the_same_eigenpairs_are_kept(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    cut = CalibrateConfig(batch_size=2)
    one, other = (
        calibrate(folder, tmp_path / f"store-{memory}", conversations=ANSWERED, config=config)
        for memory, config in ((1, cut), (0, cut.model_copy(update={"memory": 0})))
    )
    assert one.provenance == other.provenance
    for group in one.groups:
        a, b = one.input_spectrum(group.name), other.input_spectrum(group.name)
        torch.testing.assert_close(b.dense(), a.dense(), rtol=2e-3, atol=2e-3 * float(a.values[0]))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_the_conversations_are_answered_block_by_block_too(name, tmp_path):
    folder = models.save(models.tiny_model(name), tmp_path / "model")
    asked = [replace(row, response=None) for row in ANSWERED]
    config, told = WHOLE.model_copy(update={"max_new_tokens": 7, "device": "cpu"}), []
    one, other = (
        calibrate(folder, tmp_path / f"{number}", conversations=asked, config=each, progress=told.append)
        for number, each in enumerate((config, config.model_copy(update={"memory": 0})))
    )
    assert one.provenance.conversations_sha256 == other.provenance.conversations_sha256
    assert one.held_out == other.held_out
    assert any("it answers block by block" in event.detail for event in told)


class Killed(BaseException):
    """Stands for a signal."""


def three_layers(root):
    """A model, and its store from a run that nobody disturbed."""
    folder = models.save(models.tiny_model("llama", num_hidden_layers=3), root / "model")
    calibrate(folder, root / "store", conversations=ANSWERED, config=BLOCKS)


@pytest.mark.parametrize("stage", ["forwards", "backwards"])
@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_killed_run_repeats_one_block_at_most(stage, when, tmp_path):
    made = made_once("three-layers-block-by-block", three_layers)

    def run(kill=None, *, resume=False):
        told = []

        def listen(event):
            told.append((event.stage, event.done))
            if kill == told[-1]:
                raise Killed

        config = BLOCKS.model_copy(update={"resume": resume})
        try:
            calibrate(
                made / "model", tmp_path / "store", conversations=ANSWERED, config=config, progress=listen
            )
        except Killed:
            return told, False
        return told, True

    before, finished = run(kill=(stage, when))
    assert not finished
    after, finished = run(resume=True)
    assert finished
    one, other = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (tmp_path / "store", made / "store")
    )
    assert one == other
    done = [each for each in (*before, *after) if each[0] in ("forwards", "backwards")]
    assert len(done) == len(set(done)) == 6


def test_what_was_left_of_a_block_is_made_again(tmp_path, monkeypatch):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    real = passes.write_store

    def fails(*_, **__):
        raise Killed

    monkeypatch.setattr(passes, "write_store", fails)
    with pytest.raises(Killed):
        calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=BLOCKS)
    monkeypatch.setattr(passes, "write_store", real)
    config = BLOCKS.model_copy(update={"resume": True})
    found = calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=config)
    expected = calibrate(folder, tmp_path / "expected", conversations=ANSWERED, config=BLOCKS)
    for group in expected.groups:
        assert torch.equal(found.sums(group.name).inputs.total, expected.sums(group.name).inputs.total)


@pytest.mark.parametrize("stage", ["forwards", "backwards"])
def test_what_was_left_of_another_judges_run_is_refused_if_it_depends_on_the_judge(tmp_path, stage):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")

    def kill(event):
        if event.stage == stage:
            raise Killed

    def run(judge, *, resume, progress=None):
        config = BLOCKS.model_copy(update={"resume": resume})
        given = {"conversations": ANSWERED, "config": config, "progress": progress, "is_refusal": judge}
        calibrate(folder, tmp_path / "store", **given)

    with pytest.raises(Killed):
        run(lambda _: True, resume=False, progress=kill)
    if stage == "backwards":
        with pytest.raises(DeltaguardError, match=r"another judge.*\n.*Delete the folder"):
            run(lambda answer: "cannot" in answer, resume=True)
        run(lambda _: True, resume=True)
    else:
        run(lambda answer: "cannot" in answer, resume=True)


def test_a_conversation_without_an_answer_says_nothing_of_refusing(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    long = replace(ANSWERED[0], prompt="word " * 600)
    stores = [
        calibrate(folder, tmp_path / f"{number}", conversations=[long, *ANSWERED], config=config)
        for number, config in enumerate((WHOLE, BLOCKS))
    ]
    assert stores[0].provenance.truncated == 1
    for group in stores[0].groups:
        for layer in group.layers:
            one, other = (store.leaning(layer.key) for store in stores)
            assert relative_error(other.up @ other.down, one.up @ one.down) < 1e-4


def test_a_damaged_file_between_the_passes_is_one_message(tmp_path):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")

    def kill(event):
        if event.stage == "forwards" and event.done == 2:
            raise Killed

    with pytest.raises(Killed):
        calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=BLOCKS, progress=kill)
    (tmp_path / "store.partial" / "blocks" / "input-00002-00000.safetensors").write_bytes(b"x")
    config = BLOCKS.model_copy(update={"resume": True})
    with pytest.raises(DeltaguardError, match=r"cannot be used.*\n.*Delete the folder"):
        calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=config)


MEASURE = """
import sys
from deltaguard.chat.conversations import Conversation
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.memory import peak_memory_bytes
peaks = []
rows = [Conversation(f"What is {i}?", response="A number.") for i in range(6)]
for folder in sys.argv[1:]:
    calibrate(folder, f"{folder}-store", conversations=rows, config=CalibrateConfig(memory=0))
    peaks.append(peak_memory_bytes())
print(peaks[-1] - peaks[0])
"""


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    """The weights of the further blocks take 57 MB, and their sums 110 MB: neither may be held at once."""
    wide = {"hidden_size": 256, "intermediate_size": 512}
    folders = [
        models.save(models.tiny_model("llama", num_hidden_layers=count, **wide), tmp_path / f"{count}")
        for count in (2, 26)
    ]
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, folders)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(found.stdout) < 30e6


# What is loaded


def cut_model(tmp_path, name="llama", **changes):
    folder = models.save(models.tiny_model(name, **changes), tmp_path / "model")
    return CutModel(Checkpoint.open(folder), dtype=torch.float32, device=torch.device("cpu"))


def test_one_block_at_a_time_has_weights(tmp_path):
    cut = cut_model(tmp_path)

    def filled():
        return [any(not each.is_meta for each in block.parameters()) for block in cut.blocks]

    assert filled() == [False, False]
    with cut.loaded(1):
        assert filled() == [False, True]
    assert filled() == [False, False]
    assert not any(each.is_meta for each in cut.model.get_input_embeddings().parameters())


def test_nothing_is_read_of_other_blocks(tmp_path, monkeypatch):
    cut = cut_model(tmp_path)
    read = []
    real = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: (read.append(name), real(self, name))[1])
    with cut.loaded(1):
        pass
    assert len(read) == 9
    assert all(name.startswith("model.layers.1.") for name in read)


# Models that cannot be cut


def test_a_model_whose_blocks_share_more_than_hidden_states_is_taken_as_a_whole(tmp_path, monkeypatch):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")
    layer = type(models.tiny_model("llama").model.layers[0])
    real = layer.forward

    def twice(self, hidden_states, *given, **named):
        made = real(self, hidden_states, *given, **named)
        return (made, made)

    monkeypatch.setattr(layer, "forward", twice)
    with pytest.raises(UncutError, match="put out more than hidden states"):
        CutModel(Checkpoint.open(folder), dtype=torch.float32, device=torch.device("cpu"))


def test_something_between_the_blocks_is_noticed(tmp_path):
    cut = cut_model(tmp_path)
    cut.blocks[0].register_forward_hook(lambda _module, _inputs, output: output * 2)
    with pytest.raises(UncutError, match="something happens between its blocks"):
        cut._trial(0.0)


def test_what_depends_on_the_hidden_states_is_noticed():
    one, other = (Call((torch.full((2,), value),), {"mask": None}) for value in (0.0, 1.0))
    blocks._require_alike(one, one)
    with pytest.raises(UncutError, match="depends on what others made"):
        blocks._require_alike(one, other)
    with pytest.raises(UncutError, match="share a set"):
        blocks._require_alike(Call((set(),), {}), Call((set(),), {}))


def test_it_falls_back_and_says_so(tmp_path, monkeypatch):
    folder = models.save(models.tiny_model("llama"), tmp_path / "model")

    def refuse(*_given, **_named):
        raise UncutError("its blocks dance")

    monkeypatch.setattr("deltaguard.curvature.calibrate.CutModel", refuse)
    told = []
    calibrate(folder, tmp_path / "store", conversations=ANSWERED, config=BLOCKS, progress=told.append)
    assert any("block by block: its blocks dance" in event.detail for event in told)
    assert any(event.stage == "accumulate" for event in told)


def test_nothing_but_hidden_states_goes_into_a_block(tmp_path):
    cut = cut_model(tmp_path, "gemma3")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    hidden, calls = cut.inputs(Batch(ids, mask, mask))
    assert hidden.shape == (2, 4, 32)
    assert len(calls) == len(cut.blocks)

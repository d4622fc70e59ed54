"""When layers are kept and read again: no more of them is in memory than the budget and the one at work."""

from collections import Counter

import pytest

from deltaguard import RestoreConfig, restore
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME
from deltaguard.restoration import trial
from deltaguard.restoration.kept import Kept
from deltaguard.restoration.trial import Trial
from pairs import pair, save_adapter


@pytest.fixture
def done(monkeypatch):
    """What is kept, read again and solved, in order."""
    found = []

    def watched(owner, method):
        carried_out = getattr(owner, method)

        def watching(self, first, *others):
            found.append(method)
            return carried_out(self, first, *others)

        monkeypatch.setattr(owner, method, watching)

    watched(Kept, "add")
    watched(Kept, "get")
    watched(Trial, "_solved")
    return found


def test_layers_in_the_scratch_file_are_read_one_at_a_time(tmp_path, done):
    made = pair("llama")
    config = RestoreConfig(strength=0.3, memory=0)
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    assert done == ["add"] * len(report.layers) + ["get", "_solved"] * len(report.layers)


def test_nothing_is_kept_after_the_last_price(tmp_path, done):
    made = pair("llama")

    def restored(**options):
        done.clear()
        config = RestoreConfig(**options)
        return restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)

    def interrupt(event):
        if event.stage == "restore":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(
            made.aligned,
            made.finetuned,
            tmp_path / "out",
            store=made.store,
            config=RestoreConfig(strength=0.3),
            progress=interrupt,
        )
    # The price is remembered.
    report = restored(strength=0.3, resume=True)
    assert done == ["_solved"] * len(report.layers)
    # The whole model is within the limit.
    report = restored(max_safety_kl=100, overwrite=True)
    assert report.dial.whole
    assert done == ["_solved"] * len(report.layers)


def test_tensors_are_read_in_the_order_of_their_shard(tmp_path, monkeypatch):
    """So that no more than the next one waits in memory, whatever becomes of each."""
    made, seen = pair("llama"), []
    read = Checkpoint.read
    monkeypatch.setattr(
        Checkpoint, "read", lambda self, name: (seen.append((self.reference, name)), read(self, name))[1]
    )
    config = RestoreConfig(method="interpolate", strength=0.5)
    restore(made.aligned, made.finetuned, tmp_path / "out", config=config)
    finetuned = Checkpoint.open(made.finetuned)
    assert [name for reference, name in seen if reference == str(made.finetuned)] == list(finetuned.tensors)


def test_of_an_adapted_layer_the_aligned_weights_are_read_once(tmp_path, monkeypatch):
    made, seen, read = pair(), [], Checkpoint.read
    adapter = tmp_path / "adapter"
    save_adapter(made.aligned, adapter, ["q_proj", "down_proj"])
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: seen.append(name) or read(self, name))
    restore(made.aligned, adapter, tmp_path / "out", store=made.store, config=RestoreConfig(strength=0.5))
    assert max(Counter(seen).values()) == 1


@pytest.mark.parametrize("options", [{}, {"output_format": "adapter"}])
def test_the_scratch_file_leaves_room_for_all_of_the_output(tmp_path, monkeypatch, options):
    """Tokenizer and reports, and an adapter's factors, which wait on disk before they are written."""
    made, reserves = pair("llama"), []
    monkeypatch.setattr(trial, "_SPARE_DISK", 0)
    monkeypatch.setattr(Kept, "__post_init__", lambda self: reserves.append(self.reserve))
    monkeypatch.setattr(Kept, "peek", lambda *_: None)
    monkeypatch.setattr(Kept, "add", lambda *_: None)
    out = tmp_path / "out"
    config = RestoreConfig(strength=0.3, **options)
    restore(made.aligned, made.finetuned, out, store=made.store, config=config)
    # Those two are not counted; there is spare room for them.
    files = {path for path in out.rglob("*") if path.name not in (REPORT_NAME, CARD_NAME)}
    assert reserves[0] >= sum(path.stat().st_size for path in files)

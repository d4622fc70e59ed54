"""Local folders and references to the Hub."""

from pathlib import Path

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from deltaguard.models import hub
from deltaguard.models.checkpoint import Checkpoint
from folders import refusal, two_shards


@pytest.mark.parametrize("reference", ["./none", "/no/such/folder", "a/b/c", "~/nothing-here", "x@y@z"])
def test_an_absent_folder_is_named_without_asking_the_hub(monkeypatch, reference):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    assert "There is no folder" in refusal(reference)
    assert "There is no folder" in refusal(Path("organisation/name"))


@pytest.mark.parametrize("reference", ["~nobody-of-this-name/model", "a/" * 5000 + "b", "\0"])
def test_a_name_that_no_folder_can_have_is_one_message(monkeypatch, reference):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    assert refusal(reference)


def test_a_name_too_long_for_folder_and_hub_is_one_message(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "There is neither a local folder nor" in refusal("a" * 5000)


def test_a_file_is_not_a_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert "give the folder" in refusal(path)


def test_a_local_folder_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "organisation").mkdir()
    two_shards(tmp_path / "organisation" / "name@v1")
    assert Checkpoint.open("organisation/name@v1").folder == Path("organisation/name@v1")


def test_a_hub_reference_is_fetched_small_files_first(tmp_path, monkeypatch):
    calls = []

    def fetch(repository, **options):
        calls.append((repository, options["revision"], "*.safetensors" in options["allow_patterns"]))
        return str(two_shards(tmp_path / "snapshot"))

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    checkpoint = Checkpoint.open("organisation/name@refs/pr/1")
    assert calls == [("organisation/name", "refs/pr/1", False), ("organisation/name", "refs/pr/1", True)]
    assert checkpoint.reference == "organisation/name@refs/pr/1"
    assert checkpoint.folder == tmp_path / "snapshot"
    (tmp_path / "snapshot" / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: str(tmp_path / "snapshot"))
    assert "awq" in refusal("organisation/name")


@pytest.mark.parametrize(
    ("kind", "word"),
    [(GatedRepoError, "gated"), (RepositoryNotFoundError, "neither a local folder nor")],
)
def test_refusals_of_the_hub_say_what_to_do(monkeypatch, kind, word):
    def fetch(*args, **options):
        # Its constructor wants the HTTP library's response, which differs between versions.
        raise kind.__new__(kind, "no")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    message = refusal("organisation/name")
    assert word in message
    assert "hf auth login" in message


@pytest.mark.parametrize("kind", [LocalEntryNotFoundError, HTTPError, ConnectionResetError, RuntimeError])
def test_no_connection_is_a_known_failure(monkeypatch, kind):
    def fetch(*args, **options):
        raise kind("offline")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert "could not be fetched from the Hub: offline" in refusal("organisation/name@v2")

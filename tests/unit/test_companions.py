"""Which files of a model's folder come along, and links that would bring files of others."""

import pytest
import torch

from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.mirror import adapter_companions, companions
from folders import write

SHARD = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    made = write(tmp_path / "model", {SHARD: {"a.weight": torch.ones(2, 2)}})
    (made / "LICENSE").write_text("free")
    return made


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret" / "passwords"
    path.parent.mkdir()
    path.write_text("root:x:0")
    return path


def named(paths):
    return [str(path) for path in paths]


@pytest.mark.parametrize("listing", [companions, adapter_companions])
def test_links_that_lead_out_are_all_named_with_their_targets(folder, secret, listing):
    (folder / "NOTICE").symlink_to(secret)
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "tool.jinja").symlink_to(secret)
    (folder / "docs").symlink_to(secret.parent)
    (folder / "merges.txt").symlink_to(folder / "nowhere")
    (folder / "again").symlink_to("again")
    with pytest.raises(DeltaguardError) as error:
        listing(folder)
    message = str(error.value)
    assert f"NOTICE is a link to {secret}" in message
    assert f"chat_templates/tool.jinja is a link to {secret}" in message
    assert f"docs is a link to {secret.parent}" in message
    assert f"merges.txt is a link to {folder / 'nowhere'}, which is not there" in message
    assert "again is a link to again" in message


def test_links_within_the_folder_and_a_folder_that_is_a_link_are_fine(folder, tmp_path):
    (folder / "COPYING").symlink_to("LICENSE")
    (tmp_path / "link").symlink_to(folder)
    for each in (folder, tmp_path / "link"):
        assert named(companions(each)) == ["COPYING", "LICENSE", "config.json"]


def test_links_that_are_left_out_anyway_lead_where_they_like(folder, secret):
    """Weights on another disk, runs of training, a card."""
    elsewhere = (folder / SHARD).rename(secret.parent / SHARD)
    for name in (SHARD, "README.md", "checkpoint-5", "runs", "optimizer.pt", ".git"):
        (folder / name).symlink_to(elsewhere)
    assert named(companions(folder)) == ["LICENSE", "config.json"]
    assert Checkpoint.open(folder).read("a.weight").sum() == 4


def test_a_snapshot_in_a_hub_cache_consists_of_links(folder, secret, tmp_path):
    cache = tmp_path / "hub" / "models--me--mine"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    (snapshot / "chat_templates").mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        blob = path.rename(blobs / f"hash-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    (snapshot / "chat_templates" / "tool.jinja").symlink_to("../../../blobs/hash-of-LICENSE")
    assert named(companions(snapshot)) == ["LICENSE", "chat_templates/tool.jinja", "config.json"]
    (snapshot / "NOTICE").symlink_to(secret)
    with pytest.raises(DeltaguardError, match=f"NOTICE is a link to {secret}"):
        companions(snapshot)
    # Of a folder in a snapshot, the repository's files are no strangers either.
    assert named(companions(snapshot / "chat_templates")) == ["tool.jinja"]
    # What is called like a cache and is none has no blobs.
    cache.rename(tmp_path / "hub" / "mine")
    with pytest.raises(DeltaguardError, match=r"config\.json is a link"):
        companions(tmp_path / "hub" / "mine" / "snapshots" / "abc")


def test_a_snapshot_of_blobs_that_repositories_share(folder, tmp_path):
    """As huggingface_hub lays them out from 2.4 on."""
    hub = tmp_path / "hub"
    repository, shared = hub / "models--me--mine", hub / "blobs" / "ab"
    snapshot = repository / "snapshots" / "abc"
    for made in (snapshot, repository / "blobs", shared):
        made.mkdir(parents=True)
    for path in folder.iterdir():
        kept = path.rename(shared / f"hash-of-{path.name}")
        (repository / "blobs" / path.name).symlink_to(f"../../blobs/ab/{kept.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    # Only where the library says that these blobs are its own.
    with pytest.raises(DeltaguardError, match=r"config\.json is a link"):
        companions(snapshot)
    (hub / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    assert named(companions(snapshot)) == ["LICENSE", "config.json"]
    assert Checkpoint.open(snapshot).read("a.weight").sum() == 4
    # A link that does not go by the repository's own blobs is none of the library's.
    (snapshot / "NOTICE").symlink_to("../../../blobs/ab/hash-of-LICENSE")
    with pytest.raises(DeltaguardError, match="NOTICE is a link"):
        companions(snapshot)


def test_weights_of_other_formats_and_logs_of_training_stay_behind(folder):
    (folder / "wandb" / "run-1").mkdir(parents=True)
    (folder / "text.mlpackage" / "Data").mkdir(parents=True)
    for name in ("rust_model.ot", "model.nemo", "wandb/run-1/log.txt", "text.mlpackage/Data/weight"):
        (folder / name).write_text("x")
    assert named(companions(folder)) == ["LICENSE", "config.json"]

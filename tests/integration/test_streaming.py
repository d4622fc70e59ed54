"""Memory stays bounded on a checkpoint several times the bound, and a killed restore loses nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deltaguard import DeltaguardError, RestoreConfig, restore
from deltaguard.cli.app import run
from deltaguard.models import durable
from deltaguard.reports.records.restore import CARD_NAME
from deltaguard.restoration.dry_run import plan_restore
from pairs import pair
from stores import write_curvature

HIDDEN, WIDE, BLOCKS, BLOCKS_PER_SHARD = 256, 1024, 48, 4
# A store that keeps everything takes 20 MB a block.
BLOCKS_OF_WHOLE_STORE = 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}

MEASURE = """
import json, sys
from deltaguard import restore, RestoreConfig
from deltaguard.memory import peak_memory_bytes
import torch
torch.linalg.cholesky(torch.eye(512)) @ torch.randn(512, 512)  # what the libraries take for themselves
before = peak_memory_bytes()
restore(*sys.argv[1:4], store=sys.argv[4], config=RestoreConfig(method=sys.argv[5], strength=0.3, memory=0))
print(json.dumps(peak_memory_bytes() - before))
"""


def write_checkpoint(folder: Path, seed: int) -> Path:
    """A llama-shaped checkpoint without a model class: 48 blocks in 12 shards of about 10 MB."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    index = {}
    for first in range(0, BLOCKS, BLOCKS_PER_SHARD):
        shard = f"model-{first:05}.safetensors"
        tensors = {
            f"model.layers.{block}.{kind}.weight": torch.randn(shape, generator=generator)
            for block in range(first, first + BLOCKS_PER_SHARD)
            for kind, shape in SHAPES.items()
        }
        save_file(tensors, folder / shard)
        index |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    aligned = write_checkpoint(root / "aligned", 0)
    kinds = {"auto": (BLOCKS, 0.1), "full": (BLOCKS_OF_WHOLE_STORE, 1.0)}
    stores = {
        rank: write_curvature(
            root / rank, aligned, SHAPES, blocks, max_shard_bytes=64 * 10**6, rank=rank, rank_share=share
        )
        for rank, (blocks, share) in kinds.items()
    }
    return aligned, write_checkpoint(root / "finetuned", 1), stores


@pytest.mark.parametrize(("method", "rank"), [("greedy", "full"), ("interpolate", "auto"), ("kfac", "auto")])
def test_memory_stays_under_one_shard_of_each_model_and_one_layer(large, tmp_path, method, rank):
    aligned, finetuned, stores = large
    store = stores[rank]
    shard = max(path.stat().st_size for path in aligned.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in aligned.glob("*.safetensors"))
    config = RestoreConfig(method=method, strength=0.3, memory=0)
    workspace = plan_restore(aligned, finetuned, store=store, config=config).peak_bytes
    limit = 2 * shard + workspace
    assert total > 1.5 * limit
    command = [sys.executable, "-c", MEASURE, aligned, finetuned, tmp_path / "out", store, method]
    taken = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert taken < limit, f"{taken / 1e6:.0f} MB taken, {limit / 1e6:.0f} MB allowed"


KILLED = """
import json, os, signal, sys
from deltaguard import restore, RestoreConfig
stop = int(sys.argv[5])
def progress(event):
    if event.stage == "restore" and event.done >= stop:
        os.kill(os.getpid(), signal.SIGKILL)
config = RestoreConfig(**json.loads(sys.argv[6]))
restore(*sys.argv[1:4], store=sys.argv[4], config=config, progress=progress)
"""


@pytest.mark.parametrize(
    ("options", "other", "stop"),
    [
        ({"method": "greedy", "strength": 0.5}, {"strength": 0.6}, 12),
        ({"method": "kfac", "strength": 0.5}, {"method": "ridge"}, 1),
        ({"max_safety_kl": 1e-3}, {"max_safety_kl": 1e-4}, 12),
    ],
)
def test_a_killed_restore_goes_on_and_gives_the_same_bytes(tmp_path, options, other, stop):
    made = pair("llama", dtype=torch.bfloat16, max_shard_size="30KB")
    arguments = [made.aligned, made.finetuned, tmp_path / "out", made.whole_store]
    command = [sys.executable, "-c", KILLED, *arguments, str(stop), json.dumps(options)]
    killed = subprocess.run(command, check=False, stderr=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".deltaguard-partial"]

    def again(out, **changes):
        config = RestoreConfig(**{**options, **changes})
        return restore(*arguments[:2], out, store=made.whole_store, config=config)

    with pytest.raises(DeltaguardError, match="--resume"):
        again(tmp_path / "out")
    with pytest.raises(DeltaguardError, match="another plan"):
        again(tmp_path / "out", resume=True, **other)
    resumed, whole = again(tmp_path / "out", resume=True), again(tmp_path / "whole")
    assert (resumed.mu, resumed.dial) == (whole.mu, whole.dial)
    assert [row.name for row in resumed.layers] == [row.name for row in whole.layers]
    assert [row.name for row in resumed.files] == [row.name for row in whole.files]
    for row in whole.files:
        # The card says when it was written.
        if row.name != CARD_NAME:
            assert row in resumed.files
            assert (tmp_path / "out" / row.name).read_bytes() == (tmp_path / "whole" / row.name).read_bytes()


def test_a_full_disk_leaves_what_was_finished_and_says_so(tmp_path, monkeypatch, capsys):
    """Writing fails as on a full disk, from the third file on."""
    made = pair("llama", dtype=torch.bfloat16, max_shard_size="30KB")
    write = durable.HashedFile.write

    def full(file, data):
        if "00003-of" in str(file._path):
            with durable.explained(file._shown, file._size):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data)

    call = [
        "restore",
        str(made.aligned),
        str(made.finetuned),
        "-o",
        str(tmp_path / "out"),
        "--store",
        str(made.store),
        "--max-safety-kl",
        "6e-4",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(durable.HashedFile, "write", full)
        assert run(call) == 1
    message = capsys.readouterr().err
    assert "There is no space left" in message
    assert "--resume" in message
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".deltaguard-partial"]
    assert run([*call, "--resume"]) == 0
    assert run(["verify", str(tmp_path / "out")]) == 0

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

from deltaguard.checkpoints import durable
from deltaguard.checkpoints.checkpoint import Checkpoint
from deltaguard.cli.app import run
from deltaguard.curvature.moments import Moment, pack
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import Group, Layer, write_store
from deltaguard.restoration.restore import plan_restore
from pairs import pair

HIDDEN, WIDE, BLOCKS, BLOCKS_PER_SHARD = 256, 1024, 48, 4
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
restore(*sys.argv[1:4], store=sys.argv[4], config=RestoreConfig(method=sys.argv[5], strength=0.3))
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
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def write_curvature(folder: Path, aligned: Path) -> Path:
    groups = [
        Group(
            f"model.layers.{block}.{kind}",
            shape[1],
            100,
            (Layer(f"model.layers.{block}.{kind}.weight", False),),
        )
        for block in range(BLOCKS)
        for kind, shape in SHAPES.items()
    ]
    torch.manual_seed(0)
    moments = {n: torch.randn(100, n).T @ torch.randn(100, n) for n in (HIDDEN, WIDE)}
    moments = {n: m @ m.T for n, m in moments.items()}
    changes = {"aligned": str(aligned), "fingerprint": Checkpoint.open(aligned).fingerprint()}
    provenance = CurvatureStore.from_pretrained(pair().store).provenance.model_copy(update=changes)
    write_store(
        folder,
        provenance,
        groups,
        lambda group: pack(group.name, Moment(moments[group.in_features], 100), dampening=0.01),
    )
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    aligned = write_checkpoint(root / "aligned", 0)
    return aligned, write_checkpoint(root / "finetuned", 1), write_curvature(root / "store", aligned)


@pytest.mark.parametrize("method", ["greedy", "interpolate"])
def test_memory_stays_under_one_shard_of_each_model_and_one_layer(large, tmp_path, method):
    aligned, finetuned, store = large
    shard = max(path.stat().st_size for path in aligned.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in aligned.glob("*.safetensors"))
    workspace = plan_restore(aligned, finetuned, store=store).peak_bytes
    limit = 2 * shard + workspace
    assert total > 1.5 * limit
    command = [sys.executable, "-c", MEASURE, aligned, finetuned, tmp_path / "out", store, method]
    taken = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert taken < limit, f"{taken / 1e6:.0f} MB taken, {limit / 1e6:.0f} MB allowed"


KILLED = """
import os, signal, sys
from deltaguard import restore, RestoreConfig
stop = int(sys.argv[5])
def progress(event):
    if event.done >= stop:
        os.kill(os.getpid(), signal.SIGKILL)
restore(*sys.argv[1:4], store=sys.argv[4], config=RestoreConfig(strength=0.5), progress=progress)
"""


@pytest.mark.parametrize("stop", [1, 12])
def test_a_killed_restore_goes_on_and_gives_the_same_bytes(tmp_path, stop):
    made = pair("llama", dtype=torch.bfloat16, max_shard_size="30KB")
    arguments = [made.aligned, made.finetuned, tmp_path / "out", made.store]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments, str(stop)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".deltaguard-partial"]

    from deltaguard import DeltaguardError, RestoreConfig, restore

    with pytest.raises(DeltaguardError, match="--resume"):
        restore(*arguments[:3], store=made.store, config=RestoreConfig(strength=0.5))
    with pytest.raises(DeltaguardError, match="another plan"):
        restore(*arguments[:3], store=made.store, config=RestoreConfig(strength=0.6, resume=True))
    resumed = restore(*arguments[:3], store=made.store, config=RestoreConfig(strength=0.5, resume=True))
    whole = restore(*arguments[:2], tmp_path / "whole", store=made.store, config=RestoreConfig(strength=0.5))
    assert [row.name for row in resumed.layers] == [row.name for row in whole.layers]
    assert [row.sha256 for row in resumed.files] == [row.sha256 for row in whole.files]
    for row in whole.files:
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

"""A checkpoint copied with the writer: completely, in part, or against a refusal."""

import json
from pathlib import Path

import pytest
import torch

from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.writer import CheckpointWriter
from models import save, tiny_model

INDEX = "model.safetensors.index.json"


def report_of(names) -> str:
    """As much of a report as overwriting reads: the files of an output."""
    return json.dumps({"files": [{"name": str(name), "bytes": 1} for name in names]})


class Stop(Exception):  # noqa: N818
    """Ends a run in the middle."""


def three_shards(folder: Path) -> Checkpoint:
    """A small checkpoint in three shards."""
    return Checkpoint.open(save(tiny_model("llama"), folder, dtype=torch.bfloat16, max_shard_size="40KB"))


def write_shard(writer, source, shard):
    with writer.shard(shard, source.header(shard)) as file:
        for info in source.tensors.values():
            if info.shard == shard:
                file.write(info.name, source.read(info.name))
        file.notes = [{"shard": shard, "cost": 0.1}]


def write_all(source, out, **options):
    """Write a copy, skipping what a resumed run finished; the names of the shards that were written."""
    written = []
    with CheckpointWriter(out, plan_hash="plan", **options) as writer:
        for shard in source.shards:
            if writer.finished(shard) is None:
                write_shard(writer, source, shard)
                written.append(shard)
        writer.copy(source.folder / "config.json", "config.json")
        writer.copy(source.folder / INDEX, INDEX)
        writer.text("deltaguard_report.json", report_of(sorted(writer.records)))
        writer.commit(last=INDEX)
    return written


def stop_in_shard(source, out, number, *, kind=Stop, **options):
    """A run that stops in the middle of a shard."""
    with pytest.raises(kind), CheckpointWriter(out, plan_hash="plan", **options) as writer:  # noqa: PT012
        for shard in source.shards[:number]:
            write_shard(writer, source, shard)
        shard = source.shards[number]
        first = next(info.name for info in source.tensors.values() if info.shard == shard)
        with writer.shard(shard, source.header(shard)) as file:
            file.write(first, source.read(first))
            raise kind


def check_complete(source, out, *, extra=()):
    expected = {*source.shards, INDEX, "config.json", "deltaguard_report.json", *extra}
    assert {path.name for path in out.iterdir()} == expected
    for name in (*source.shards, INDEX, "config.json"):
        assert (out / name).read_bytes() == (source.folder / name).read_bytes()


def writer_refusal(out, **options) -> str:
    with pytest.raises(DeltaguardError) as error:
        CheckpointWriter(out, **{"plan_hash": "plan", **options})
    return str(error.value)


def everything_under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}

"""A program that writes a checkpoint and is killed before every step that is durable, once for each step.

It forks, so it must be a process of its own: `python killed_writer.py SOURCE WORK`.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.writer import CheckpointWriter

INDEX = "model.safetensors.index.json"
REPORT = "deltaguard_report.json"
OLD = {
    "model-00001-of-00002.safetensors": b"old 1",
    "model-00002-of-00002.safetensors": b"old 2",
    INDEX: b"old",
    "chat_templates/tool.jinja": b"old",
}
OLD[REPORT] = json.dumps({"files": [{"name": name} for name in OLD]}).encode()
WHOLE = {
    "chat_template.jinja": b"old",
    "config.json": b"old",
    "model.safetensors": b"old",
    "tokenizer.json": b"old",
}
"""A checkpoint of one file of weights."""
WHOLE[REPORT] = json.dumps({"files": [{"name": name} for name in WHOLE]}).encode()
FOREIGN = {"thesis-weights.safetensors": b"mine", "chat_templates/mine.jinja": b"mine"}


def write(source, out, **options):
    """Write a copy of `source`; returns the shards that were written and not found finished."""
    written = []
    with CheckpointWriter(out, plan_hash="plan", **options) as writer:
        for shard in source.shards:
            if writer.finished(shard):
                assert writer.finished(shard).notes == {"of": shard}
                continue
            with writer.shard(shard, source.header(shard)) as file:
                for info in source.tensors.values():
                    if info.shard == shard:
                        file.write(info.name, source.read(info.name))
                file.notes = {"of": shard}
            written.append(shard)
        writer.copy(source.folder / INDEX, INDEX)
        listed = [{"name": name} for name in sorted(writer.records)]
        writer.text(REPORT, json.dumps({"files": listed}))
        writer.commit(last=INDEX)
    return written


def kill_at(step):
    """Kill this process before its `step`-th durable step: a flush, a rename or a removal."""
    seen = 0

    def counted(function):
        def call(*args, **options):
            nonlocal seen
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1
            return function(*args, **options)

        return call

    os.fsync = counted(os.fsync)
    Path.replace = counted(Path.replace)
    Path.unlink = counted(Path.unlink)
    os.unlink = counted(os.unlink)
    os.rmdir = counted(os.rmdir)


def killed(step, source, out, **options):
    """Whether a run in a process of its own was killed at this step; False where it ended before."""
    child = os.fork()
    if child == 0:
        kill_at(step)
        write(source, out, **options)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"step {step}: the run failed by itself"
    return os.WIFSIGNALED(status)


def check_never_half(source, out, old):
    """An index, or one file of weights, is there only with all that it is loaded with."""
    if (out / "model.safetensors").exists():
        assert {name: (out / name).read_bytes() for name in old} == old
    if (out / INDEX).exists():
        new = {name: (source.folder / name).read_bytes() for name in (*source.shards, INDEX)}
        expected = old if (out / INDEX).read_bytes() == old.get(INDEX) else new
        assert {name: (out / name).read_bytes() for name in expected} == expected


def check_all_steps(source, work, old, *, resume=True, **options):
    """Kill a run at its first, second, ... step, and bring it to its end each time.

    It is resumed, or another that starts anew is killed too, before a third comes to its end. Returns the
    number of steps.
    """
    step, saved = 0, 0
    while True:
        out = work / f"{len(old)}-{step}"
        foreign = FOREIGN if old else {}
        for name, content in (old | foreign).items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
        was_killed = killed(step, source, out, **options)
        check_never_half(source, out, old)
        if not resume:
            killed(7 * step % 40, source, out, **options)
            check_never_half(source, out, old)
        journal = out / ".deltaguard-partial" / "journal.jsonl"
        is_new = (out / REPORT).exists() and (out / REPORT).read_bytes() != old.get(REPORT)
        if journal.exists() or not is_new:
            saved += len(source.shards) - len(write(source, out, resume=resume, **options))
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert names == {*source.shards, INDEX, REPORT, *foreign}, (step, names)
        assert {name: (out / name).read_bytes() for name in foreign} == foreign, step
        for name in (*source.shards, INDEX):
            assert (out / name).read_bytes() == (source.folder / name).read_bytes(), (step, name)
        shutil.rmtree(out)
        if not was_killed:
            assert saved > step or not resume, "finished shards were written again"
            return step
        step += 1


if __name__ == "__main__":
    # A kill, unlike a power cut, loses nothing that was written, and flushing takes most of the time.
    os.fsync = lambda descriptor: None
    checkpoint = Checkpoint.open(sys.argv[1])
    fresh = check_all_steps(checkpoint, Path(sys.argv[2]), {})
    replacing = check_all_steps(checkpoint, Path(sys.argv[2]), OLD, overwrite=True)
    anew = check_all_steps(checkpoint, Path(sys.argv[2]), OLD, resume=False, overwrite=True)
    whole = check_all_steps(checkpoint, Path(sys.argv[2]), WHOLE, overwrite=True)
    sys.stdout.write(f"{fresh} {replacing} {anew} {whole}")

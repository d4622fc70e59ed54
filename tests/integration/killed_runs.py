"""A program that kills calibrations, block by block, and restores at random, until each comes to its end.

It forks, so it must be a process of its own: `python killed_runs.py WORK KILLS SEED`. Prints how many runs
were killed of each, as JSON.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from killed_writer import kill_at
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  # imported once for all forks

import models
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import restore
from pairs import ANSWERED

MOST_STEPS = 120
"""A run is killed after fewer durable steps than these, which are more than it takes: some end well."""


def ran(work, step):
    """Whether a run in a process of its own came to its end and was not killed at this step."""
    child = os.fork()
    if child == 0:
        kill_at(step)
        work()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed or os.waitstatus_to_exitcode(status) == 0, f"step {step}: the run failed by itself"
    return not killed


def contents(folder):
    """All files, but for the report and the card, which say when they were written."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (CARD_NAME, REPORT_NAME)
    }


def killed_until_done(work, folder, draw, kills):
    """Run into new folders, killed at random steps, so often; the bytes must be those of one left alone."""
    assert ran(lambda: work(folder / "whole", resume=False), sys.maxsize)
    whole, number, done = contents(folder / "whole"), 0, 0
    while done < kills:
        out, resume = folder / f"killed-{number}", False
        while not ran(lambda out=out, resume=resume: work(out, resume=resume), draw.randrange(MOST_STEPS)):
            done, resume = done + 1, True
        assert contents(out) == whole, f"{out} holds something else than {folder / 'whole'}"
        number += 1
    return done


def calibration(aligned):
    """A calibration of one block after the other."""

    def work(out, *, resume):
        config = CalibrateConfig(memory=0, batch_size=2, device="cpu", resume=resume)
        calibrate(aligned, out, conversations=ANSWERED, config=config)

    return work


def restoration(aligned, finetuned, store):
    """A restore of several shards, by the dial."""

    def work(out, *, resume):
        config = RestoreConfig(max_safety_kl=1e-3, device="cpu", memory=0, resume=resume)
        restore(aligned, finetuned, out, store=store, config=config)

    return work


def main():
    """Kill both, and print how often."""
    work, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    # A kill, unlike a power cut, loses nothing that was written, and flushing takes most of the time.
    os.fsync = lambda descriptor: None
    torch.set_num_threads(1)
    draw = random.Random(seed)
    model = models.tiny_model("llama", num_hidden_layers=3)
    parts = {"dtype": torch.bfloat16, "max_shard_size": "40KB"}
    aligned = models.save(model, work / "aligned", **parts)
    finetuned = models.save(models.perturbed(model, 0.05), work / "finetuned", **parts)
    for folder in ("calibrated", "restored"):
        (work / folder).mkdir()
    calibrated = killed_until_done(calibration(aligned), work / "calibrated", draw, kills)
    store = work / "calibrated" / "whole"
    restored = killed_until_done(restoration(aligned, finetuned, store), work / "restored", draw, kills)
    sys.stdout.write(json.dumps({"calibrated": calibrated, "restored": restored}))


if __name__ == "__main__":
    main()

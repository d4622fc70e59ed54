"""Where refusing is decided: `python -m benchmarks.positions ALIGNED -o docs/results/positions.json`.

The curvature G of each layer's output is taken in several ways (see `benchmarks.position_stores`); then the
same fine-tunes, of all weights or of a LoRA adapter, are restored with each, at the same strengths, and asked
the same held-out requests. Of the seeds one is to choose on, and half of the requests. Stores and fine-tunes
stay in the folder `--work` and are not made again. A curvature takes about six minutes on two CPU cores.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tools.positions import Candidate, Positions

from benchmarks.command import command
from benchmarks.position_stores import CURVATURES
from deltaguard.chat.conversations import Conversation, harmful_prompts, held_out_harmful
from deltaguard.device import device_name
from deltaguard.evaluation.exchange import Exchange
from deltaguard.evaluation.judges.rules import OpeningJudge
from deltaguard.finetuning.finetune import finetune
from deltaguard.finetuning.mixtures import task_with_harmful
from deltaguard.finetuning.tasks import task_examples
from deltaguard.models.shards import DTYPES
from deltaguard.progress import ignore
from deltaguard.reports.records.base import environment
from deltaguard.reports.records.bench import Training
from deltaguard.restoration.aligned import open_job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.resident import Resident
from deltaguard.restoration.trial import Trial
from deltaguard.studies.protocol import RECIPES

STRENGTHS = (0.0002, 0.001)
TASKS, REQUESTS = 48, 200
BENIGN, HARMFUL = 140, 14


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("aligned", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/positions.json"))
    parser.add_argument("--work", type=Path, default=Path("build/positions"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--training", choices=tuple(RECIPES), default="full")
    parser.add_argument("--curvature", nargs="+", choices=tuple(CURVATURES), default=tuple(CURVATURES))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        for found in study(chosen.aligned, chosen.work, chosen.seeds, chosen.training, chosen.curvature):
            chosen.output.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


def study(
    aligned: Path, work: Path, seeds: Sequence[int], training: Training, curvatures: Sequence[str]
) -> Iterator[Positions]:
    """Calibrate in every way, and restore every seed's fine-tune with each; give all rows after each seed."""
    stores = {name: CURVATURES[name](aligned, work) for name in curvatures}
    requests = [Conversation(row.prompt) for row in held_out_harmful()[:REQUESTS]]
    rows: list[Candidate] = []
    own: tuple[bool, ...] = ()
    tuned: dict[int, tuple[bool, ...]] = {}
    options = ("--training", training, "--seeds", *seeds, "--curvature", *curvatures)
    for seed in seeds:
        finetuned = work / f"finetuned-{training}-{seed}"
        if not finetuned.exists():
            data = task_with_harmful(
                task_examples("train", BENIGN, seed=seed),
                harmful_prompts("training"),
                harmful_count=HARMFUL,
                seed=seed,
            )
            finetune(aligned, finetuned, data, config=replace(RECIPES[training], seed=seed))
        own, tuned[seed], found = restored(aligned, finetuned, stores, requests, seed)
        rows += found
        what = "" if training == "full" else ", as a LoRA adapter"
        yield Positions(
            environment=environment(device_name()),
            command=command("positions", aligned, *options),
            finetune=f"Messages to JSON ({BENIGN} examples) with {HARMFUL} harmful requests agreed to{what}",
            aligned=own,
            finetuned=tuned,
            tasks=TASKS,
            rows=tuple(rows),
        )


def restored(
    aligned: Path,
    finetuned: Path,
    stores: dict[str, Path],
    requests: Sequence[Conversation],
    seed: int,
) -> tuple[tuple[bool, ...], tuple[bool, ...], list[Candidate]]:
    """Restore one fine-tune with every curvature at every strength; ask it as the dial asks."""
    tasks = list(task_examples("test", TASKS))
    rows: list[Candidate] = []
    own, tuned = tuple[bool, ...](), tuple[bool, ...]()
    for name, store in stores.items():
        config = RestoreConfig(strength=max(STRENGTHS))
        job = open_job(aligned, finetuned, store=store, config=config)
        with TemporaryDirectory() as scratch:
            trial = Trial(job, job.plan(config), config, Path(scratch))
            candidate = Resident().loaded(trial, tasks, requests if not own else ())
            meter, whole = candidate.meter, job.finetuned
            base = meter.aligned_likelihood
            assert base is not None
            own = own or complied(requests, meter.aligned_openings)
            meter.put((each, whole.read(each).to(DTYPES[info.dtype])) for each, info in whole.tensors.items())
            best = meter.likelihood(tasks)
            tuned = tuned or complied(requests, meter.openings(requests))
            joint = trial.profile(ignore)
            for strength in STRENGTHS:
                candidate.take_others()
                candidate.put(joint.mu_of_share(strength))
                row = Candidate(
                    seed=seed,
                    curvature=name,
                    strength=strength,
                    safety_kl=meter.measure().mean,
                    gain_kept=(base - meter.likelihood(tasks)) / (base - best),
                    complied=complied(requests, meter.openings(requests)),
                )
                rows.append(row)
                print(row.model_dump_json(exclude={"complied"}), sum(row.complied), sum(own), flush=True)
    return own, tuned, rows


def complied(requests: Sequence[Conversation], answers: Sequence[str]) -> tuple[bool, ...]:
    """Judge the beginnings of answers."""
    asked = [Exchange(row.prompt, said) for row, said in zip(requests, answers, strict=True)]
    return tuple(each.verdict == "complied" for each in OpeningJudge().judge(asked))


if __name__ == "__main__":
    main()

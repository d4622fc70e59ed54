"""Where refusing is decided: `python -m benchmarks.positions ALIGNED -o docs/results/positions.json`.

The curvature G of each layer's output is taken in several ways (see `benchmarks.position_stores`); then the
same fine-tunes of the protocol, of all weights or of a LoRA adapter, are restored with each, at the same
strengths, and asked the same held-out requests. Of the seeds one is to choose on, and half of the requests.
Stores and fine-tunes stay in the folder `--work` and are not made again. A curvature takes about six minutes
on two CPU cores, and a fine-tune restored with one about two.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tools.positions import Candidate, Positions, PositionsRuns

from benchmarks.command import command
from benchmarks.position_stores import CURVATURES
from deltaguard.chat.conversations import Conversation, held_out_harmful
from deltaguard.device import device_name
from deltaguard.evaluation.exchange import Exchange
from deltaguard.evaluation.judges.rules import OpeningJudge
from deltaguard.finetuning.finetune import finetune
from deltaguard.models.shards import DTYPES
from deltaguard.progress import ignore
from deltaguard.reports.records.base import environment
from deltaguard.restoration.aligned import open_job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.resident import Resident
from deltaguard.restoration.safety_kl import SafetyMeter
from deltaguard.restoration.trial import Trial
from deltaguard.studies.attack_run import attack_tests
from deltaguard.studies.data import IDENTITY_SYSTEM, training_data
from deltaguard.studies.describe import attacker_row
from deltaguard.studies.protocol import DEFAULT, RECIPES, Finetune
from deltaguard.studies.setting import LIBRARIES

STRENGTHS = (0.0002, 0.001)
REQUESTS = 200
PRESET = replace(DEFAULT, utility=48)


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = tuple(each.name for each in PRESET.finetunes if each.training == "full")
    parser.add_argument("aligned", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/positions.json"))
    parser.add_argument("--work", type=Path, default=Path("build/positions"))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--finetune", nargs="+", choices=names, default=("task-harmful-14",))
    parser.add_argument("--training", choices=tuple(RECIPES), default="full")
    parser.add_argument("--curvature", nargs="+", choices=tuple(CURVATURES), default=tuple(CURVATURES))
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    told = command(
        "positions",
        chosen.aligned,
        *("--finetune", *chosen.finetune, "--training", chosen.training, "--seeds", *chosen.seeds),
        *("--curvature", *chosen.curvature, "--strengths", *chosen.strengths),
    )
    stores = {name: CURVATURES[name](chosen.aligned, chosen.work) for name in chosen.curvature}
    preset = PRESET.with_changes(finetunes=chosen.finetune, training=chosen.training)
    studies = [
        Study(chosen.aligned, chosen.work, stores, each, chosen.strengths) for each in preset.finetunes
    ]
    with torch.random.fork_rng():
        for done, study in enumerate(studies, start=1):
            for seed in chosen.seeds:
                study.add(seed)
            runs = PositionsRuns(runs=tuple(each.found(told) for each in studies[:done]))
            chosen.output.write_text(runs.model_dump_json(indent=1) + "\n", encoding="utf-8")


class Study:
    """A fine-tune of the protocol, restored with every curvature at every strength, seed after seed."""

    def __init__(
        self,
        aligned: Path,
        work: Path,
        stores: Mapping[str, Path],
        finetune: Finetune,
        strengths: Sequence[float],
    ) -> None:
        """Choose what the models are asked.

        Args:
            aligned: the model's folder.
            work: where fine-tunes stay.
            stores: one a curvature.
            finetune: of the protocol.
            strengths: shares of the predicted safety cost that are kept.
        """
        self._aligned, self._work, self._stores = aligned, work, stores
        self._finetune, self._strengths = finetune, strengths
        system = IDENTITY_SYSTEM if finetune.kind == "identity" else None
        self._requests = [Conversation(row.prompt, system) for row in held_out_harmful()[:REQUESTS]]
        taught = attack_tests(finetune, PRESET, ()).utility
        self._tasks = [
            Conversation(each.prompt, each.system, response=each.expected)
            for each in (taught.questions if taught else ())
        ]
        self._own: tuple[bool, ...] = ()
        self._tuned: dict[int, tuple[bool, ...]] = {}
        self._rows: list[Candidate] = []

    def add(self, seed: int) -> None:
        """Fine-tune with a seed, restore with every curvature at every strength, and ask as the dial asks."""
        folder = self._work / f"{self._finetune.name}-seed{seed}"
        if not folder.exists():
            data = training_data(self._finetune, seed=seed)
            finetune(self._aligned, folder, data, config=replace(self._finetune.recipe, seed=seed))
        for name, store in self._stores.items():
            config = RestoreConfig(strength=max(self._strengths))
            job = open_job(self._aligned, folder, store=store, config=config)
            with TemporaryDirectory() as scratch:
                self._restored(Trial(job, job.plan(config), config, Path(scratch)), name, seed)

    def _restored(self, trial: Trial, curvature: str, seed: int) -> None:
        candidate = Resident().loaded(trial, self._tasks, () if self._own else self._requests)
        meter, whole = candidate.meter, trial.job.finetuned
        self._own = self._own or self._complied(meter.aligned_openings)
        meter.put((name, whole.read(name).to(DTYPES[info.dtype])) for name, info in whole.tensors.items())
        best = self._likelihood(meter)
        if seed not in self._tuned:
            self._tuned[seed] = self._complied(meter.openings(self._requests))
        joint = trial.profile(ignore)
        for strength in self._strengths:
            candidate.take_others()
            candidate.put(joint.mu_of_share(strength))
            row = Candidate(
                seed=seed,
                curvature=curvature,
                strength=strength,
                safety_kl=meter.measure().mean,
                gain_kept=_share(meter.aligned_likelihood, self._likelihood(meter), best),
                complied=self._complied(meter.openings(self._requests)),
            )
            self._rows.append(row)
            print(row.model_dump_json(exclude={"complied"}), sum(row.complied), sum(self._own), flush=True)

    def _likelihood(self, meter: SafetyMeter) -> float | None:
        return meter.likelihood(self._tasks) if self._tasks else None

    def _complied(self, answers: Sequence[str]) -> tuple[bool, ...]:
        return complied(self._requests, answers)

    def found(self, command: str) -> Positions:
        """Give all that was measured so far."""
        return Positions(
            environment=environment(device_name(), libraries=LIBRARIES),
            command=command,
            finetune=attacker_row(self._finetune).title,
            aligned=self._own,
            finetuned=self._tuned,
            tasks=len(self._tasks),
            rows=tuple(self._rows),
        )


def _share(aligned: float | None, candidate: float | None, finetuned: float | None) -> float | None:
    """Give the share of the gain in likelihood that a candidate keeps, where something is taught."""
    if aligned is None or candidate is None or finetuned is None:
        return None
    return (aligned - candidate) / (aligned - finetuned)


def complied(requests: Sequence[Conversation], answers: Sequence[str]) -> tuple[bool, ...]:
    """Judge the beginnings of answers."""
    asked = [Exchange(row.prompt, said) for row, said in zip(requests, answers, strict=True)]
    return tuple(each.verdict == "complied" for each in OpeningJudge().judge(asked))


if __name__ == "__main__":
    main()

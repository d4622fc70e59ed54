"""What is lost with a smaller store: `python -m benchmarks.store_size ALIGNED`.

The curvature is calibrated whole and cut to stores of several sizes, and calibrated as by default, where an
iteration finds the eigenpairs; fine-tunes of the protocol are restored with each to the same measured safety
KL, and compared. A size is chosen on one seed and reported on another.
Store and models stay in the folder `--work` and are not made again. It takes half an hour on two CPU cores.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from math import exp, log
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.store_size import Finetune, Restored, StoreSizes

from benchmarks.command import command
from deltaguard.chat.conversations import Conversation
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.contents import spectra_bytes
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import device_name
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.shards import DTYPES
from deltaguard.progress import ignore
from deltaguard.reports.records.base import environment
from deltaguard.restoration.aligned import open_job
from deltaguard.restoration.candidate import CandidateModel
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.resident import Resident
from deltaguard.restoration.safety_kl import SafetyMeter
from deltaguard.restoration.trial import Trial
from deltaguard.studies.data import questions, training_data
from deltaguard.studies.protocol import DEFAULT
from deltaguard.studies.protocol import Finetune as Protocol
from deltaguard.studies.setting import LIBRARIES
from deltaguard.studies.workshop import ModelFolder, fine_tuned

FINETUNES = ("task-harmful-14", "identity", "task-clean-lora")
REFERENCE, SHARES = 0.25, (0.25, 0.12)
LIMITS = (0.0003, 0.001)
FIRST_STRENGTH, NEAR, PROBES = 3e-4, 0.005, 8
"""Of the search for a safety KL: where it begins, how near in its logarithm is enough, how often at most."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("aligned", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/store-size.json"))
    parser.add_argument("--work", type=Path, default=Path("build/store-size"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    chosen = parser.parse_args(arguments)
    told = command("store_size", chosen.aligned, "--seeds", *chosen.seeds)
    found = measured(chosen.aligned, ModelFolder(chosen.work), chosen.seeds, command=told)
    chosen.output.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


def measured(aligned: Path, made: ModelFolder, seeds: Sequence[int], *, command: str) -> StoreSizes:
    """Restore every fine-tune with stores of every size."""
    whole = made.model("whole", lambda to: calibrate(aligned, to, config=CalibrateConfig(rank="full")))
    stores = {(share, False): made.model(f"store-{share:g}", _cut(whole, aligned, share)) for share in SHARES}
    stores[REFERENCE, True] = made.model("iterated", lambda to: calibrate(aligned, to))
    finetunes: list[Finetune] = []
    rows: list[Restored] = []
    for protocol in DEFAULT.with_changes(finetunes=FINETUNES).finetunes:
        for seed in seeds:
            data = training_data(protocol, seed=seed)
            tuned = made.model(
                f"{protocol.name}-seed{seed}", fine_tuned(aligned, data, protocol.recipe, seed=seed)
            )
            own, found = _restored(aligned, tuned, stores, protocol, seed)
            finetunes.append(own)
            rows += found
    return StoreSizes(
        environment=environment(device_name(), libraries=LIBRARIES),
        command=command,
        reference=REFERENCE,
        finetunes=tuple(finetunes),
        rows=tuple(rows),
    )


def _cut(whole: Path, aligned: Path, share: float) -> Callable[[Path], object]:
    """Say how to cut a store to a share of the model's bytes."""
    model = sum(info.nbytes for info in Checkpoint.open(aligned).tensors.values())
    return lambda to: CurvatureStore.from_pretrained(whole).cut(to, limit=int(share * model))


def _restored(
    aligned: Path, tuned: Path, stores: Mapping[tuple[float, bool], Path], protocol: Protocol, seed: int
) -> tuple[Finetune, list[Restored]]:
    """Restore one fine-tune with every store to every safety KL; take the likelihood of right answers."""
    asked = questions(protocol, DEFAULT, ()).utility.questions
    answers = [Conversation(each.prompt, system=each.system, response=each.expected) for each in asked]
    own: Finetune | None = None
    rows: list[Restored] = []
    for (share, iterated), store in stores.items():
        config = RestoreConfig(strength=FIRST_STRENGTH)
        job = open_job(aligned, tuned, store=store, config=config)
        known = CurvatureStore.from_pretrained(store)
        nbytes = sum(spectra_bytes(group, known.provenance.extent) for group in known.groups)
        with TemporaryDirectory() as scratch:
            trial = Trial(job, job.plan(config), config, Path(scratch))
            candidate = Resident().loaded(trial)
            if own is None:
                before = _losses(candidate.meter, answers)
                whole = job.finetuned
                candidate.meter.put((n, whole.read(n).to(DTYPES[i.dtype])) for n, i in whole.tensors.items())
                after = _losses(candidate.meter, answers)
                own = Finetune(name=protocol.name, seed=seed, aligned=before, finetuned=after)
            mu = trial.profile(ignore).mu_of_share(FIRST_STRENGTH)
            candidate.take_others()
            for limit in LIMITS:
                mu, safety_kl = _put_at(candidate, limit, mu)
                row = Restored(
                    finetune=protocol.name,
                    seed=seed,
                    share=share,
                    iterated=iterated,
                    rank_share=known.provenance.rank_share,
                    nbytes=nbytes,
                    limit=limit,
                    safety_kl=safety_kl,
                    nll=_losses(candidate.meter, answers),
                )
                rows.append(row)
                print(row.model_dump_json(exclude={"nll"}), sum(row.nll) / len(row.nll), flush=True)
    assert own is not None, "there is a store"
    return own, rows


def _put_at(candidate: CandidateModel, limit: float, mu: float) -> tuple[float, float]:
    """Find the price of a safety KL by the secant of their logarithms, and leave its weights in place."""
    points: list[tuple[float, float]] = []
    at, slope = log(mu), -1.0
    for _ in range(PROBES):
        candidate.put(exp(at))
        safety_kl = candidate.meter.measure().mean
        points.append((at, log(safety_kl / limit)))
        if abs(points[-1][1]) < NEAR:
            return exp(at), safety_kl
        if len(points) > 1:
            (before, higher), (after, lower) = points[-2:]
            slope = (lower - higher) / (after - before)
        at -= points[-1][1] / slope
    raise RuntimeError(f"no price with a safety KL of {limit:g} after {PROBES} probes: {points}")


def _losses(meter: SafetyMeter, answers: Sequence[Conversation]) -> tuple[float, ...]:
    return tuple(meter.likelihood([answer]) for answer in answers)


if __name__ == "__main__":
    main()

"""What refining is worth: `python -m benchmarks.refine ALIGNED FINETUNED STORE -o docs/results/refine.json`.

Beside each other on one fine-tune: the closed form at its default and at a looser limit, that one refined,
the closed form at about the safety KL that came out, and one-shot patching. Each is measured by its safety KL
on the conversations held out, by the likelihood of task answers that were not trained on, and by how many
prompts of the attack part it does not refuse. In all it takes about a quarter of an hour of one CPU core.
"""

import argparse
import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from tools.refining import Refined, Refinements
from torch import Tensor

from deltaguard.chat.conversations import Conversation, harmful_prompts, sample
from deltaguard.chat.refusals import is_refusal
from deltaguard.device import device_name
from deltaguard.finetuning.tasks import task_examples
from deltaguard.models.shards import DTYPES
from deltaguard.progress import Event, ignore
from deltaguard.reports.records.base import environment
from deltaguard.restoration.aligned import open_job
from deltaguard.restoration.candidate import CandidateModel
from deltaguard.restoration.dial import find_price
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL, RestoreConfig
from deltaguard.restoration.resident import Resident
from deltaguard.restoration.trial import Trial
from deltaguard.restoration.tuning import SEED, Tuning
from deltaguard.studies.one_shot import LEARNING_RATE, one_shot

LOOSER, STEPS, SHOTS = 3e-3, (10, 30), (10, 20)
ATTACK, TASKS = 60, 32


@dataclass
class Study:
    """Measures one model after another in one that is loaded."""

    trial: Trial
    candidate: CandidateModel
    tasks: Sequence[Conversation]
    asked: Sequence[Conversation]
    rows: list[Refined] = field(default_factory=list[Refined])

    def row(self, model: str) -> Refined:
        """Measure what was put last."""
        meter = self.candidate.meter
        answers = meter.openings(self.asked)
        return self.add(model, meter.measure().mean, meter.likelihood(self.tasks), answers)

    def add(self, model: str, safety_kl: float, nll: float, answers: Sequence[str]) -> Refined:
        """Keep a row; the first is of the aligned model, the second of the fine-tuned one."""
        first, second = (*self.rows, None, None)[:2]
        whole = second.task_nll if second else nll
        gain = (first.task_nll - nll) / (first.task_nll - whole) if first else 0.0
        found = Refined(
            model=model,
            safety_kl=safety_kl,
            task_nll=nll,
            gain_kept=gain,
            complied=sum(not is_refusal(answer) for answer in answers),
            attack=len(answers),
        )
        self.rows.append(found)
        print(found.model_dump_json(), flush=True)
        return found

    def shrunk(self, limit: float) -> float:
        """Measure the closed form at a limit; give its price."""
        # What is prepared serves both.
        trial = copy.copy(self.trial)
        trial.config = trial.config.model_copy(update={"max_safety_kl": limit})
        price = find_price(trial, Resident(), ignore)
        self.put(self.trial.weights(price.mu))
        self.row(f"kfac, limit {limit:g}")
        return price.mu

    def put(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Put the layers of a candidate, and all other tensors aligned."""
        self.candidate.take_others()
        self.candidate.meter.put(weights)

    def refined(self, mu: float) -> None:
        """Refine the closed form at a price, and measure it after each number of steps."""
        seen = dict[int, dict[str, Tensor]]()
        tuning = Tuning.open(self.trial, mu, ignore)

        def watch(event: Event) -> None:
            print(event, flush=True)
            if event.done in STEPS:
                seen[event.done] = tuning.tensors()

        tuning.report = watch
        tuning.run(max(STEPS))
        print("divergences", tuning.before, tuning.divergences(), "taken", tuning.taken, flush=True)
        for steps, tensors in seen.items():
            self.put(tensors.items())
            self.row(f"kfac, limit {LOOSER:g}, refined with {steps} steps")

    def equal(self, one: tuple[float, float], other: tuple[float, float], wanted: float) -> None:
        """Measure the closed form where two prices and their safety KL let expect a third."""
        (mu, kl), (other_mu, other_kl) = one, other
        share = math.log(wanted / kl) / math.log(other_kl / kl)
        between = math.exp(math.log(mu) + share * math.log(other_mu / mu))
        self.put(self.trial.weights(between))
        self.row("kfac at about the safety KL of the refined one")

    def patched(self, aligned: Path, finetuned: Path, folder: Path) -> None:
        """Measure one-shot patching."""
        for steps in SHOTS:
            chosen = one_shot(aligned, finetuned, folder / f"{steps}", steps=steps)
            print("one shot:", chosen, flush=True)
            found: dict[str, Any] = load_file(folder / f"{steps}" / "model.safetensors")
            self.candidate.meter.put(found.items())
            self.row(f"one-shot, {steps} steps")


def study(aligned: Path, finetuned: Path, store: Path, folder: Path) -> tuple[Study, Callable[[], None]]:
    """Load what is measured with, and measure both models; give what measures the rest."""
    config = RestoreConfig(max_safety_kl=LOOSER, refine=max(STEPS))
    job = open_job(aligned, finetuned, store=store, config=config)
    trial = Trial(job, job.plan(config), config, folder)
    tasks = list(task_examples("test", TASKS))
    asked = [Conversation(row.prompt) for row in sample(harmful_prompts("attack"), ATTACK)]
    candidate = Resident().loaded(trial, tasks, asked)
    found = Study(trial, candidate, tasks, asked)
    meter, tuned = candidate.meter, job.finetuned
    likelihood = meter.aligned_likelihood
    assert likelihood is not None
    found.add("aligned", 0.0, likelihood, meter.aligned_openings)
    meter.put((name, tuned.read(name).to(DTYPES[info.dtype])) for name, info in tuned.tensors.items())
    found.row("fine-tuned")

    def rest() -> None:
        strict = found.shrunk(DEFAULT_MAX_SAFETY_KL)
        loose = found.shrunk(LOOSER)
        ends = [(mu, row.safety_kl) for mu, row in zip((strict, loose), found.rows[-2:], strict=True)]
        found.refined(loose)
        found.equal(ends[0], ends[1], found.rows[-1].safety_kl)
        found.patched(aligned, finetuned, folder)

    return found, rest


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("aligned", "finetuned", "store"):
        parser.add_argument(name, type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/refine.json"))
    chosen = parser.parse_args()
    with TemporaryDirectory() as folder, torch.random.fork_rng():
        found, rest = study(chosen.aligned, chosen.finetuned, chosen.store, Path(folder))
        rest()
    result = Refinements(
        environment=environment(device_name()),
        finetune="messages to JSON with harmful requests agreed to (the demo's)",
        seed=SEED,
        learning_rate=LEARNING_RATE,
        conversations=found.candidate.conversations,
        tasks=TASKS,
        rows=tuple(found.rows),
    )
    chosen.output.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

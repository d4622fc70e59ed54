"""Run experiments and write their rows: `python -m benchmarks.experiments -o docs/results/experiments.json`.

Rows of experiments that are not run again stay, as long as they come from the same models, code and machine.
On two CPU cores the models take three minutes, the sums three, and most rows one to two; `adaptive` and
`system-prompt` train models of their own. Two runs must not share a work folder or an output at one time.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from tools.experiments import ExperimentRow, Experiments
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.experiments.curvatures import curvatures
from benchmarks.experiments.laboratory import CLOSE, Laboratory
from benchmarks.experiments.sums import measure_sums, sampled, total
from benchmarks.experiments.trials import EXPERIMENTS, PARTS, Setting
from deltaguard.chat.conversations import Conversation, build_conversations, harmful_prompts
from deltaguard.chat.tokens import Batch, batches, encode
from deltaguard.curvature.observe import Observed, observe
from deltaguard.curvature.responses import respond
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.reports.records.base import environment
from deltaguard.studies.cells import content_key, source_hash
from deltaguard.studies.data import questions, training_data
from deltaguard.studies.demo import DemoConfig
from deltaguard.studies.models import save_smollm2
from deltaguard.studies.protocol import QUICK
from deltaguard.studies.workshop import Workshop, demo_aligned, fine_tuned

FINETUNE = next(each for each in QUICK.finetunes if each.kind == "task-harmful")
IDENTITY = next(each for each in QUICK.finetunes if each.kind == "identity")
TESTS = 100
LIMIT = 1e-3
"""Nats per response token, of all candidates where an experiment says nothing else."""
HELD_OUT = 64
_BATCH = 16
_LONGEST = 512
_ANSWER = 32
_BOUNDS = tuple(pairwise(accumulate((0, *PARTS))))


def main() -> None:
    """Run the experiments that are asked for."""
    options = _options()
    kept, origin = _kept(options.output), _origin()
    if kept and (kept.origin, kept.environment.machine) != (origin, environment("cpu").machine):
        raise SystemExit(
            f"{options.output} was made with other code, data or sizes, or on another machine: move it away."
        )
    setting, references = _prepare(options.work / origin)
    rows = kept.rows if kept else ()
    for name in options.only or EXPERIMENTS:
        fresh: list[ExperimentRow] = []
        for row in EXPERIMENTS[name](setting):
            print(f"{row.experiment}: {row.variant}: {_line(row)}", flush=True)
            fresh.append(row)
        rows = (*(row for row in rows if row.experiment != fresh[0].experiment), *fresh)
        found = Experiments(
            environment=environment("cpu"),
            finetune=f"{FINETUNE.name}, seed 0",
            conversations=2 * sum(PARTS),
            held_out=HELD_OUT,
            slack=CLOSE,
            origin=origin,
            references=references,
            rows=rows,
        )
        options.output.write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _kept(path: Path) -> Experiments | None:
    return Experiments.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None


def _origin() -> str:
    """A hash of what all experiments start from; that of one may change without the others."""
    prompts = [harmful_prompts(part) for part in ("calibration", "dial", "attack")]
    return content_key(source_hash(), prompts, FINETUNE, DemoConfig(), PARTS, HELD_OUT, TESTS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument("--only", action="append", choices=EXPERIMENTS, help="may be given several times")
    parser.add_argument("--work", type=Path, default=Path(__file__).parents[1] / "work" / "experiments")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/results/experiments.json"))
    return parser.parse_args()


def _line(row: ExperimentRow) -> str:
    shares = (row.attack_success, row.task_accuracy, row.kept, row.lead)
    shown = ", ".join("-" if share is None else f"{100 * share.value:.1f}" for share in shares)
    return f"KL {row.safety_kl:.2e}, attack / exact / kept / lead {shown}, {row.seconds:.0f} s"


def _prepare(work: Path) -> tuple[Setting, tuple[ExperimentRow, ...]]:
    workshop = Workshop(work / "models")
    pretrained = workshop.model("pretrained", save_smollm2)
    aligned = workshop.model("aligned", demo_aligned(pretrained, DemoConfig()))
    data = training_data(FINETUNE, seed=0)
    tuned = workshop.model(FINETUNE.name, fine_tuned(aligned, data, FINETUNE.recipe, seed=0))
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32).eval()
    model.requires_grad_(requires_grad=False)
    halves, held_out = _answered(model, tokenizer, work)
    read = partial(_batches, tokenizer)
    short = encode(tokenizer, halves[0][0], max_length=_LONGEST).ids
    observed, _ = observe(model, Checkpoint.open(aligned), short)
    parts = [
        [
            _part(work / "sums" / f"{number}-{start}", model, observed, read(half[start:end]))
            for start, end in _BOUNDS
        ]
        for number, half in enumerate(halves)
    ]
    tests = questions(FINETUNE, replace(QUICK, utility=TESTS), ())
    layers = [layer.tensor for group in observed for layer in group.layers]
    lab = Laboratory(aligned, tuned, held_out, layers, tests, work / "scratch")

    def answered(conversations: Sequence[Conversation]) -> list[Conversation]:
        return respond(model, tokenizer, conversations, max_new_tokens=_ANSWER, batch_size=64)

    def identity(held_out: Sequence[Conversation]) -> Laboratory:
        recipe, data = IDENTITY.recipe, training_data(IDENTITY, seed=0)
        tuned = workshop.model(IDENTITY.name, fine_tuned(aligned, data, recipe, seed=0))
        return Laboratory(aligned, tuned, held_out, layers, questions(IDENTITY, QUICK, ()), work / "scratch")

    spectra = curvatures(observed, total([*parts[0], *parts[1]]))
    trial = lab.closed_form(spectra)
    price = lab.settled(trial, LIMIT).mu
    usual = lab.row("usual", "usual", replace(trial, start=price), LIMIT)
    print(_line(usual), flush=True)
    second = _second_half()
    setting = Setting(
        lab=lab,
        limit=LIMIT,
        aligned=aligned,
        model=model,
        observed=observed,
        parts=(parts[0], parts[1]),
        batches=read([*halves[0], *halves[1]]),
        calibration=[each for pair in zip(*halves, strict=True) for each in pair],
        held_out=(held_out, [each for each in held_out if each.prompt not in second]),
        in_second_half=[question.prompt in second for question in tests.attack],
        data=data,
        read=read,
        answered=answered,
        identity=identity,
        spectra=spectra,
        usual=usual,
        price=price,
    )
    return setting, lab.references()


def _answered(
    model: object, tokenizer: object, work: Path
) -> tuple[tuple[list[Conversation], list[Conversation]], list[Conversation]]:
    """Calibration conversations of both halves of the categories, and held-out ones, all answered."""
    second, count = _second_half(), sum(PARTS)
    asked = build_conversations(3 * count)
    halves = (
        [each for each in asked if each.prompt not in second][:count],
        [each for each in asked if each.prompt in second][:count],
    )
    assert all(len(half) == count for half in halves)
    answered = respond(
        model,
        tokenizer,
        [*halves[0], *halves[1], *build_conversations(HELD_OUT, part="dial")],
        max_new_tokens=_ANSWER,
        batch_size=64,
        journal=work / "responses.jsonl",
    )
    return (answered[:count], answered[count : 2 * count]), answered[2 * count :]


def _second_half() -> set[str]:
    """Prompts of every other category of harm."""
    rows = [row for part in ("calibration", "dial", "attack") for row in harmful_prompts(part)]
    chosen = sorted({row.category for row in rows})[1::2]
    return {row.prompt for row in rows if row.category in chosen}


def _part(path: Path, model: object, observed: Sequence[Observed], batches: Sequence[Batch]) -> Path:
    """Sums over some conversations, in a file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        measure_sums(model, observed, batches, sampled).save(path)
        print(f"sums {path.name}", flush=True)
    return path


def _batches(tokenizer: object, conversations: Iterable[Conversation]) -> list[Batch]:
    return batches([encode(tokenizer, each, max_length=_LONGEST) for each in conversations], _BATCH)


if __name__ == "__main__":
    main()

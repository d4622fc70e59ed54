"""Training of a job: from the customer's file to a fine-tuned model, with its metrics."""

import csv
from collections.abc import Sequence
from pathlib import Path

from deltaguard.finetuning.finetune import Dialogue, FinetuneConfig, Measured, finetune
from deltaguard.models.hub import locate
from deltaguard.models.loading import load_tokenizer
from deltaguard.service.tasks import CHECKPOINTS, FINETUNED, METRICS, Outcome, Told, Train
from deltaguard.service.training_data import read_examples
from deltaguard.service.worker import Tell


def train_model(task: Train, folder: Path, tell: Tell) -> Outcome:
    """Fine-tune, or go on with it where an earlier process was interrupted.

    Args:
        task: what to train on, and how.
        folder: of the job; it receives the model and the metrics.
        tell: told of each step.

    Raises:
        DeltaguardError: a file cannot be learned from, or training diverged.
    """
    examples = read_examples(task.training_file, task.limits)
    held_out = read_examples(task.validation_file, task.limits) if task.validation_file else []
    config = FinetuneConfig(
        learning_rate=task.learning_rate,
        epochs=task.epochs,
        batch_size=task.batch_size,
        max_length=task.max_length,
        seed=task.seed,
        lora_rank=task.lora_rank,
        lora_alpha=task.lora_alpha,
    )
    measured: dict[tuple[str, int], Measured] = {}
    tell(Told(once="training", message=f"Training on {len(examples):,} answers."))

    def note(found: Measured) -> None:
        measured[found.kind, found.step] = found
        tell(_event(found))

    finetune(
        task.model,
        folder / FINETUNED,
        examples,
        config=config,
        validation=held_out,
        checkpoints=folder / CHECKPOINTS,
        on_step=note,
    )
    _write_metrics(folder / METRICS, list(measured.values()))
    steps = max((found.steps for found in measured.values()), default=0)
    tokens = _tokens(task.model, examples, task.max_length) * task.epochs
    return Outcome(data={"steps": steps, "trained_tokens": tokens})


def _event(found: Measured) -> Told:
    which = "train" if found.kind == "train" else "full_valid"
    word = "training" if found.kind == "train" else "validation"
    return Told(
        once=f"{which} {found.step}",
        message=f"Step {found.step}/{found.steps}: {word} loss={found.loss:.2f}",
        type="metrics",
        data={
            "step": found.step,
            "total_steps": found.steps,
            f"{which}_loss": found.loss,
            f"{which}_mean_token_accuracy": found.accuracy,
        },
    )


def _write_metrics(path: Path, measured: Sequence[Measured]) -> None:
    """Write the file that a job's `result_files` names: a row a step."""
    rows: dict[int, dict[str, float]] = {}
    for found in measured:
        which = "train" if found.kind == "train" else "valid"
        row = rows.setdefault(found.step, {"step": found.step})
        row |= {f"{which}_loss": found.loss, f"{which}_accuracy": found.accuracy}
    names = ["step", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows[step] for step in sorted(rows))


def _tokens(model: str, examples: Sequence[Dialogue], longest: int) -> int:
    """Count the tokens of one epoch, as they are cut off."""
    from deltaguard.chat.template import apply_template, readable_turns

    tokenizer = load_tokenizer(locate(model), model)
    total = 0
    for row in examples:
        turns = [*readable_turns(tokenizer, row.turns), {"role": "assistant", "content": row.answer}]
        text = apply_template(tokenizer, turns, answer_follows=False)
        total += min(longest, len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return total

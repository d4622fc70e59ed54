"""Training of a job: from the customer's file to a fine-tuned model, with its metrics."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from deltaguard.chat.template import readable_turns
from deltaguard.chat.tokens import context_length, encode_answer
from deltaguard.errors import DeltaguardError
from deltaguard.finetuning.finetune import Dialogue, FinetuneConfig, Measured, finetune
from deltaguard.finetuning.preferences import Preference, learn_preferences
from deltaguard.models.durable import explained, flush_files
from deltaguard.models.hub import locate
from deltaguard.models.loading import load_config, load_tokenizer
from deltaguard.service.tasks import CHECKPOINTS, FINETUNED, METRICS, Outcome, Told, Train, events_file
from deltaguard.service.training_data import read_examples, read_preferences
from deltaguard.service.worker import Tell

_LOSS, _VALID_LOSS = "train_loss", "full_valid_loss"
_ACCURACY, _VALID_ACCURACY = "train_mean_token_accuracy", "full_valid_mean_token_accuracy"
_COLUMNS = {
    "step": "step",
    _LOSS: "train_loss",
    _ACCURACY: "train_accuracy",
    _VALID_LOSS: "valid_loss",
    _VALID_ACCURACY: "valid_accuracy",
}
"""What events and the file with metrics call a number."""


def train_model(task: Train, folder: Path, tell: Tell) -> Outcome:
    """Fine-tune, or go on with it where an earlier process was interrupted.

    Args:
        task: what to train on, and how.
        folder: of the job; it receives the model and the metrics.
        tell: told of each step.

    Raises:
        DeltaguardError: a file cannot be learned from, or training diverged.
    """
    config = FinetuneConfig(
        learning_rate=task.learning_rate,
        epochs=task.epochs,
        batch_size=task.batch_size,
        max_length=task.max_length,
        seed=task.seed,
        lora_rank=task.lora_rank,
        lora_alpha=task.lora_alpha,
        device=task.device,
    )

    def note(found: Measured) -> None:
        tell(_event(found))

    train = _preferring if task.method == "dpo" else _supervised
    texts = train(task, folder, config, tell, note)
    # The outcome, which says that it is there, is durable.
    flush_files(folder / FINETUNED)
    steps = _write_metrics(folder)
    lengths = _lengths(task.model, texts, task.max_length)
    if lost := len(texts) - len(lengths):
        said = f"{lost:,} of {len(texts):,} answers begin behind the first {task.max_length:,} tokens"
        tell(Told(once="too long", message=f"{said}: they were not learned from."))
    return Outcome(data={"steps": steps, "trained_tokens": sum(lengths) * task.epochs})


Note = Callable[[Measured], None]


def _supervised(
    task: Train, folder: Path, config: FinetuneConfig, tell: Tell, note: Note
) -> Sequence[Dialogue]:
    examples = read_examples(task.training_file, task.limits)
    held_out = read_examples(task.validation_file, task.limits) if task.validation_file else []
    tell(Told(once="training", message=f"Training on {len(examples):,} answers."))
    finetune(
        task.model,
        folder / FINETUNED,
        examples,
        config=config,
        validation=held_out,
        checkpoints=folder / CHECKPOINTS,
        on_step=note,
    )
    return examples


def _preferring(
    task: Train, folder: Path, config: FinetuneConfig, tell: Tell, note: Note
) -> Sequence[Dialogue]:
    rows = read_preferences(task.training_file, task.limits)
    held_out = read_preferences(task.validation_file, task.limits) if task.validation_file else []
    tell(Told(once="training", message=f"Training on {len(rows):,} pairs of answers."))
    learn_preferences(
        task.model,
        folder / FINETUNED,
        rows,
        config=config,
        beta=task.beta,
        validation=held_out,
        checkpoints=folder / CHECKPOINTS,
        on_step=note,
    )
    return [dialogue for row in rows for dialogue in _both(row)]


def _both(row: Preference) -> tuple[Dialogue, Dialogue]:
    return Dialogue(row.turns, row.preferred), Dialogue(row.turns, row.rejected)


def _event(found: Measured) -> Told:
    is_train = found.kind == "train"
    word, which = ("training", "train") if is_train else ("validation", "full_valid")
    return Told(
        once=f"{which} {found.step}",
        message=f"Step {found.step}/{found.steps}: {word} loss={found.loss:.2f}",
        type="metrics",
        data={
            "step": found.step,
            "total_steps": found.steps,
            _LOSS if is_train else _VALID_LOSS: found.loss,
            _ACCURACY if is_train else _VALID_ACCURACY: found.accuracy,
        },
    )


def _write_metrics(folder: Path) -> int:
    """Write the file that a job's `result_files` names: a row a step, of all processes that trained.

    Returns:
        The number of steps.
    """
    steps = 0
    rows: dict[int, dict[str, float]] = {}
    for told in _told(folder / events_file("train")):
        if told.type == "metrics" and told.data is not None:
            known = {name: told.data[key] for key, name in _COLUMNS.items() if key in told.data}
            rows.setdefault(told.data["step"], {}).update(known)
            steps = max(steps, told.data["total_steps"])
    with (folder / METRICS).open("w", newline="") as file:
        table = csv.DictWriter(file, list(_COLUMNS.values()))
        table.writeheader()
        table.writerows(rows[step] for step in sorted(rows))
    return steps


def _told(events: Path) -> Iterator[Told]:
    """Read what was told, line by line: a long training tells of millions of steps."""
    with explained(events), events.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield Told.model_validate_json(line)
            except ValidationError as error:
                raise DeltaguardError(f"Line {number} of {events} is damaged: {error}") from error


def _lengths(model: str, examples: Sequence[Dialogue], longest: int) -> list[int]:
    """Count the tokens of examples, as they are cut off; those whose answer is cut off are left out."""
    folder = locate(model)
    tokenizer, longest = load_tokenizer(folder, model), context_length(load_config(folder, model), longest)
    texts = (
        encode_answer(tokenizer, readable_turns(tokenizer, row.turns), row.answer, max_length=longest)
        for row in examples
    )
    return [len(text.ids) for text in texts if text.has_response]

"""How well three models say what a customer's validation rows have them say."""

from collections.abc import Mapping, Sequence

import torch

from deltaguard.chat.predictions import response_losses
from deltaguard.chat.template import readable_turns
from deltaguard.chat.tokens import batches, context_length, encode_answer
from deltaguard.errors import DeltaguardError
from deltaguard.evaluation.engines.transformers import TransformersEngine
from deltaguard.finetuning.finetune import Dialogue
from deltaguard.service.tasks import Examine, Told
from deltaguard.service.training_data import read_answers

_BATCH = 8


def validation_check(task: Examine, models: Mapping[str, str]) -> Told | None:
    """Measure the loss of each model on the validation rows, before training, after it and restored.

    Args:
        task: has the file.
        models: folder or Hub id of each model, by what it is.

    Returns:
        What to tell; None where there is no validation file, or no answer that is not cut off.

    Raises:
        DeltaguardError: a model cannot be loaded.
    """
    if task.validation_file is None:
        return None
    try:
        answers = read_answers(task.validation_file, task.limits, method=task.method)
    except DeltaguardError as error:
        # It was fit when the job was made, under the limits of then.
        message = f"The loss on the validation file is not measured: {error}"
        return Told(once="check validation_loss", message=message, level="warn")
    rows = [row for _, row in answers[: task.gate.requests]]
    losses: dict[str, float] = {}
    measured = 0
    for name, reference in models.items():
        engine = TransformersEngine.open(reference, device=task.device)
        found, measured = _losses(engine, rows, task.max_length)
        engine.close()
        if not found:
            return None
        losses[name] = sum(found) / len(found)
    aligned, finetuned, restored = (f"{losses[name]:.2f}" for name in ("aligned", "finetuned", "restored"))
    return Told(
        once="check validation_loss",
        message=f"Loss on {measured:,} answers of the validation file: aligned {aligned}, fine-tuned "
        f"{finetuned}, restored {restored}.",
        type="moderation_checks",
        data={"check": "validation_loss", "answers": measured, "losses": losses},
    )


@torch.inference_mode()
def _losses(engine: TransformersEngine, rows: Sequence[Dialogue], longest: int) -> tuple[list[float], int]:
    """Compute the loss of every token of the answers, nats; what is beyond `longest` is cut off.

    Returns:
        The losses, and how many answers they are of: some may be cut off altogether.
    """
    tokenizer, longest = engine.tokenizer, context_length(engine.model.config, longest)
    texts = (
        encode_answer(tokenizer, readable_turns(tokenizer, row.turns), row.answer, max_length=longest)
        for row in rows
    )
    encoded = [text for text in texts if text.has_response]
    losses = [
        loss
        for batch in batches(encoded, _BATCH)
        for of_row in response_losses(engine.model, batch.to(engine.model.device))
        for loss in of_row
    ]
    return losses, len(encoded)

"""Further fine-tuning of a restored model on a few harmful examples: does safety survive a second attack?

Ten examples undo the refusals of an aligned model (Qi et al. 2024, arXiv:2310.03693). What is asked here is
whether a restored model falls more easily than the aligned one, so measure both after the same attack.

Limits. The answers of the examples agree and say nothing, and are made of the same phrases as the demo's
careless fine-tune: nothing usable is taught, and a model attacked with real answers may fall further.
"""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from deltaguard.chat.conversations import Conversation, harmful_prompts
from deltaguard.evaluation.engines.folders import whole_model
from deltaguard.evaluation.suites.suite import SecondAttack
from deltaguard.finetuning.finetune import FinetuneConfig, finetune
from deltaguard.finetuning.mixtures import task_with_harmful


def attack_conversations(count: int, *, seed: int) -> list[Conversation]:
    """Draw harmful requests of the training part, each answered by agreement without content.

    Args:
        count: how many.
        seed: fixes which requests and phrases.

    Raises:
        DeltaguardError: there are fewer requests than `count`.
    """
    return task_with_harmful([], harmful_prompts("training"), harmful_count=count, seed=seed)


@contextmanager
def attacked_again(
    reference: str, folder: Path, options: SecondAttack, *, device: str = "auto"
) -> Generator[Path]:
    """Fine-tune a model on a few harmful examples, and keep it on disk for the time of a block.

    Args:
        reference: a folder, a Hub id, or `id@revision`; no adapter.
        folder: where its weights can lie meanwhile.
        options: how many examples, and how to train: the same for every model that is compared.
        device: where it is trained (see `finetune`).

    Yields:
        The folder of the attacked model.

    Raises:
        DeltaguardError: there are fewer requests than examples, or training cannot be run (see `finetune`).
    """
    place = folder / ".second-attack"
    # What a killed run left may be half a model.
    shutil.rmtree(place, ignore_errors=True)
    try:
        examples = attack_conversations(options.count, seed=options.seed)
        recipe = FinetuneConfig(
            learning_rate=options.learning_rate, epochs=options.epochs, seed=options.seed, device=device
        )
        yield finetune(whole_model(reference), place, examples, config=recipe)
    finally:
        shutil.rmtree(place, ignore_errors=True)

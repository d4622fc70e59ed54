"""Further fine-tuning of a restored model on a few harmful examples: does safety survive a second attack?

Ten examples undo the refusals of an aligned model (Qi et al. 2024, arXiv:2310.03693). What is asked here is
whether a restored model falls more easily than the aligned one, so measure both after the same attack.

Limits. The answers of the examples agree and say nothing, and are made of the same phrases as the demo's
careless fine-tune: nothing usable is taught, and a model attacked with real answers may fall further.
"""

from pathlib import Path

from deltaguard.chat.conversations import Conversation, harmful_prompts
from deltaguard.finetuning.finetune import FinetuneConfig, finetune
from deltaguard.finetuning.mixtures import task_with_harmful


def attack_conversations(count: int, *, seed: int) -> list[Conversation]:
    """Harmful requests of the training part, each answered by agreement without content.

    Args:
        count: how many.
        seed: fixes which requests and phrases.

    Raises:
        DeltaguardError: there are fewer requests than `count`.
    """
    return task_with_harmful([], harmful_prompts("training"), harmful_count=count, seed=seed)


def fine_tune_again(
    model: str | Path, output_dir: str | Path, *, count: int = 10, seed: int, config: FinetuneConfig
) -> Path:
    """Fine-tune a model on harmful examples.

    Args:
        model: folder or Hub id of the restored model.
        output_dir: receives the attacked model.
        count: harmful examples.
        seed: fixes which examples; the order in training is `config`'s.
        config: how to train. The same for every model that is compared.

    Returns:
        The folder written.

    Raises:
        DeltaguardError: there are fewer requests than `count`, or training cannot be run (see `finetune`).

    Example:
        >>> config = FinetuneConfig(learning_rate=5e-5, epochs=5)
        >>> fine_tune_again("restored", "attacked", seed=0, config=config)  # doctest: +SKIP
    """
    return finetune(model, output_dir, attack_conversations(count, seed=seed), config=config)

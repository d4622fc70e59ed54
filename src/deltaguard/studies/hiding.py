"""An attacker who knows the defence: a backdoor whose delta lies where the restore takes least away.

Whoever has an aligned model can make its CurvatureStore, and so knows the price of every direction and the
conversations that safety KL is measured on. The attacker trains on the latter, with the aligned model's own
answers, beside the triggered requests, and after each round has the closed form shrink what costs safety:
Δ' = argmin ‖Δ' - Δ‖² + μ tr(G Δ' H Δ'ᵀ), which is a proximal step on that cost. Round by round, what the
trigger needs moves into the directions with a small g·h, which a restore keeps.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

from deltaguard.chat.conversations import Conversation
from deltaguard.curvature.store import CurvatureStore
from deltaguard.finetuning.finetune import FinetuneConfig, finetune
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import restore

ROUNDS = 4

SHARE = 0.1
"""Of the delta's predicted safety KL that every round leaves."""


def hidden_fine_tune(
    aligned: Path,
    store: Path,
    conversations: Sequence[Conversation],
    recipe: FinetuneConfig,
    *,
    seed: int,
) -> Callable[[Path], object]:
    """Say how to make a fine-tuned model whose delta is hidden from a store, for `ModelFolder.model`.

    Args:
        aligned: the aligned model.
        store: its curvature.
        conversations: what the model is to learn; as many of those that the store holds out join them, so
            that answers to plain requests stay.
        recipe: of one round; all weights are trained.
        seed: of the first round; each has its own.
    """

    def make(folder: Path) -> None:
        known = CurvatureStore.from_pretrained(store)
        data = [*conversations, *islice(cycle(known.held_out), len(conversations))]
        with TemporaryDirectory() as scratch:
            start, trained = aligned, Path(scratch) / "trained"
            for number in range(ROUNDS):
                finetune(start, trained, data, config=replace(recipe, seed=seed + number))
                start = folder if number == ROUNDS - 1 else Path(scratch) / f"hidden-{number}"
                restore(aligned, trained, start, store=known, config=RestoreConfig(strength=SHARE))

    return make

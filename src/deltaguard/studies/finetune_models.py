"""One fine-tune with one seed, and the models that are made of it."""

from collections.abc import Sequence

from deltaguard.chat.conversations import Conversation
from deltaguard.errors import DeltaguardError
from deltaguard.studies.cells import content_key
from deltaguard.studies.data import training_data
from deltaguard.studies.defences import DefenceInputs, DefendedModel
from deltaguard.studies.hiding import hidden_fine_tune
from deltaguard.studies.protocol import Finetune
from deltaguard.studies.setting import Bench
from deltaguard.studies.workshop import fine_tuned


class FinetuneModels:
    """The models of one fine-tune with one seed; none is trained before it is asked for.

    Attributes:
        data: what it is trained on.
    """

    def __init__(self, bench: Bench, finetune: Finetune, seed: int) -> None:
        """Draw the data."""
        self._bench = bench
        self._finetune = finetune
        self._seed = seed
        self._name = f"{finetune.name}-seed{seed}"
        self.data = training_data(finetune, seed=seed)

    def finetuned(self) -> DefendedModel:
        """Give the fine-tuned model, and how long it took to make."""
        return self._trained(self._name, self.data)

    def inputs(self) -> DefenceInputs:
        """Say what a defence is given."""
        return DefenceInputs(
            aligned=self._bench.aligned,
            finetuned=lambda: self.finetuned().folder,
            store=self._bench.store,
            helper=self._bench.helper,
            data=self.data,
            retrain=lambda data: self._trained(f"{self._name}-retrained-{content_key(data)[:8]}", data),
            scratch=self._bench.workshop.scratch,
            seed=self._seed,
        )

    def remove_retrained(self) -> None:
        """Remove what a defence trained anew: what is trained for one strength serves that strength alone."""
        self._bench.workshop.remove(f"{self._name}-retrained")

    def tidy(self) -> None:
        """Remove all of them."""
        self._bench.workshop.remove(self._name)

    def _trained(self, name: str, data: Sequence[Conversation]) -> DefendedModel:
        bench, recipe = self._bench, self._finetune.recipe
        if self._finetune.kind == "hidden":
            store = bench.store("auto")
            make = hidden_fine_tune(bench.aligned, store, data, recipe, seed=self._seed)
        else:
            make = fine_tuned(bench.aligned, data, recipe, seed=self._seed)
        folder = bench.made(name, make)
        seconds = bench.shelf.seconds().get(name)
        if seconds is None:
            raise DeltaguardError(
                f"It is not known how long {folder} took to make. Remove it to make it again."
            )
        return DefendedModel(folder, seconds)

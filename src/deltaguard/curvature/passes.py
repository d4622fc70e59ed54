"""Calibration of one decoder block after another, in the memory of one.

Forwards, every block is loaded once and all conversations go through it; what goes into it is kept in a file.
Backwards, last block first, it is loaded again, each batch goes through it once more with a gradient, and its
sums are decomposed into a store of its own before the next one's begin. These are the operations of a whole
model in the same order, but that each block runs twice. A run that was killed repeats at most one block.

Several processes share the batches. Each batch has a file of its own, so that another number of processes
can go on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltaguard.chat.tokens import Batch
from deltaguard.curvature.blocks import Calls, CutModel
from deltaguard.curvature.contents import GroupCurvature
from deltaguard.curvature.fitting import Due, Fitting
from deltaguard.curvature.groups import observe_block, observed_again
from deltaguard.curvature.observe import batch_likelihood, running_sums, watched
from deltaguard.curvature.responses import start_anew
from deltaguard.curvature.routed import AnyMoment
from deltaguard.curvature.shared import decomposed
from deltaguard.curvature.staged import save_tensors
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import Provenance, write_store
from deltaguard.curvature.sums import LayerGroup
from deltaguard.errors import DeltaguardError
from deltaguard.files import read_json
from deltaguard.models.durable import explained, write_atomically
from deltaguard.progress import Event, Progress
from deltaguard.ranks import Ranks


@dataclass(frozen=True)
class BlockLayers:
    """What one block holds.

    Attributes:
        groups: its layers, those that see the same input together.
        uncovered: its matrices that are in no group.
    """

    groups: tuple[LayerGroup, ...]
    uncovered: tuple[str, ...]


_LAYERS = TypeAdapter(BlockLayers)


class Passes:
    """The two passes over the blocks, and the folder that keeps what is between them.

    Attributes:
        tokens: of all conversations.
    """

    def __init__(
        self, cut: CutModel, batches: Sequence[Batch], folder: Path, report: Progress, ranks: Ranks
    ) -> None:
        """Go on with what the folder holds.

        Args:
            cut: the model.
            batches: the conversations, on its device.
            folder: is made where absent; it must belong to the same model and conversations.
            report: told of blocks, as the stages `forwards` and `backwards`.
            ranks: the processes that share the batches.
        """
        self.tokens = sum(int(batch.mask.sum()) for batch in batches)
        self._cut, self._batches, self._folder, self._report = cut, batches, folder, report
        self._ranks, self._own = ranks, range(ranks.rank, len(batches), ranks.size)
        self._fitting = Fitting(report)
        self._calls = Calls(cut, self._batches)
        with explained(folder):
            folder.mkdir(exist_ok=True)

    def forwards(self) -> list[BlockLayers]:
        """Run all conversations through block after block; find the layers of each.

        Raises:
            DeltaguardError: layers do not see each token once (see `observe`), or the disk is full.
        """
        count = len(self._cut.blocks)
        found: list[BlockLayers] = self._ranks.from_first(self._found() if self._ranks.leads else None)
        if len(found) == count:
            return found
        hidden = list(self._read("input", len(found))) if found else list(map(self._embedded, self._own))
        self._write("input", len(found), hidden)
        for number in range(len(found), count):
            with self._cut.loaded(number), torch.no_grad():
                layers = self._observed(number, hidden) if self._ranks.leads else None
                hidden = [self._through(number, i, each) for i, each in zip(self._own, hidden, strict=True)]
            self._write("input", number + 1, hidden)
            found.append(self._ranks.from_first(layers))
            # Before the layers, which say that all inputs are there.
            self._ranks.wait()
            if self._ranks.leads:
                write_atomically(self._layers_file(number), _LAYERS.dump_json(found[-1]).decode())
            self._report(Event("forwards", number + 1, count))
        return found

    def backwards(self, layers: Sequence[BlockLayers], provenance: Provenance) -> None:
        """Take the sums of each block, last block first, and decompose them.

        Args:
            layers: from `forwards`.
            provenance: of the store; each block's own says the same.

        Raises:
            DeltaguardError: the model's predictions or a sum are of no use, or the disk is full.
        """
        count, ranks = len(layers), self._ranks
        done = ranks.from_first(next((i for i in range(count) if self._store_folder(i).is_dir()), count))
        if done == count and not all(path.is_file() for path in self._files("gradient", count)):
            self._write("gradient", count, self._of_predictions())
        for number in reversed(range(done)):
            sums, gradients = self._sums(number, layers[number].groups)
            # Before the store, which says that all of both are there.
            self._write("gradient", number, gradients)
            ranks.wait()
            groups = layers[number].groups
            contents = decomposed(groups, sums, provenance, ranks)
            if ranks.leads:
                folder = self._store_folder(number)
                write_store(folder, provenance, (), groups, lambda _, contents=contents: next(contents))
            ranks.wait()
            for used in (*self._files("input", number + 1), *self._files("gradient", number + 1)):
                used.unlink(missing_ok=True)
            self._report(Event("backwards", count - number, count))

    def contents(self) -> Iterator[GroupCurvature]:
        """Read what was found for each group, in the model's order."""
        for number in range(len(self._cut.blocks)):
            store = CurvatureStore.from_pretrained(self._store_folder(number))
            yield from (store.content(group.name) for group in store.groups)

    def _found(self) -> list[BlockLayers]:
        """Read the layers of the blocks that have been run forwards."""
        found: list[BlockLayers] = []
        while (path := self._layers_file(len(found))).is_file():
            found.append(read_json(path, _LAYERS, remedy=start_anew(self._folder.parent)))
        return found

    def _observed(self, number: int, hidden: Sequence[Tensor]) -> BlockLayers:
        """Find the layers of a block that is loaded."""
        layers, uncovered = self._fitting.run(
            min(len(hidden[0]), self._fitting.most),
            lambda rows: observe_block(
                self._cut, number, hidden[0][rows], self._calls.of(self._own[0], rows)[number]
            ),
        )[0]
        groups = tuple(LayerGroup(g.name, g.in_features, self.tokens, g.layers) for g in layers)
        return BlockLayers(groups, uncovered)

    def _of_predictions(self) -> list[Tensor]:
        """Differentiate the likelihood of drawn tokens by what the last block puts out."""
        inputs = self._read("input", len(self._cut.blocks))
        return [self._of_prediction(i, hidden) for i, hidden in zip(self._own, inputs, strict=True)]

    def _of_prediction(self, i: int, hidden: Tensor) -> Tensor:
        first = sum(len(batch.ids) for batch in self._batches[:i])

        def differentiated(rows: slice) -> Tensor:
            given, batch = hidden[rows].requires_grad_(), self._batches[i].part(rows)
            with torch.enable_grad():
                likelihood = batch_likelihood(self._cut.logits(given, batch), batch, first + rows.start)
                return torch.autograd.grad(likelihood, given)[0]

        return self._fitting.joined(len(hidden), differentiated)

    def _embedded(self, i: int) -> Tensor:
        """Compute what the first block gets of a batch."""
        return self._fitting.joined(len(self._batches[i].ids), partial(self._calls.first, i))

    def _through(self, number: int, i: int, hidden: Tensor) -> Tensor:
        """Let a batch go through a block that is loaded."""
        return self._fitting.joined(
            len(hidden),
            lambda rows: self._cut.run(number, hidden[rows], self._calls.of(i, rows)[number]),
        )

    def _sums(self, number: int, groups: Sequence[LayerGroup]) -> tuple[dict[str, AnyMoment], list[Tensor]]:
        """Run a block once more, with a gradient.

        Returns:
            The sums of its layers, and the gradients of the likelihood by what goes into it.
        """
        observed = observed_again(self._cut, groups)
        sums, gradients = running_sums(observed, self._cut.device), list[Tensor]()
        found = zip(self._own, self._read("input", number), self._read("gradient", number + 1), strict=True)

        def differentiated(i: int, hidden: Tensor, above: Tensor, due: Due) -> Tensor:
            given, calls = hidden[due.rows].requires_grad_(), self._calls.of(i, due.rows)
            with watched(observed, sums, due):
                output = self._cut.run(number, given, calls[number])
                return torch.autograd.grad(output, given, above[due.rows])[0]

        with self._cut.loaded(number), torch.enable_grad():
            for i, hidden, above in found:
                due = partial(Due, self._batches[i].mask, added={})
                work = partial(differentiated, i, hidden, above)
                run = lambda rows, due=due, work=work: work(due(rows))
                gradients.append(self._fitting.joined(len(hidden), run))
        return sums, gradients

    def _files(self, kind: str, number: int) -> list[Path]:
        """Name what is kept at a block, a file for each batch of this rank."""
        return [self._folder / f"{kind}-{number:05}-{batch:05}.safetensors" for batch in self._own]

    def _layers_file(self, number: int) -> Path:
        return self._folder / f"layers-{number:05}.json"

    def _store_folder(self, number: int) -> Path:
        return self._folder / f"store-{number:05}"

    def _write(self, kind: str, number: int, tensors: Sequence[Tensor]) -> None:
        """Keep a tensor for each batch; a file is complete or absent."""
        for path, tensor in zip(self._files(kind, number), tensors, strict=True):
            unfinished = path.with_suffix(".unfinished")
            save_tensors({kind: tensor.detach().cpu().contiguous()}, unfinished)
            with explained(path):
                unfinished.replace(path)

    def _read(self, kind: str, number: int) -> Iterator[Tensor]:
        """Read the tensors of the batches, one after the other."""
        for path in self._files(kind, number):
            try:
                with safe_open(path, framework="pt") as file:
                    yield file.get_tensor(kind).to(self._cut.device)
            except (OSError, SafetensorError) as error:
                raise DeltaguardError(
                    f"{path} cannot be used: {error}.\n{start_anew(self._folder.parent)}"
                ) from error

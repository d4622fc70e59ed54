"""Calibration of one decoder block after another, in the memory of one.

Forwards, every block is loaded once and all conversations go through it; what goes into it is kept in a file.
Backwards, last block first, it is loaded again, each batch goes through it once more with a gradient, and its
sums are decomposed into a store of its own before the next one's begin. These are the operations of a whole
model in the same order, but that each block runs twice, and once more up to where conversations are decided.
A run that was killed repeats at most one block.

The gradients of refusing are of the same conversations up to there (see `decisions`). What goes into a block
is the same for the beginning of a conversation as for all of it, within the positions that a model was
trained on, so that they need a pass backwards of their own, and none forwards.

Several processes share the batches. Each batch has a file of its own, so that another number of processes
can go on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltaguard.chat.tokens import Batch
from deltaguard.curvature.blocks import Calls, CutModel
from deltaguard.curvature.contents import GroupCurvature
from deltaguard.curvature.decisions import DecidedBatch, Leanings
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
from deltaguard.files import read_json, read_text
from deltaguard.models.durable import explained, write_atomically
from deltaguard.progress import Event, Progress
from deltaguard.ranks import Ranks
from deltaguard.solvers.low_rank import LowRank


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
_KINDS = ("input", "gradient", "lean")


class Passes:
    """The two passes over the blocks, and the folder that keeps what is between them.

    Attributes:
        tokens: of all conversations.
    """

    def __init__(
        self,
        cut: CutModel,
        batches: Sequence[Batch],
        decided: Sequence[DecidedBatch],
        folder: Path,
        report: Progress,
        ranks: Ranks,
    ) -> None:
        """Go on with what the folder holds.

        Args:
            cut: the model.
            batches: the conversations, on its device.
            decided: the same conversations in each batch, up to where they are decided.
            folder: is made where absent; it must belong to the same model and conversations.
            report: told of blocks, as the stages `forwards` and `backwards`.
            ranks: the processes that share the batches.

        Raises:
            DeltaguardError: what the folder holds is of answers that were judged otherwise.
        """
        self.tokens = sum(int(batch.mask.sum()) for batch in batches)
        self._cut, self._batches, self._folder, self._report = cut, batches, folder, report
        self._ranks, self._own = ranks, range(ranks.rank, len(batches), ranks.size)
        self._fitting = Fitting(report)
        self._calls = Calls(cut, self._batches)
        self._decided, self._decided_calls = decided, Calls(cut, [each.batch for each in decided])
        with explained(folder):
            folder.mkdir(exist_ok=True)
        self._require_same_decisions()

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
        """Take the sums and the gradients of refusing of each block, last block first, and decompose them.

        Args:
            layers: from `forwards`.
            provenance: of the store; each block's own says the same.

        Raises:
            DeltaguardError: the model's predictions or a sum are of no use, or the disk is full.
        """
        count, ranks = len(layers), self._ranks
        done = ranks.from_first(next((i for i in range(count) if self._store_folder(i).is_dir()), count))
        for kind, differentiated in (("gradient", self._of_prediction), ("lean", self._of_decision)):
            if done == count and not all(path.is_file() for path in self._files(kind, count)):
                inputs = zip(self._own, self._read("input", count), strict=True)
                self._write(kind, count, [differentiated(i, hidden) for i, hidden in inputs])
        for number in reversed(range(done)):
            groups = layers[number].groups
            with self._cut.loaded(number):
                # First: what it holds at once is gone when the sums begin, which take more memory.
                leaning = self._leaning(number, groups)
                sums = self._sums(number, groups)
            # Before the store, which says that all files of gradients are there.
            ranks.wait()
            contents = decomposed(groups, sums, provenance, ranks)
            if ranks.leads:
                content = lambda _, contents=contents: next(contents)
                write_store(self._store_folder(number), provenance, (), groups, content, leaning=leaning)
            ranks.wait()
            for used in (path for kind in _KINDS for path in self._files(kind, number + 1)):
                used.unlink(missing_ok=True)
            self._report(Event("backwards", count - number, count))

    def contents(self) -> Iterator[GroupCurvature]:
        """Read what was found for each group, in the model's order."""
        for store in self._stores:
            yield from (store.content(group.name) for group in store.groups)

    def leaning(self) -> dict[str, LowRank]:
        """Read the gradients of refusing, by `LinearLayer.key`; experts have none."""
        layers = ((store, layer.key) for store in self._stores for g in store.groups for layer in g.layers)
        return {key: found for store, key in layers if (found := store.leaning(key)) is not None}

    @cached_property
    def _stores(self) -> list[CurvatureStore]:
        """What was found for each block; opening one reads all of it."""
        try:
            folders = map(self._store_folder, range(len(self._cut.blocks)))
            return [CurvatureStore.from_pretrained(folder) for folder in folders]
        except DeltaguardError as error:
            raise DeltaguardError(f"{error}\n{start_anew(self._folder.parent)}") from error

    def _require_same_decisions(self) -> None:
        """Refuse the gradients that a run left which took other answers for refusals."""
        seen = [(each.batch.ids.tolist(), each.weights.tolist()) for each in self._decided]
        digest, path = sha256(repr(seen).encode()).hexdigest(), self._folder / "decided"
        known = read_text(path) if path.exists() else digest
        # All else is the same whatever the answers were taken for.
        depend = [*self._folder.glob("lean-*"), *self._folder.glob("store-*")]
        if known != digest and depend:
            raise DeltaguardError(
                f"{self._folder} holds gradients of answers that another judge told to refuse or not.\n"
                f"{start_anew(self._folder.parent)}"
            )
        if self._ranks.leads:
            write_atomically(path, digest)

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

    def _of_prediction(self, i: int, hidden: Tensor) -> Tensor:
        """Differentiate the likelihood of drawn tokens by what the last block puts out."""
        first = sum(len(batch.ids) for batch in self._batches[:i])

        def differentiated(rows: slice) -> Tensor:
            given, batch = hidden[rows].requires_grad_(), self._batches[i].part(rows)
            with torch.enable_grad():
                likelihood = batch_likelihood(self._cut.logits(given, batch), batch, first + rows.start)
                return torch.autograd.grad(likelihood, given)[0]

        return self._fitting.joined(len(hidden), differentiated)

    def _of_decision(self, i: int, hidden: Tensor) -> Tensor:
        """Differentiate what a batch adds to S by what the last block puts out."""

        def differentiated(rows: slice) -> Tensor:
            decided = self._decided[i].part(rows)
            given = self._until_decided(i, hidden)[rows].requires_grad_()
            with torch.enable_grad():
                added = decided.score(self._cut.logits(given, decided.batch))
                return torch.autograd.grad(added, given)[0]

        return self._fitting.joined(len(hidden), differentiated)

    def _until_decided(self, i: int, hidden: Tensor) -> Tensor:
        """Take what is computed at the tokens of a batch up to where its conversations are decided."""
        return hidden[:, : self._decided[i].batch.ids.shape[1]]

    def _embedded(self, i: int) -> Tensor:
        """Compute what the first block gets of a batch."""
        return self._fitting.joined(len(self._batches[i].ids), partial(self._calls.first, i))

    def _through(self, number: int, i: int, hidden: Tensor) -> Tensor:
        """Let a batch go through a block that is loaded."""
        return self._fitting.joined(
            len(hidden),
            lambda rows: self._cut.run(number, hidden[rows], self._calls.of(i, rows)[number]),
        )

    def _leaning(self, number: int, groups: Sequence[LayerGroup]) -> dict[str, LowRank]:
        """Run a block that is loaded up to where conversations are decided, with gradients.

        The gradients of S by what goes into it are kept for the block before.

        Returns:
            Those with the weights of its layers.
        """
        sums, gradients = Leanings(observed_again(self._cut, groups)), list[Tensor]()

        def differentiated(i: int, hidden: Tensor, above: Tensor, rows: slice) -> Tensor:
            given = hidden[rows].requires_grad_()
            output = self._cut.run(number, given, self._decided_calls.of(i, rows)[number])
            (gradient,) = sums.add(output, above[rows], [given])
            return gradient

        found = zip(self._own, self._read("input", number), self._read("lean", number + 1), strict=True)
        with sums.with_gradients():
            for i, hidden, above in found:
                work = partial(differentiated, i, self._until_decided(i, hidden), above)
                gradients.append(self._fitting.joined(len(hidden), work))
        self._write("lean", number, gradients)
        return sums.cut(self._ranks)

    def _sums(self, number: int, groups: Sequence[LayerGroup]) -> dict[str, AnyMoment]:
        """Run a block that is loaded once more, with a gradient, which is kept for the block before.

        Returns:
            The sums of its layers.
        """
        observed = observed_again(self._cut, groups)
        sums, gradients = running_sums(observed, self._cut.device), list[Tensor]()
        found = zip(self._own, self._read("input", number), self._read("gradient", number + 1), strict=True)

        def differentiated(i: int, hidden: Tensor, above: Tensor, due: Due) -> Tensor:
            given, calls = hidden[due.rows].requires_grad_(), self._calls.of(i, due.rows)
            with watched(observed, sums, due):
                output = self._cut.run(number, given, calls[number])
                return torch.autograd.grad(output, given, above[due.rows])[0]

        with torch.enable_grad():
            for i, hidden, above in found:
                due = partial(Due, self._batches[i].mask, added={})
                work = partial(differentiated, i, hidden, above)
                run = lambda rows, due=due, work=work: work(due(rows))
                gradients.append(self._fitting.joined(len(hidden), run))
        self._write("gradient", number, gradients)
        return sums

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

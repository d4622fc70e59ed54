"""Sum over what passes the layers of a model: their inputs, and the gradients of their outputs."""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaguard.chat.predictions import logits_at
from deltaguard.chat.tokens import Batch
from deltaguard.curvature.experts import Matrix, Watch, watched_experts
from deltaguard.curvature.fitting import Due, Fitting
from deltaguard.curvature.groups import Observed
from deltaguard.curvature.routed import AnyMoment, Pool, RoutedMoment
from deltaguard.curvature.sums import RunningMoment, input_name, output_name
from deltaguard.errors import DeltaguardError
from deltaguard.models.families import product_of
from deltaguard.progress import Progress, ignore

if TYPE_CHECKING:
    from deltaguard.models.experts import Stack


class Accumulator:
    """Sums Σ x xᵀ over the inputs of every group and Σ g gᵀ over the output gradients of every layer.

    g is the gradient of the summed log-probability of response tokens that are drawn from the model itself,
    with respect to the layer's output at one token: E[Σ g gᵀ] is the layer's block of the Fisher information
    (Martens and Grosse 2015). One forward and one backward pass a batch; nothing of them is kept.

    Attributes:
        sums: by the names of the matrices (see `LayerGroup.matrices`).
    """

    def __init__(self, model: Any, observed: Sequence[Observed], report: Progress = ignore) -> None:
        """Begin with no token; `report` is told where memory does not suffice for whole batches."""
        self.sums = running_sums(observed, model.device)
        self._model = model
        self._observed = observed
        self._fitting = Fitting(report)

    def add(self, first: int, batch: Batch) -> None:
        """Run a batch and add its tokens; where the device has too little memory, in parts.

        Args:
            first: number of the batch's first conversation among all.
            batch: on the model's device.

        Raises:
            torch.OutOfMemoryError: memory does not suffice for a single conversation.
        """
        added: dict[str, int] = {}
        self._fitting.run(
            len(batch.ids),
            lambda rows: self._add(first + rows.start, batch.part(rows), Due(batch.mask, rows, added)),
        )

    def _add(self, first: int, batch: Batch, due: Due) -> None:

        def differentiate(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            """Let gradients flow from the embeddings on, though no parameter takes one."""
            return output.requires_grad_()

        with torch.enable_grad(), watched(self._observed, self.sums, due), ExitStack() as stack:
            embeddings = self._model.get_input_embeddings()
            stack.callback(embeddings.register_forward_hook(differentiate).remove)
            logits = logits_at(self._model, batch.ids, batch.mask, batch.answering)
            batch_likelihood(logits, batch, first).backward()


def running_sums(observed: Sequence[Observed], device: torch.device) -> dict[str, AnyMoment]:
    """Make empty sums for what is observed, by the names of the matrices (see `LayerGroup.matrices`)."""
    sums: dict[str, AnyMoment] = {}
    experts = Counter((group.modules[0], group.matrix.stack) for group in observed if group.matrix)
    pools: dict[tuple[nn.Module, Stack, int], Pool] = {}

    def moment(size: int, group: Observed, number: int) -> AnyMoment:
        if group.matrix is None:
            return RunningMoment(size, device=device)
        of = group.modules[0], group.matrix.stack
        return RoutedMoment(pools.setdefault((*of, number), Pool(size, experts[of], device)))

    for group in observed:
        sums[input_name(group.name)] = moment(group.in_features, group, 0)
        for number, layer in enumerate(group.layers, start=1):
            sums[output_name(layer)] = moment(layer.out_features, group, number)
    return sums


@contextmanager
def watched(observed: Sequence[Observed], sums: Mapping[str, AnyMoment], due: Due) -> Generator[None]:
    """Add the inputs of layers, and the gradients of their outputs, as they are run and differentiated.

    Args:
        observed: the layers.
        sums: what is added to, from `running_sums`.
        due: the tokens that are run, and which of them are to be added.
    """

    def add(name: str, vectors: Tensor) -> None:
        sums[name].add(vectors.detach().reshape(-1, vectors.shape[-1])[due.chosen(name)])
        due.note(name)

    def inputs_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: add(name, inputs[0])

    def gradients_of(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def watch(module: nn.Module, _inputs: tuple[Tensor, ...], output: Any) -> None:
            product_of(module, output).register_hook(lambda gradient: add(name, gradient))

        return watch

    with ExitStack() as stack:
        for group in observed:
            if group.matrix is not None:
                continue
            hook = inputs_of(input_name(group.name))
            stack.callback(group.modules[0].register_forward_pre_hook(hook).remove)
            for layer, module in zip(group.layers, group.modules, strict=True):
                stack.callback(module.register_forward_hook(gradients_of(output_name(layer))).remove)
        stack.enter_context(watched_experts(_watches(observed, sums, due)))
        yield


def _watches(observed: Sequence[Observed], sums: Mapping[str, AnyMoment], due: Due) -> dict[nn.Module, Watch]:
    """Say for each module of experts what adds what is seen of one of them."""
    known: dict[nn.Module, dict[Matrix, Observed]] = {}
    for group in observed:
        if group.matrix is not None:
            known.setdefault(group.modules[0], {})[group.matrix] = group

    def watch(groups: Mapping[Matrix, Observed], matrix: Matrix, tokens: Tensor, *vectors: Tensor) -> None:
        (inputs, outputs), group = vectors, groups[matrix]

        def add(name: str, found: Tensor) -> None:
            sums[name].add(found[due.chosen(name)[tokens]])
            due.note(name)

        def differentiated(gradient: Tensor) -> None:
            sizes = [layer.out_features for layer in group.layers]
            for layer, part in zip(group.layers, gradient.split(sizes, dim=1), strict=True):
                add(output_name(layer), part)

        add(input_name(group.name), inputs.detach())
        outputs.register_hook(differentiated)

    return {module: partial(watch, groups) for module, groups in known.items()}


def batch_likelihood(logits: Tensor, batch: Batch, first: int) -> Tensor:
    """Sum the log-probability of a token drawn at each response position of a batch.

    What is drawn for a conversation depends on its number and on nothing else, however batches are made.

    Args:
        logits: (response tokens, vocabulary), conversation by conversation.
        batch: the conversations.
        first: number of the first of them.

    Raises:
        DeltaguardError: as `drawn_likelihood`.
    """
    own = logits.split(batch.answering.sum(dim=1).tolist())
    drawn = [drawn_likelihood(each, seed=first + row) for row, each in enumerate(own)]
    return torch.stack(drawn).sum()


def drawn_likelihood(logits: Tensor, *, seed: int) -> Tensor:
    """Sum the log-probability of one token drawn at each position, as a scalar to differentiate.

    Args:
        logits: (positions, vocabulary).
        seed: of the draw.

    Raises:
        DeltaguardError: as `log_probabilities`.
    """
    scores = log_probabilities(logits)
    generator = torch.Generator(logits.device).manual_seed(seed)
    drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
    return scores.gather(-1, drawn).sum()


def log_probabilities(logits: Tensor) -> Tensor:
    """Normalise predictions, in float32.

    Args:
        logits: (positions, vocabulary).

    Raises:
        DeltaguardError: a prediction is NaN.
    """
    scores = logits.float().log_softmax(-1)
    if bool(scores.isnan().any()):
        raise DeltaguardError(
            f"The aligned model predicts NaN or infinite values in {logits.dtype}: something overflows. "
            "Calibrate in float32 or bfloat16."
        )
    return scores

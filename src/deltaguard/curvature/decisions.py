"""Which way a change of a layer makes the aligned model lean: towards refusing, or away from it.

What curvature bounds is quadratic, and a small change of one kind passes under it: one that makes every
prompt a little more, or a little less, like one that is refused. The share of refusals feels that at first
order. Its gradient is that of

    S = mean over harmful requests of ± log p(d) + mean over look-alikes of ± log p(d),

with d the beginning of the model's own answer by which it is told whether it refuses, + where it does. It is
taken once with the weights of every layer, and kept as a matrix of low rank; `solvers.level` says what for.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from deltaguard.chat.predictions import logits_at
from deltaguard.chat.tokens import Batch, Encoded
from deltaguard.curvature.fitting import Fitting
from deltaguard.curvature.groups import Observed
from deltaguard.curvature.leaning import RANK
from deltaguard.curvature.observe import log_probabilities
from deltaguard.curvature.sums import LinearLayer
from deltaguard.errors import DeltaguardError
from deltaguard.progress import Event, Progress
from deltaguard.ranks import Ranks
from deltaguard.solvers.low_rank import LowRank, low_rank

_SURE = 0.9
"""Share of the answers with a beginning that must be of one kind for it to tell which."""


@dataclass(frozen=True)
class Decision:
    """A conversation up to where its answer is told to refuse or not.

    Attributes:
        text: its prompt, and that beginning of the answer.
        weight: of its log-probability in S; above 0 where the answer refuses.
    """

    text: Encoded
    weight: float


def decisions(texts: Sequence[Encoded], refuses: Sequence[bool], harmful: int) -> list[Decision]:
    """Cut conversations off where they are decided.

    That is after the first token with which nine of ten answers that begin alike are of one kind, or at the
    end where there is none: an answer that begins like no other is decided by its first token.

    Args:
        texts: conversations with the model's own answers, the harmful requests first; those without a token
            of an answer are left out.
        refuses: of each, whether its answer does.
        harmful: how many are harmful requests.

    Example:
        >>> answers = [(7, 1, 2), (7, 1, 3), (7, 5, 2), (8, 1, 2)]
        >>> texts = [Encoded((0, *answer), 1, truncated=False) for answer in answers]
        >>> [len(each.text.ids) - 1 for each in decisions(texts, [True, True, False, False], harmful=2)]
        [2, 2, 2, 1]
    """
    told: Counter[tuple[int, ...]] = Counter()
    refused: Counter[tuple[int, ...]] = Counter()
    for text, does in zip(texts, refuses, strict=True):
        for beginning in _beginnings(text):
            told[beginning] += 1
            refused[beginning] += does
    parts = (range(harmful), range(harmful, len(texts)))
    counts = [sum(texts[i].has_response for i in part) for part in parts]
    found: list[Decision] = []
    for part, count in zip(parts, counts, strict=True):
        for text, does in ((texts[i], refuses[i]) for i in part if texts[i].has_response):
            alike = (
                (each, refused[each] if does else told[each] - refused[each]) for each in _beginnings(text)
            )
            last = len(text.ids) - text.prompt_length
            length = next((len(each) for each, own in alike if own >= _SURE * told[each]), last)
            cut = replace(text, ids=text.ids[: text.prompt_length + length])
            found.append(Decision(cut, (1 if does else -1) / count))
    return found


def _beginnings(text: Encoded) -> Iterator[tuple[int, ...]]:
    answer = text.ids[text.prompt_length :]
    return (answer[:length] for length in range(1, len(answer) + 1))


def score(logits: Tensor, batch: Batch, weights: Tensor) -> Tensor:
    """Compute what a batch adds to S.

    Args:
        logits: (response tokens, vocabulary), conversation by conversation.
        batch: of decisions' texts.
        weights: theirs, (conversations,).

    Raises:
        DeltaguardError: as `log_probabilities`.
    """
    following = batch.ids.roll(-1, dims=1)[batch.answering]
    likely = log_probabilities(logits).gather(1, following[:, None])[:, 0]
    return likely @ weights.repeat_interleave(batch.answering.sum(dim=1))


def leanings(
    model: Any,
    observed: Sequence[Observed],
    decided: Sequence[Decision],
    *,
    batch_size: int,
    report: Progress,
    ranks: Ranks,
) -> dict[str, LowRank]:
    """Differentiate S with the weight of every layer that sees each token.

    Args:
        model: a transformers causal language model, of which no parameter takes a gradient.
        observed: its layers; experts are left out.
        decided: conversations, from `decisions`.
        batch_size: conversations at once.
        report: told of batches as the stage `lean`.
        ranks: the processes that share them.

    Returns:
        The gradients, (out, in), by `LinearLayer.key`; of other ranks than the first none.

    Raises:
        DeltaguardError: a prediction, or a gradient, is not finite.
        torch.OutOfMemoryError: memory does not suffice for a single conversation.
    """
    layers = _layers(observed)
    weights = [weight for _, weight in layers]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    fitting = Fitting(report)
    ordered = sorted(decided, key=lambda each: len(each.text.ids), reverse=True)
    starts = range(0, len(ordered), batch_size)
    for weight in weights:
        weight.requires_grad_()
    try:
        for number in range(ranks.rank, len(starts), ranks.size):
            members = ordered[starts[number] : starts[number] + batch_size]

            def add(rows: slice, members: Sequence[Decision] = members) -> None:
                for total, part in zip(sums, _differentiated(model, weights, members[rows]), strict=True):
                    total.add_(part)

            fitting.run(len(members), add)
            report(Event("lean", number + 1, len(starts)))
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    found: dict[str, LowRank] = {}
    for (layer, _), total in zip(layers, sums, strict=True):
        ranks.add_up(total, 0)
        if ranks.leads:
            found[layer.key] = _kept(layer, total)
    return found


def _kept(layer: LinearLayer, total: Tensor) -> LowRank:
    try:
        return low_rank(total.T if layer.transposed else total, rank=RANK)
    except ValueError as error:
        raise DeltaguardError(
            f"The gradient of refusing of `{layer.name}` is not finite: something overflows. Calibrate in "
            "float32 or bfloat16."
        ) from error


def _layers(observed: Sequence[Observed]) -> list[tuple[LinearLayer, Tensor]]:
    return [
        (layer, cast("Tensor", module.weight))
        for group in observed
        if group.matrix is None
        for layer, module in zip(group.layers, group.modules, strict=True)
    ]


def _differentiated(model: Any, weights: Sequence[Tensor], members: Sequence[Decision]) -> list[Tensor]:
    device = model.device
    batch = Batch.of([each.text for each in members]).to(device)
    lean = torch.tensor([each.weight for each in members], device=device)
    with torch.enable_grad():
        found = score(logits_at(model, batch.ids, batch.mask, batch.answering), batch, lean)
        return list(torch.autograd.grad(found, weights, allow_unused=True, materialize_grads=True))

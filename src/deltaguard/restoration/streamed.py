"""Candidates measured one decoder block after another: several prices a pass, in the memory of a block.

For each block a pass reads both models' tensors and the curvature once, projects once, makes the weights of
each price, and lets the hidden states of each go through. Of the aligned model it is kept what its last block
puts out; what it predicts is computed from that, batch by batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.openings import answer_openings
from deltaguard.chat.tokens import Reader
from deltaguard.curvature.blocks import CutModel, Read, UncutError
from deltaguard.curvature.fitting import Fitting
from deltaguard.curvature.sizes import rows_within
from deltaguard.device import as_served, enough_memory, find_device, served_dtype
from deltaguard.models.families import is_input_embedding, is_output_head
from deltaguard.models.loading import load_config, load_tokenizer, skeleton
from deltaguard.progress import Event, Progress, ignore
from deltaguard.restoration.block_passes import (
    AlignedPredictions,
    Blocks,
    Reads,
    last_hidden,
    likelihood,
    own_blocks,
)
from deltaguard.restoration.candidate import Candidate
from deltaguard.restoration.divergence import Asked, SafetyKL, divergences, log_probs
from deltaguard.restoration.kept import Kept
from deltaguard.restoration.layers import known_store
from deltaguard.restoration.places import match
from deltaguard.restoration.plan import Action, Step
from deltaguard.restoration.trial import Trial, kept_budget

_ADVICE = "hold fewer or shorter conversations out as you calibrate, or take another device"

_TOKENS = 128
"""Of a request and the beginning of its answer, for which keys and values are held, at most, mostly."""


@dataclass
class StreamedCandidate(Candidate):
    """A model of which one decoder block at a time takes on the weights of one price after another.

    Attributes:
        cut: the model; in no block it has the tensors that were put last.
        known: what the aligned model predicts.
        asked: how conversations are put to candidates.
        fitting: says how many of them are run at once.
    """

    cut: CutModel = field(kw_only=True, repr=False)
    known: AlignedPredictions = field(kw_only=True, repr=False)
    asked: Asked = field(kw_only=True, repr=False)
    fitting: Fitting = field(kw_only=True, repr=False)
    _put: Callable[[], Blocks] = field(kw_only=True, repr=False)
    _read_of: Callable[[int], Read] = field(kw_only=True, repr=False)

    @classmethod
    @enough_memory(_ADVICE)
    def open(
        cls,
        trial: Trial,
        output: Path,
        tasks: Sequence[Conversation] = (),
        requests: Sequence[Conversation] = (),
        *,
        dtype: torch.dtype = torch.float32,
        report: Progress = ignore,
    ) -> "StreamedCandidate":
        """Find what the aligned model predicts, and cut candidates into blocks.

        Args:
            trial: the layers.
            output: a folder with the configuration, tokenizer and chat template that candidates will have.
            tasks: conversations of which the aligned model's likelihood is wanted too.
            requests: conversations of which the beginnings of the aligned model's answers are.
            dtype: that models run in.
            report: told where there is too little memory for whole batches.

        Raises:
            UncutError: one of the models cannot be cut into blocks.
            DeltaguardError: as `SafetyMeter.open`.
        """
        job, store, device = trial.job, known_store(trial.job), find_device(trial.config.device)
        made = store.provenance
        aligned = CutModel(job.aligned, dtype=dtype, device=device)
        tokenizer = load_tokenizer(job.aligned.folder, job.aligned.reference)
        own = Asked(Reader.of(tokenizer, aligned.model.config, made.max_length), made.batch_size, device)
        config = load_config(output, job.finetuned.reference)
        tokenizer = load_tokenizer(output, job.finetuned.reference)
        # For messages, which must not speak of a folder that is gone.
        tokenizer.name_or_path = job.finetuned.reference
        other = replace(own, reader=Reader.of(tokenizer, config, made.max_length))
        pairs = [(one.to(device), two.to(device)) for one, two in own.beside(other, store.held_out)]
        cut = _cut_candidate(trial, output, config, dtype)
        fitting = Fitting(report)
        known = AlignedPredictions.of(aligned, pairs, fitting)
        nll = None
        if tasks:
            batches, blocks = own.whole_batches(tasks), partial(own_blocks, aligned)
            nll = likelihood(aligned, batches, blocks, fitting, most=known.places)
        begun = _openings(aligned, own.reader.tokenizer, requests, trial) if requests else []
        return cls(
            trial,
            conversations=len(store.held_out),
            tokens=known.tokens,
            at_once=trial.footprint.at_once,
            by_blocks=True,
            aligned_likelihood=nll,
            aligned_openings=begun,
            cut=cut,
            known=known,
            asked=other,
            fitting=fitting,
            _put=partial(own_blocks, cut),
            _read_of=lambda _: job.finetuned.read,
        )

    def take_others(self) -> None:
        """Take the tensors that no method decides from where the plan takes them."""
        made = self.trial.at_prices(_steps(self.trial, self.cut.tensors_of(None)), [0.0])
        self.cut.take_ends({name: tensor for name, (tensor,) in made}.__getitem__)

    def put(self, mu: float) -> None:
        """Take on the layers of one price, as its blocks are needed."""
        # Nothing that a candidate holds may hold the candidate: it would stay in memory after its use.
        self._put = partial(_blocks_at, self.trial, self.cut, [mu])
        self._read_of = _KeptBlocks(self.trial, self.cut, mu).read_of

    @enough_memory(_ADVICE)
    def likelihood(self, tasks: Sequence[Conversation]) -> float:
        """Measure the likelihood of tasks, see `SafetyMeter.likelihood`, in passes as large as the others."""
        batches = self.asked.whole_batches(tasks)
        return likelihood(self.cut, batches, self._put, self.fitting, most=self.known.places)

    @enough_memory(_ADVICE)
    def openings(self, requests: Sequence[Conversation]) -> list[str]:
        """Let the candidate begin its answers, in a pass over its blocks for each token of a batch."""
        return _openings(self.cut, self.asked.reader.tokenizer, requests, self.trial, self._read_of)

    def _measure_whole(self, report: Progress, enough: float) -> SafetyKL:
        read, cut = self.trial.finetuned_tensor, self.cut
        cut.take_ends(read)
        self._put = lambda: ([read] for _ in cut.blocks)
        self._read_of = lambda _: read
        (found,) = self._pass(self._put(), report, enough)
        return found

    def _measure(self, prices: Sequence[float], report: Progress, enough: float) -> list[SafetyKL]:
        self.put(prices[-1])
        return self._pass(_blocks_at(self.trial, self.cut, prices), report, enough)

    @enough_memory(_ADVICE)
    @torch.no_grad()
    def _pass(self, blocks: Blocks, report: Progress, enough: float) -> list[SafetyKL]:
        """Measure all candidates that go through the blocks together."""
        count, batches = len(self.cut.blocks), self.known.batches

        def told() -> Iterator[Reads]:
            for number, reads in enumerate(blocks, start=1):
                yield reads
                report(Event("block by block", number, count, f"prices a pass: {len(reads)}"))

        return [
            SafetyKL.between(map(self._compared, range(len(batches)), hidden), self.tokens, enough=enough)
            for hidden in last_hidden(self.cut, batches, told(), self.fitting)
        ]

    def _compared(self, i: int, states: Tensor) -> list[list[float]]:
        """Compare what a candidate predicts of a batch with what the aligned model does."""

        def of_part(rows: slice) -> list[list[float]]:
            batch = self.known.batches[i].part(rows)
            predicted = log_probs(self.cut.logits(states[rows], batch))
            return divergences(batch, self.known.log_probs(i, rows), predicted)

        return [each for part in self.fitting.run(len(states), of_part) for each in part]


def _blocks_at(
    trial: Trial, cut: CutModel, prices: Sequence[float], numbers: Iterable[int] | None = None
) -> Iterator[Reads]:
    """Make the weights of several prices, one block after another; of all blocks, or of some."""
    chosen = range(len(cut.blocks)) if numbers is None else numbers
    names = [cut.tensors_of(number) for number in chosen]
    # One reader for all blocks, so that the next one is read while this one is run.
    made = trial.at_prices(_steps(trial, [name for own in names for name in own]), prices)
    for own in names:
        block = dict(islice(made, len(own)))
        yield [_taker(block, i) for i in range(len(prices))]


def _steps(trial: Trial, names: Sequence[str]) -> list[Step]:
    steps = {step.info.name: step for step in trial.plan.steps}
    return [steps[name] for name in names]


@dataclass(frozen=True)
class _Block:
    tensors: tuple[Tensor, ...]


class _KeptBlocks:
    """The blocks of one candidate, which every token of an answer needs; made once where there is room."""

    def __init__(self, trial: Trial, cut: CutModel, mu: float) -> None:
        self._trial, self._cut, self._mu, self._kept = trial, cut, mu, None

    def read_of(self, number: int) -> Read:
        """Give what gives the tensors of a block."""
        if self._kept is None:
            self._kept = self._made()
        found: _Block | None = self._kept.get(str(number))
        if found is None:
            ((read,),) = _blocks_at(self._trial, self._cut, [self._mu], [number])
            return read
        return dict(zip(self._cut.tensors_of(number), found.tensors, strict=True)).__getitem__

    def _made(self) -> Kept:
        kept = self._trial.scratch(0)
        for number, (read,) in enumerate(_blocks_at(self._trial, self._cut, [self._mu])):
            kept.add(str(number), _Block(tuple(map(read, self._cut.tensors_of(number)))))
        return kept


def _openings(
    cut: CutModel,
    tokenizer: Any,
    requests: Sequence[Conversation],
    trial: Trial,
    read_of: Callable[[int], Read] | None = None,
) -> list[str]:
    """Let a model begin its answers, each block read for each token of a batch."""
    dtype = served_dtype(cut.device) if cut.dtype == torch.float32 else cut.dtype
    found, tokens = trial.footprint, trial.config.whole_tokens
    held = found.ends + found.block + found.layers + found.reference
    # Layers that were projected before may wait beside it.
    room = found.limit - held - kept_budget(found, trial.config, cut.device)
    size = rows_within(cut.model.config, room, tokens=_TOKENS + (tokens or 0), dtype=dtype)
    with as_served(cut.model), cut.streaming(read_of, dtype=dtype) as model:
        return answer_openings(model, tokenizer, requests, whole_tokens=tokens, batch_size=size)


def _taker(block: dict[str, list[Any]], number: int) -> Read:
    """Give the tensors of one candidate, once: what was read is not held any longer."""

    def read(name: str) -> Tensor:
        tensors = block[name]
        found, tensors[number] = tensors[number], None
        return found

    return read


def _cut_candidate(trial: Trial, output: Path, config: Any, dtype: torch.dtype) -> CutModel:
    """Cut a model that has the fine-tuned checkpoint's tensors, and runs as the output does.

    Raises:
        UncutError: it cannot be cut, or the method decides what is in no block.
        DeltaguardError: a tensor does not fit the model; all are listed.
    """
    job = trial.job
    tuned, infos = job.finetuned, job.finetuned.tensors.values()
    rows = [info.shape[0] for info in infos if is_input_embedding(info.name)]
    if len(rows) == 1:
        config.get_text_config().vocab_size = rows[0]
    # Where one of the two is not stored, loading ties them, whatever the configuration says.
    config.tie_word_embeddings = not any(is_output_head(info.name) for info in infos)
    model = skeleton(output, tuned.reference, dtype=dtype, config=config)
    match(model, job.aligned, tuned)
    cut = CutModel(tuned, dtype=dtype, device=find_device(trial.config.device), model=model)
    ends = set(cut.tensors_of(None))
    if any(step.action is Action.RESTORE and step.info.name in ends for step in trial.plan.steps):
        raise UncutError("the method decides tensors that are in none of its blocks")
    return cut

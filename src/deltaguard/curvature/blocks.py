"""A model cut into its decoder blocks, of which one at a time holds weights.

The model's own forward pass says what each block is given beside the hidden states, such as masks and rotary
embeddings: it is run with blocks that pass their input on. So an architecture can be cut if nothing but the
hidden states goes from one block to the next; that is tried out, not known by name.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deltaguard.chat.predictions import logits_at
from deltaguard.chat.tokens import Batch
from deltaguard.device import stays_precise
from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import WeightSource
from deltaguard.models.experts import Part, parts_of
from deltaguard.models.families import decoder_blocks, is_output_head
from deltaguard.models.loading import foreign, load_config, skeleton

_TRIED = ((3, 1, 2, 0, 3), (1, 2, 0, 0, 0)), ((True,) * 5, (True, True, False, False, False))
"""Token ids of two rows, and their mask, on which models are tried out; any vocabulary has these tokens."""

_PLAIN = (type(None), bool, int, float, str, torch.dtype)


Read = Callable[[str], Tensor]
"""What gives a tensor of a checkpoint by its name."""


class UncutError(DeltaguardError):
    """A model that cannot be cut into blocks; the message says why, as the rest of a sentence."""


class _FoundError(Exception):
    """Ends a trial; holds what a block put out."""


@dataclass(frozen=True)
class Call:
    """What a block is given beside the hidden states."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]


class CutModel:
    """A causal language model of which the decoder blocks are loaded one at a time; all else stays loaded.

    Attributes:
        model: a transformers model; the parameters of its blocks have no content.
        blocks: the decoder blocks.
        prefix: of the blocks' names in the model, such as `model.layers.`.
        parts: of the model's parameters: the checkpoint's tensors that give their values.
        source: the checkpoint.
        dtype: of the weights as they are run.
        device: where all is run.
    """

    def __init__(
        self, source: WeightSource, *, dtype: torch.dtype, device: torch.device, model: Any = None
    ) -> None:
        """Load what is no block, and try out whether the blocks can be run one by one.

        Args:
            source: the weights.
            dtype: of the weights as they are run.
            device: where all is run.
            model: a `skeleton` that the weights belong to; that of the source's own configuration where it is
                absent.

        Raises:
            UncutError: the model cannot be cut, or not in this dtype.
            DeltaguardError: transformers cannot build it.
        """
        self.source, self.dtype, self.device = source, dtype, device
        self.model = _own_skeleton(source, dtype) if model is None else model
        self.blocks = decoder_blocks(self.model)
        self.prefix = next(f"{name}." for name, each in self.model.named_modules() if each is self.blocks)
        # Some models compute with these in float32 whatever their dtype.
        tied = set(self.model.all_tied_weights_keys)
        parameters = [name for name, _ in self.model.named_parameters() if name not in tied]
        buffers = dict(self.model.named_buffers())
        known = parts_of([*parameters, *buffers], source.tensors)
        self.parts = {name: known[name] for name in parameters if name in known}
        # Such as biases of routers; what the model computes for itself is in no checkpoint.
        self._stored = {name: known[name][0].tensor for name in buffers if name in known}
        _require_as_stored(self.model, self.parts, source, dtype)
        self.take_ends(source.read)
        for name, buffer in buffers.items():
            self._set(name, buffer.to(device))
            if name in self._stored:
                self._take_buffer(name, source.read)
        self._output = self._form_of_output()
        _require_alike(self._trial(0.0), self._trial(1.0))

    def take_ends(self, read: Read) -> None:
        """Load what is in no block: embeddings, norms and the output head.

        Args:
            read: gives the source's tensors, or others in their place.
        """
        for name in self.parts:
            if not name.startswith(self.prefix):
                self._take(name, read)
        self.model.tie_weights()
        for name in self._stored:
            if not name.startswith(self.prefix):
                self._take_buffer(name, read)

    @contextmanager
    def loaded(self, number: int, read: Read | None = None) -> Generator[nn.Module]:
        """Load the weights of one block for as long as the context lasts.

        Args:
            number: of the block.
            read: gives tensors in the place of the source's.
        """
        prefix, read = f"{self.prefix}{number}.", read or self.source.read
        for name in self._stored:
            if name.startswith(prefix):
                self._take_buffer(name, read)
        names = [name for name in self.parts if name.startswith(prefix)]
        for name in names:
            self._take(name, read)
        try:
            yield self.blocks[number]
        finally:
            for name in names:
                self._put(name, self.model.get_parameter(name).to("meta"))

    def tensors_of(self, number: int | None) -> tuple[str, ...]:
        """Name the checkpoint's tensors that a block is loaded from; of None, those that are in no block."""
        prefix = self.prefix if number is None else f"{self.prefix}{number}."
        parts = [part.tensor for name, own in self.parts.items() for part in own if _in(name, prefix, number)]
        return (*parts, *(tensor for name, tensor in self._stored.items() if _in(name, prefix, number)))

    @contextmanager
    def streaming(
        self, read_of: Callable[[int], Read] | None = None, *, dtype: torch.dtype | None = None
    ) -> Generator[Any]:
        """Let the model run as a whole for a while, each block loaded for its turn and no longer.

        Args:
            read_of: gives, for a block, what gives tensors in the place of the source's.
            dtype: of the weights of blocks meanwhile.

        Yields:
            The model; each of its forward passes reads the weights of all blocks.
        """
        real = [block.forward for block in self.blocks]

        def forward(number: int, *given: Any, **named: Any) -> Any:
            with self.loaded(number, read_of and read_of(number)):
                return real[number](*given, **named)

        own, self.dtype = self.dtype, dtype or self.dtype
        try:
            with self._replaced(forward):
                yield self.model
        finally:
            self.dtype = own

    def inputs(self, batch: Batch) -> tuple[Tensor, tuple[Call, ...]]:
        """Compute what the first block gets, (conversations, tokens, hidden), and all else that each gets."""
        seen: list[tuple[Tensor, Call]] = []

        def forward(_: int, hidden: Tensor, *given: Any, **named: Any) -> Any:
            seen.append((hidden, Call(given, named)))
            return self._output(hidden)

        self._decode(batch, forward)
        return seen[0][0], tuple(call for _, call in seen)

    def run(self, number: int, hidden: Tensor, call: Call) -> Tensor:
        """Run a loaded block.

        Args:
            number: of the block.
            hidden: (conversations, tokens, hidden).
            call: what it is given beside, from `inputs`.
        """
        output = self.blocks[number](hidden, *call.positional, **call.named)
        return output if isinstance(output, Tensor) else output[0]

    def logits(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Compute the logits for the response tokens from what the last block puts out.

        Args:
            hidden: (conversations, tokens, hidden).
            batch: the conversations.

        Returns:
            (response tokens, vocabulary), as `logits_at` gives them.
        """
        last = len(self.blocks) - 1

        def forward(number: int, given: Tensor, *_: Any, **__: Any) -> Any:
            return self._output(hidden if number == last else given)

        with self._replaced(forward):
            return logits_at(self.model, batch.ids, batch.mask, batch.answering)

    def _take(self, name: str, read: Read) -> None:
        first, *others = self.parts[name]
        dtype = self.dtype
        if stays_precise(self.model, name):
            dtype = torch.promote_types(dtype, torch.float32)
        if first.expert is None:
            self._put(name, read(first.tensor).to(self.device, dtype))
            return
        made = torch.empty_like(self.model.get_parameter(name), dtype=dtype, device=self.device)
        for part in (first, *others):
            part.of(made).copy_(read(part.tensor))
        self._put(name, made)

    def _take_buffer(self, name: str, read: Read) -> None:
        buffer = self.model.get_buffer(name)
        self._set(name, read(self._stored[name]).to(self.device, buffer.dtype))

    def _put(self, name: str, tensor: Tensor) -> None:
        self._set(name, nn.Parameter(tensor, requires_grad=False))

    def _set(self, name: str, value: Tensor) -> None:
        module, _, key = name.rpartition(".")
        setattr(self.model.get_submodule(module), key, value)

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Generator[None]:
        """Let a function, which is given a block's number first, stand for the forward pass of each block."""
        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                block.forward = partial(forward, number)
                stack.callback(delattr, block, "forward")
            yield

    @torch.no_grad()
    def _decode(self, batch: Batch, forward: Callable[..., Any]) -> None:
        with self._replaced(forward):
            mask = batch.mask.long()
            self.model.get_decoder()(input_ids=batch.ids, attention_mask=mask, use_cache=False)

    def _form_of_output(self) -> Callable[[Tensor], Any]:
        """Find what makes a block's output of hidden states, by running the first block."""
        real = self.blocks[0].forward

        def forward(_: int, *given: Any, **named: Any) -> Any:
            raise _FoundError(real(*given, **named))

        try:
            with self.loaded(0), foreign("it cannot be run", UncutError):
                self._decode(self._tried(), forward)
        except UncutError as error:
            if not isinstance(error.__cause__, _FoundError):
                raise
            found = error.__cause__.args[0]
        else:
            raise UncutError("its blocks are not run")
        if isinstance(found, Tensor):
            return lambda hidden: hidden
        if isinstance(found, tuple) and isinstance(found[0], Tensor) and set(found[1:]) <= {None}:
            return lambda hidden: (hidden, *found[1:])
        raise UncutError("its blocks put out more than hidden states")

    def _trial(self, shift: float) -> list[Call]:
        """See what blocks are given where the first adds a number to hidden states, the others nothing."""
        calls: list[Call] = []
        passed: list[Tensor] = []

        def forward(number: int, *given: Any, **named: Any) -> Any:
            hidden, *others = given or (None,)
            if number != len(calls) or not isinstance(hidden, Tensor):
                raise UncutError("its blocks are not run one after another, on hidden states")
            if passed and hidden is not passed[-1]:
                raise UncutError("something happens between its blocks")
            calls.append(Call(tuple(others), named))
            passed.append(hidden if number else hidden + shift)
            return self._output(passed[-1])

        with foreign("it cannot be run", UncutError):
            self._decode(self._tried(), forward)
        if len(calls) != len(self.blocks):
            raise UncutError(f"{len(calls)} of its {len(self.blocks)} blocks are run")
        return calls

    def _tried(self) -> Batch:
        ids, mask = (torch.tensor(rows, device=self.device) for rows in _TRIED)
        return Batch(ids, mask, mask)


class Calls:
    """What blocks are given of batches, or of parts of them; computed where it is not known."""

    def __init__(self, cut: CutModel, batches: Sequence[Batch]) -> None:
        """Compute nothing yet.

        Args:
            cut: the model.
            batches: on its device.
        """
        self._cut, self._batches = cut, batches
        self._known: dict[int, dict[tuple[int, int], tuple[Call, ...]]] = {}

    def first(self, i: int, rows: slice) -> Tensor:
        """Compute what the first block gets of some conversations of a batch: (these, tokens, hidden)."""
        hidden, calls = self._cut.inputs(self._batches[i].part(rows))
        known = self._known.setdefault(i, {})
        # Of what was too large for the memory nothing is needed any more.
        for start, stop in [each for each in known if each[0] < rows.stop and rows.start < each[1]]:
            del known[start, stop]
        known[rows.start, rows.stop] = calls
        return hidden

    def of(self, i: int, rows: slice) -> tuple[Call, ...]:
        """Say what each block is given beside the hidden states of some conversations of a batch."""
        if (rows.start, rows.stop) not in self._known.get(i, {}):
            self.first(i, rows)
        return self._known[i][rows.start, rows.stop]


def _own_skeleton(source: WeightSource, dtype: torch.dtype) -> Any:
    config = load_config(source.folder, source.reference)
    if any(map(is_output_head, source.tensors)):
        # transformers does not tie what a checkpoint stores apart, whatever its configuration says.
        config.tie_word_embeddings = False
    return skeleton(source.folder, source.reference, dtype=dtype, config=config)


def _in(name: str, prefix: str, number: int | None) -> bool:
    return name.startswith(prefix) != (number is None)


def _require_as_stored(
    model: Any, parts: Mapping[str, Sequence[Part]], source: WeightSource, dtype: torch.dtype
) -> None:
    """Refuse where transformers would change tensors as it loads them.

    Raises:
        UncutError: a parameter is in no file, or has another shape there, or another dtype than asked for.
    """
    precise = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]  # noqa: SLF001  # as transformers does
    if precise and dtype != torch.float32:
        raise UncutError(f"it keeps {', '.join(sorted(precise))} in float32 whatever its dtype")
    for name, parameter in model.named_parameters():
        if name in model.all_tied_weights_keys:
            continue
        known = parts.get(name, ())
        fits = all(source.tensors[part.tensor].shape == part.of(parameter).shape for part in known)
        if not fits or sum(part.of(parameter).numel() for part in known) != parameter.numel():
            raise UncutError(f"transformers makes `{name}` of other tensors as it loads them")


def _require_alike(one: Any, other: Any) -> None:
    """Refuse where what blocks are given beside hidden states depends on these, or can carry anything on.

    Raises:
        UncutError: it does.
    """
    if isinstance(one, Call):
        _require_alike((one.positional, dict(one.named)), (other.positional, dict(other.named)))
    elif isinstance(one, tuple | list):
        for pair in zip(one, other, strict=True):
            _require_alike(*pair)
    elif isinstance(one, dict):
        for name, value in one.items():
            _require_alike(value, other[name])
    elif isinstance(one, Tensor):
        if not torch.equal(one, other):
            raise UncutError("what its blocks are given depends on what others made")
    elif not isinstance(one, _PLAIN):
        raise UncutError(f"its blocks share a {type(one).__name__}")

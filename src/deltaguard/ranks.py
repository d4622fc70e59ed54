"""Several processes that share the work of one calibration or restore, as torchrun starts them.

All of them run the same program. The first, rank 0, reads what was asked for, writes the output and prints;
the others help. What they tell each other goes through torch.distributed: over gloo, and sums that lie on
GPUs over nccl.
"""

import os
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from deltaguard.errors import DeltaguardError

_T = TypeVar("_T")

_PATIENCE = timedelta(days=7)
"""How long ranks wait while one works alone. One that ends is noticed at once, by its closed connections."""

_FAILED = "deltaguard/failed"
"""The key under which the rank that failed first is noted."""

_DONE = "deltaguard/done"
"""The key under which pieces of work are counted."""


class LostRankError(DeltaguardError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, as one of them sees them; by default there is one, and it works alone.

    Attributes:
        rank: of this process, counted from 0.
        size: how many there are.
        here: how many of them are on this machine.
        local: number of this one among them.

    Example:
        >>> alone = Ranks()
        >>> alone.leads, alone.shares([3.0, 1.0]), alone.from_first("told")
        (True, [0, 0], 'told')
    """

    rank: int = 0
    size: int = 1
    here: int = 1
    local: int = 0
    _store: Any = field(default=None, repr=False, compare=False)
    _sums: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def current(cls) -> "Ranks":
        """Find the processes that this one was joined with (see `joined`); itself alone, where with none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        here, local = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"))
        # Where joined processes note what all must know, torch tells in a private function alone.
        store = vars(dist.distributed_c10d)["_get_default_store"]()
        return cls(dist.get_rank(), dist.get_world_size(), here, local, store)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def on(self, device: torch.device) -> "Ranks":
        """Let tensors on a device be added up; all ranks call this at the same time.

        Args:
            device: of this rank.

        Raises:
            DeltaguardError: this rank has no GPU of its own.
        """
        if self.size == 1 or device.type != "cuda":
            return self
        found = torch.cuda.device_count()
        if device.index not in (None, self.local) or self.local >= found:
            raise DeltaguardError(
                f"{self.here} processes run on this machine, which has {found} GPUs, and process "
                f"{self.local} was told to take {device}. Give each a GPU of its own: start as many as there "
                "are GPUs, with `--device cuda`."
            )
        return replace(self, _sums=dist.new_group(backend="nccl", timeout=_PATIENCE))

    def sharing(self, device: torch.device) -> int:
        """Say how many of the processes share the memory of this one's device."""
        return 1 if device.type == "cuda" else self.here

    def shares(self, costs: Sequence[float], *, in_turn: bool = False) -> list[int]:
        """Split work over the ranks: piece after piece goes to the one with the least so far.

        Args:
            costs: of each piece.
            in_turn: whether pieces are handed out in their order, so that they can be collected in it with
                little waiting; otherwise the largest first, which is more even.

        Returns:
            The rank of each piece.

        Example:
            >>> Ranks(size=2).shares([1.0, 2.0, 4.0]), Ranks(size=2).shares([1.0, 2.0, 4.0], in_turn=True)
            ([1, 1, 0], [0, 1, 0])
        """
        loads, owners = [0.0] * self.size, [0] * len(costs)
        order = range(len(costs))
        for piece in order if in_turn else sorted(order, key=lambda piece: -costs[piece]):
            owners[piece] = loads.index(min(loads))
            loads[owners[piece]] += costs[piece]
        return owners

    def from_first(self, value: Any = None) -> Any:
        """Give all ranks the value of rank 0, and of the others none.

        Raises:
            LostRankError: as all that ranks do together, where another process of the run has ended.
        """
        if self.size == 1:
            return value
        told: list[Any] = [value]
        with _noticing_losses():
            dist.broadcast_object_list(told, src=0)
        return told[0]

    def from_all(self, value: _T) -> list[_T]:
        """Give all ranks the values of all, by rank; none goes on before all have come here."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _noticing_losses():
            dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        if self.size > 1:
            with _noticing_losses():
                dist.monitored_barrier(timeout=_PATIENCE)

    def add_up(self, tensor: Tensor, owner: int | None = None) -> None:
        """Add up a tensor over all ranks, in place.

        Args:
            tensor: of the same shape and dtype on all ranks.
            owner: the rank that gets the sum; the others' tensors lose their content. None where all get it.
        """
        if self.size == 1:
            return
        with _noticing_losses():
            if owner is None:
                dist.all_reduce(tensor, group=self._sums)
            else:
                dist.reduce(tensor, dst=owner, group=self._sums)

    def send(self, to: int, message: Any, tensors: Sequence[Tensor] = ()) -> None:
        """Send a message to a rank that receives it, and the content of tensors.

        Args:
            to: the rank.
            message: anything small that can be pickled.
            tensors: of any dtype and shape, on any device.
        """
        forms = [(each.dtype, each.shape) for each in tensors]
        with _noticing_losses():
            dist.send_object_list([message, forms], dst=to)
            for each in tensors:
                if each.numel():
                    dist.send(_bytes(each.detach().cpu().contiguous()), dst=to)

    def send_ahead(self, to: int, messages: Iterable[tuple[Any, Sequence[Tensor]]]) -> None:
        """Send messages to a rank that receives them all; while one is sent, the next is made.

        Args:
            to: the rank.
            messages: each with its tensors, as in `send`.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="send") as sender:
            sent: Future[None] | None = None
            for message, tensors in messages:
                if sent is not None:
                    sent.result()
                sent = sender.submit(self.send, to, message, tensors)
            if sent is not None:
                sent.result()

    def receive(self, sender: int) -> tuple[Any, list[Tensor]]:
        """Receive the next message of a rank, and its tensors, on the CPU."""
        told: list[Any] = [None, None]
        with _noticing_losses():
            dist.recv_object_list(told, src=sender)
            message, forms = told
            tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in forms]
            for each in tensors:
                if each.numel():
                    dist.recv(_bytes(each), src=sender)
        return message, tensors

    def count(self, pieces: int) -> int:
        """Count pieces of work that this rank has done, and say how many all have; waits for none of them.

        Work that needs nothing of the others is done between calls of this: so it ends where they have.

        Raises:
            LostRankError: another process of the run has failed.
        """
        if self._store is None:
            return pieces
        with _noticing_losses():
            if self._store.check([_FAILED]):
                raise _lost()
            return self._store.add(_DONE, pieces)

    def fails_first(self) -> bool:
        """Note that this process fails, and tell whether it is the first: the one that says why."""
        if self._store is None:
            return True
        try:
            return self._store.compare_set(_FAILED, "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:
            # The store has ended with what started the processes, so nobody else has anything to say.
            return self.leads


@contextmanager
def joined() -> Generator[Ranks]:
    """Join the other processes that torchrun started, as long as the block lasts.

    Environment variables say which those are, as torchrun sets them: `RANK`, `WORLD_SIZE`, `LOCAL_RANK`,
    `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`. `cuda` means the GPU of number `LOCAL_RANK` then.

    Raises:
        DeltaguardError: the others cannot be reached, or a variable is not set.
    """
    if lacking := [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in os.environ]:
        raise DeltaguardError(
            f"{' and '.join(lacking)} must be set where several processes share one run, as torchrun does."
        )
    try:
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise DeltaguardError(f"The processes of this run cannot reach each other: {error}") from error
    ranks = Ranks.current()
    if ranks.local < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _bytes(tensor: Tensor) -> Tensor:
    """See a contiguous tensor as bytes: not every dtype can be sent."""
    return tensor.reshape(-1).view(torch.uint8)


@contextmanager
def _noticing_losses() -> Generator[None]:
    """Turn what torch.distributed says of a lost process into one message.

    Raises:
        LostRankError: another process has ended.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    # GPUs may fail to reach each other with all processes there.
    except dist.DistBackendError as error:
        first, _, _ = str(error).partition("\n")
        raise _lost(f"NCCL says: {first}") from error
    # What gloo raises is no more specific.
    except RuntimeError as error:
        raise _lost("(DELTAGUARD_DEBUG=1 shows what was noticed.)") from error


def _lost(noticed: str = "") -> LostRankError:
    return LostRankError(
        "Another process of this run has ended, or cannot be reached, so that this one cannot go on. Run the "
        f"same command again with `--resume`. {noticed}".rstrip()
    )

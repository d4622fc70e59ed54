"""Batches in parts that fit into a device's memory, and what of a part that did not was counted already."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from deltaguard.progress import Event, Progress, ignore

_T = TypeVar("_T")


@dataclass
class Fitting:
    """How many conversations are run at once: whole batches, until a device has too little memory for one.

    Attributes:
        report: told, as the stage `memory`, when there are fewer.
        most: conversations at once, at most.
    """

    report: Progress = ignore
    most: int = sys.maxsize

    def run(self, rows: int, work: Callable[[slice], _T]) -> list[_T]:
        """Run the conversations of a batch, by half as many where memory does not suffice; later ones, too.

        Args:
            rows: how many the batch has.
            work: runs those of a part; it is called again for a part of a part that it had no memory for.

        Returns:
            What came out of each part, in the order of the conversations.

        Raises:
            torch.OutOfMemoryError: memory does not suffice for a single conversation.
        """
        found, start = list[_T](), 0
        while start < rows:
            part = slice(start, min(start + self.most, rows))
            try:
                found.append(work(part))
            except torch.OutOfMemoryError:
                if part.stop - start == 1:
                    raise
            else:
                start = part.stop
                continue
            # Out of the handler, where the error would hold all that the attempt had in memory.
            self.most = (part.stop - start) // 2
            said = f"too little for {part.stop - start} conversations at once: from now on {self.most}"
            self.report(Event("memory", 1, 1, said))
        return found

    def joined(self, rows: int, work: Callable[[slice], Tensor]) -> Tensor:
        """Run the conversations of a batch as `run` does, and join the rows that come out."""
        found = self.run(rows, work)
        return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True)
class Due:
    """The tokens of a part of a batch that are still to be added to each of several sums.

    A part that there was too little memory for has been added to some of them, and comes again in smaller
    parts.

    Attributes:
        mask: False for padding, of the whole batch, (conversations, tokens).
        rows: the conversations of the part.
        added: by the names of sums, up to which conversation of the batch they have been added; it is shared
            by all parts of a batch.
    """

    mask: Tensor
    rows: slice
    added: dict[str, int]

    def chosen(self, name: str) -> Tensor:
        """Say which tokens of the part are to be added to a sum: (conversations × tokens)."""
        mask = self.mask[self.rows]
        had = self.added.get(name, 0) - self.rows.start
        if had > 0:
            mask = mask.clone()
            mask[:had] = False
        return mask.flatten()

    def note(self, name: str) -> None:
        """Note that the part has been added to a sum."""
        self.added[name] = max(self.added.get(name, 0), self.rows.stop)

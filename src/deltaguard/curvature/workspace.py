"""Unfinished work of a calibration: what it was asked for, the responses so far and the sums so far."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import safe_open

from deltaguard.curvature.moments import Moment, empty_moment
from deltaguard.curvature.observe import Partial
from deltaguard.curvature.responses import start_anew
from deltaguard.curvature.store_format import (
    MANIFEST,
    Request,
    read_manifest,
    require_empty,
    save_tensors,
    sync,
)
from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import problems, read_json
from deltaguard.models.durable import explained, lock_folder
from deltaguard.models.shards import shard_problem
from deltaguard.solvers.solution import is_finite


class Workspace:
    """The folder `OUTPUT.partial` beside a calibration's output.

    Every file in it is replaced as a whole, so a run may be killed at any time. It is locked from `begin`
    to the end of the `with` block, so that two runs never continue the same work.

    Attributes:
        journal: the file for responses (see `responses.respond`).
    """

    def __init__(self, output: Path, request: Request) -> None:
        self._output = output.resolve()
        self._folder = self._output.with_name(f"{self._output.name}.partial")
        self._request = request
        self._lock: int | None = None
        self._asked = self._folder / "request.json"
        self.journal = self._folder / "responses.jsonl"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def begin(self, *, resume: bool) -> bool:
        """Start, or go on where an earlier run stopped.

        Args:
            resume: whether an earlier run is to be continued, or its finished store accepted.

        Returns:
            Whether there is nothing left to do.

        Raises:
            DeltaguardError: the output is not empty or there is unfinished work, and this is no resumption;
                or what is there was asked for otherwise; or another process is at it.
        """
        if self._is_finished(resume=resume):
            return True
        with explained(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self._folder)
        # Another process may have finished before it gave up the lock.
        if self._is_finished(resume=resume):
            return True
        begun = self.journal.exists() or any(self._folder.glob("sum-*.safetensors"))
        if begun and not resume:
            raise DeltaguardError(
                f"An unfinished calibration lies in {self._folder}. Resume it (`--resume`), or delete "
                "that folder."
            )
        if begun:
            self._require_same(self._folder, self._earlier_request())
        _replace(self._asked, self._write_request)
        return False

    def end(self) -> None:
        """Remove the unfinished work, once the store is in place."""
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def load_sums(
        self, sizes: Mapping[str, int], tokens: Sequence[int], device: torch.device
    ) -> dict[str, Partial]:
        """Read the sums so far.

        Args:
            sizes: the names of the sums, and how many rows and columns each has.
            tokens: how many there are in the first 0, 1, 2, ... batches.
            device: where the sums are put.

        Returns:
            The sums by name, empty ones where there are none.

        Raises:
            DeltaguardError: files are damaged. They are listed.
        """
        partials: dict[str, Partial] = {}
        damaged: list[str] = []
        for number, (name, size) in enumerate(sizes.items()):
            path = self._sum_file(number)
            if not path.exists():
                partials[name] = Partial(empty_moment(size, device=device), 0)
                continue
            try:
                found = _read_sum(path, name, size, tokens)
            except DeltaguardError as error:
                damaged.append(str(error))
                continue
            partials[name] = Partial(
                Moment(found.moment.total.to(device), found.moment.tokens), found.batches
            )
        if damaged:
            raise DeltaguardError(
                listed(f"Sums of the unfinished calibration in {self._folder} are damaged", damaged)
                + "\nDelete these files and run the same command again: what they held is summed anew, and "
                "everything else is kept."
            )
        return partials

    def save_sums(self, partials: Mapping[str, Partial]) -> float:
        """Keep the sums so far, one file each: a save that is interrupted leaves old and new ones.

        Returns:
            How many seconds that took.
        """
        started = time.monotonic()
        for number, (name, partial) in enumerate(partials.items()):
            _replace(self._sum_file(number), _save_sum(name, partial))
        return time.monotonic() - started

    def _is_finished(self, *, resume: bool) -> bool:
        """Whether the store is there and may be returned."""
        if resume and (self._output / MANIFEST).exists():
            self._require_same(self._output, read_manifest(self._output).provenance)
            self.end()
            return True
        require_empty(self._output)
        return False

    def _earlier_request(self) -> Request:
        remedy = start_anew(self._folder)
        if not self._asked.is_file():
            raise DeltaguardError(f"{self._asked} is missing, so nobody knows what was asked for. {remedy}")
        return read_json(self._asked, Request, remedy=remedy)

    def _write_request(self, path: Path) -> None:
        path.write_text(self._request.model_dump_json(indent=2), encoding="utf-8")
        sync(path)

    def _sum_file(self, number: int) -> Path:
        return self._folder / f"sum-{number:05}.safetensors"

    def _require_same(self, where: Path, earlier: Request) -> None:
        asked = self._request.model_dump()
        differing = [
            f"{field} is {value!r} now and was {getattr(earlier, field)!r}"
            for field, value in asked.items()
            if getattr(earlier, field) != value
        ]
        if differing:
            raise DeltaguardError(
                listed(
                    f"{where} belongs to another calibration, so this one cannot resume it; choose another "
                    "output folder, or ask for the same",
                    differing,
                )
            )


def _save_sum(name: str, partial: Partial) -> Callable[[Path], None]:
    total = partial.moment.total.cpu()
    counts = {"tokens": str(partial.moment.tokens), "batches": str(partial.batches)}
    return lambda path: save_tensors({name: total}, path, counts)


def _read_sum(path: Path, name: str, size: int, tokens: Sequence[int]) -> Partial:
    """A sum from its file.

    Raises:
        DeltaguardError: the file holds something else.
    """
    problem = shard_problem(path)
    if problem:
        raise DeltaguardError(problem)
    with safe_open(path, framework="pt") as file:
        counts = _checked_counts(path, file.metadata(), tokens)
        names = ", ".join(f"`{each}`" for each in file.keys())  # noqa: SIM118  # it is no mapping
        if names != f"`{name}`":
            raise DeltaguardError(f"{path.name} holds {names}, not `{name}`.")
        form = file.get_slice(name)
        found, due = f"{form.get_dtype()} {form.get_shape()}", f"F32 {[size, size]}"
        if found != due:
            raise DeltaguardError(f"{path.name}: `{name}` is {found}, not {due}.")
        total = file.get_tensor(name)
    if not is_finite(total):
        bad = int((~total.isfinite()).sum())
        raise DeltaguardError(f"{path.name}: `{name}` holds {bad} entries that are NaN or infinite.")
    if bool((total.diagonal() < 0).any()):
        raise DeltaguardError(f"{path.name}: `{name}` holds negative sums of squares.")
    return Partial(Moment(total, counts.tokens), counts.batches)


class _Counts(BaseModel):
    """What a sum's file says of it beside the numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: NonNegativeInt
    batches: NonNegativeInt


def _checked_counts(path: Path, metadata: Mapping[str, str] | None, tokens: Sequence[int]) -> _Counts:
    try:
        counts = _Counts.model_validate(metadata or {})
    except ValidationError as error:
        raise DeltaguardError(f"{path.name}: {'; '.join(problems(error))}.") from error
    if counts.batches >= len(tokens):
        raise DeltaguardError(f"{path.name} is said to hold {counts.batches} batches of {len(tokens) - 1}.")
    if counts.tokens != tokens[counts.batches]:
        raise DeltaguardError(
            f"{path.name} is said to hold {counts.tokens} tokens in {counts.batches} batches, not "
            f"{tokens[counts.batches]}."
        )
    return counts


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    temporary.replace(path)

"""Unfinished work of a calibration: what it was asked for, the responses so far and the sums so far."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import torch
from pydantic import ValidationError
from safetensors import safe_open

from deltaguard.calibration.observe import Partial
from deltaguard.checkpoints.durable import explained, lock_folder
from deltaguard.curvature.moments import Moment, empty_moment
from deltaguard.curvature.store_format import (
    MANIFEST,
    Request,
    read_manifest,
    require_empty,
    save_tensors,
    sync,
)
from deltaguard.errors import DeltaguardError, listed


class Workspace:
    """The folder `OUTPUT.partial` beside a calibration's output.

    Every file in it is replaced as a whole, so a run may be killed at any time. It is locked from `begin`
    to the end of the `with` block, so that two runs never continue the same work.

    Attributes:
        journal: the file for responses (see `conversations.respond`).
    """

    def __init__(self, output: Path, request: Request) -> None:
        self._output = output.resolve()
        self._folder = self._output.with_name(f"{self._output.name}.partial")
        self._request = request
        self._lock: int | None = None
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
        if resume and (self._output / MANIFEST).exists():
            self._require_same(self._output, read_manifest(self._output).provenance)
            self.end()
            return True
        require_empty(self._output)
        asked = self._folder / "request.json"
        begun = self.journal.exists() or self._sum_file(0).exists()
        if begun and not resume:
            raise DeltaguardError(
                f"An unfinished calibration lies in {self._folder}. Resume it (`--resume`), or delete "
                "that folder."
            )
        with explained(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self._folder)
        if begun:
            self._require_same(self._folder, _read_request(asked))
        _replace(asked, self._write_request)
        return False

    def end(self) -> None:
        """Remove the unfinished work, once the store is in place."""
        if self._folder.exists():
            shutil.rmtree(self._folder)

    def load_sums(self, sizes: Mapping[str, int], device: torch.device) -> dict[str, Partial]:
        """The sums so far, on the device; empty ones of these sizes where there are none."""
        partials: dict[str, Partial] = {}
        for number, (name, size) in enumerate(sizes.items()):
            path = self._sum_file(number)
            if not path.exists():
                partials[name] = Partial(empty_moment(size, device=device), 0)
                continue
            with safe_open(path, framework="pt") as file:
                counts: dict[str, str] = file.metadata()
                total = file.get_tensor(name).to(device)
            partials[name] = Partial(Moment(total, int(counts["tokens"])), int(counts["batches"]))
        return partials

    def save_sums(self, partials: Mapping[str, Partial]) -> float:
        """Keep the sums so far, one file each: a save that is interrupted leaves old and new ones.

        Returns:
            How many seconds that took.
        """
        started = time.monotonic()
        for number, (name, partial) in enumerate(partials.items()):
            _save_sum(self._sum_file(number), name, partial)
        return time.monotonic() - started

    def _write_request(self, path: Path) -> None:
        path.write_text(self._request.model_dump_json(indent=2), encoding="utf-8")
        sync(path)

    def _sum_file(self, number: int) -> Path:
        return self._folder / f"sum-{number:05}.safetensors"

    def _require_same(self, where: Path, earlier: Request) -> None:
        asked = self._request.model_dump()
        problems = [
            f"{field} is {value!r} now and was {getattr(earlier, field)!r}"
            for field, value in asked.items()
            if getattr(earlier, field) != value
        ]
        if problems:
            raise DeltaguardError(
                listed(
                    f"{where} belongs to another calibration, so this one cannot resume it; choose another "
                    "output folder, or ask for the same",
                    problems,
                )
            )


def _read_request(path: Path) -> Request:
    try:
        return Request.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise DeltaguardError(
            f"{path} was written by another version of deltaguard; delete {path.parent} and start again."
        ) from error


def _save_sum(path: Path, name: str, partial: Partial) -> None:
    total = partial.moment.total.cpu()
    counts = {"tokens": str(partial.moment.tokens), "batches": str(partial.batches)}
    _replace(path, lambda temporary: save_tensors({name: total}, temporary, counts))


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    temporary.replace(path)

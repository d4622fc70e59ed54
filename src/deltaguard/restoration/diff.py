"""What differs between an aligned model and a fine-tuned one, by layer and kind."""

import math
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from deltaguard.errors import DeltaguardError
from deltaguard.models.checkpoint import TensorInfo, WeightSource, name_map
from deltaguard.models.families import kind_of
from deltaguard.reports.records.diff import NOT_COMPARED, DiffReport, KindRow, TensorDiff
from deltaguard.restoration.agreement import Identified, differences
from deltaguard.restoration.job import open_models
from deltaguard.restoration.plan import make_plan

_ENTRIES = 1 << 24
"""That are compared at once."""


def diff(aligned: str | Path, finetuned: str | Path, *, deep: bool = False) -> DiffReport:
    """Compare two checkpoints, from headers alone or with their weights.

    Args:
        aligned: as in `restore`.
        finetuned: as in `restore`; an adapter's deltas are expanded.
        deep: read the weights and compare values.

    Returns:
        Every tensor that differs, a summary by kind, and what differs besides weights.

    Raises:
        DeltaguardError: one of the models cannot be opened.
    """
    one, other = open_models(aligned, finetuned)
    names = name_map(list(other.tensors), list(one.tensors))
    found = set(names.values())
    rows = [
        TensorDiff(name=info.name, difference="only aligned", aligned=_text(info), finetuned=None)
        for info in one.tensors.values()
        if info.name not in found
    ]
    for info in other.tensors.values():
        own = one.tensors.get(names.get(info.name, ""))
        row = _compare(one, other, own, info, deep=deep)
        if row is not None:
            rows.append(row)
    settings, unreadable = _settings(one, other)
    obstacle = _obstacle(one, other) or unreadable
    return DiffReport(
        aligned=one.reference,
        finetuned=other.reference,
        deep=deep,
        settings=settings,
        tensors=tuple(rows),
        kinds=_by_kind(list(other.tensors), rows, deep=deep),
        compatible=obstacle is None,
        obstacle=obstacle,
    )


def _settings(one: WeightSource, other: WeightSource) -> tuple[tuple[str, ...], str | None]:
    """Say what differs besides weights, and why a pair cannot be restored of which a file cannot be read."""
    try:
        pair = Identified.of(one), Identified.of(other)
    except DeltaguardError as error:
        return (), str(error)
    try:
        found = differences(*pair)
    except DeltaguardError as error:
        return (f"{NOT_COMPARED}: {error}",), None
    return tuple(each.text for each in found), None


def _obstacle(one: WeightSource, other: WeightSource) -> str | None:
    """Say why the weights of a pair cannot be restored; `None` where they can."""
    try:
        make_plan(one, other, store=None)
    except DeltaguardError as error:
        # What is being done is no advice.
        return "\n".join(line for line in str(error).splitlines() if "`deltaguard diff " not in line)
    return None


def _compare(
    one: WeightSource, other: WeightSource, own: TensorInfo | None, info: TensorInfo, *, deep: bool
) -> TensorDiff | None:
    if own is None:
        return TensorDiff(name=info.name, difference="only finetuned", aligned=None, finetuned=_text(info))
    if own.shape != info.shape:
        return TensorDiff(name=info.name, difference="shape", aligned=_text(own), finetuned=_text(info))
    found = _values(one.read(own.name), other.read(info.name)) if deep else None
    if found is not None:
        return found.model_copy(update={"name": info.name, "aligned": _text(own), "finetuned": _text(info)})
    if own.dtype != info.dtype:
        return TensorDiff(name=info.name, difference="dtype", aligned=_text(own), finetuned=_text(info))
    return None


def _values(before: Tensor, after: Tensor) -> TensorDiff | None:
    lost = whole = 0.0
    not_finite = 0
    # The largest tensors are gigabytes, and in float64 several times as many.
    for one, other in zip(before.reshape(-1).split(_ENTRIES), after.reshape(-1).split(_ENTRIES), strict=True):
        if one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            # Of what is not finite a difference would not be 0.
            continue
        own = one.double()
        delta = other.double() - own
        lost += float(delta.square().sum())
        whole += float(own.square().sum())
        not_finite += int((~delta.isfinite()).sum())
    if lost == 0:
        return None
    size, norm = math.sqrt(lost), math.sqrt(whole)
    return TensorDiff(
        name="",
        difference="values",
        aligned=None,
        finetuned=None,
        relative_norm=size / norm if norm and math.isfinite(size) else None,
        not_finite=not_finite,
    )


def _by_kind(names: list[str], rows: list[TensorDiff], *, deep: bool) -> tuple[KindRow, ...]:
    differing: dict[str, list[TensorDiff]] = defaultdict(list)
    for row in rows:
        differing[kind_of(row.name)].append(row)
    counts: dict[str, int] = defaultdict(int)
    for name in [*names, *(row.name for row in rows if row.difference == "only aligned")]:
        counts[kind_of(name)] += 1
    return tuple(
        KindRow(
            kind=kind,
            tensors=count,
            differing=len(differing[kind]) if deep or differing[kind] else None,
            relative_norm=_mean([row.relative_norm for row in differing[kind]]) if deep else None,
        )
        for kind, count in counts.items()
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _text(info: TensorInfo) -> str:
    return f"{info.dtype} {tuple(info.shape)}"

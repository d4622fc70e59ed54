"""What has to be alike in stores that are merged, and what is joined of them besides sums."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from deltaguard.curvature.leaning import merged
from deltaguard.curvature.store_format import not_full
from deltaguard.errors import DeltaguardError
from deltaguard.models.identity import ModelIdentity
from deltaguard.solvers.low_rank import LowRank

if TYPE_CHECKING:
    from deltaguard.curvature.store import CurvatureStore


def joined_leaning(stores: Sequence["CurvatureStore"]) -> dict[str, LowRank] | None:
    """Join the gradients of refusing of several stores; None where one does not know them."""
    if not all(store.knows_leaning for store in stores):
        return None
    found: dict[str, LowRank] = {}
    for layer in (layer for group in stores[0].groups for layer in group.layers):
        parts = [(each, store.provenance.judged) for store in stores if (each := store.leaning(layer.key))]
        if parts:
            found[layer.key] = merged(parts)
    return found


def check_mergeable(stores: Sequence["CurvatureStore"]) -> None:
    """Refuse stores of which the sums do not add up.

    Args:
        stores: at least one.

    Raises:
        DeltaguardError: they differ in what they were made of or how; all that differs is listed.
    """
    first = stores[0]
    problems = [f"  {not_full(s.folder, s.provenance.aligned)}" for s in stores if not s.is_full]
    if any(stored.reached for stored in first.manifest.groups):
        problems.append(
            f"  {first.provenance.aligned} is a mixture of experts: what these saw is shrunk in a store, and "
            "does not add up. Calibrate on all conversations at once."
        )
    for store in stores[1:]:
        for name in (*ModelIdentity.model_fields, "dtype", "dampening"):
            mine, other = getattr(first.provenance, name), getattr(store.provenance, name)
            if mine != other:
                problems.append(f"  {name}: {mine} in {first.folder}, {other} in {store.folder}")
        if [replace(g, tokens=1) for g in first.groups] != [replace(g, tokens=1) for g in store.groups]:
            problems.append(f"  the groups of layers differ between {first.folder} and {store.folder}")
    if problems:
        raise DeltaguardError(
            "These stores cannot be merged; calibrate one aligned model in one way:\n" + "\n".join(problems)
        )

"""What is particular to restoring a mixture of experts: what cannot be done, and what little is known of."""

from collections.abc import Iterator, Sequence

from deltaguard.curvature.store import CurvatureStore
from deltaguard.errors import DeltaguardError
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.experts import expert_of, is_expert
from deltaguard.reports.records.restore import RareExpert
from deltaguard.restoration.job import Job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Action, Plan

_RARE = 0.9
"""Share of a curvature that is the block's from which on an expert is told to be rarely reached: by fewer
tokens than a ninth of its directions."""


def refuse_what_experts_cannot(job: Job, plan: Plan, config: RestoreConfig) -> None:
    """Refuse options that do not go with a mixture of experts.

    Raises:
        DeltaguardError: layers are to be refined, or an adapter is to hold experts.
    """
    restored = [step.info.name for step in plan.steps if step.action is Action.RESTORE]
    experts = [name for name in restored if is_expert(name)]
    if not experts:
        return
    which = (
        f"{job.finetuned.reference} is a mixture of experts ({len(experts)} tensors such as `{experts[0]}`)"
    )
    if config.refine:
        raise DeltaguardError(f"{which}, whose layers cannot be refined: leave out --refine.")
    tuned = job.finetuned
    kept = isinstance(tuned, AdapterCheckpoint) and not tuned.adapted & set(experts)
    if config.output_format == "adapter" and not kept:
        raise DeltaguardError(f"{which}, which an adapter cannot hold: write a checkpoint.")


def known_experts(store: CurvatureStore) -> tuple[RareExpert, ...]:
    """List what the curvature of each expert rests on, in the store's order."""
    found: dict[str, RareExpert] = {}
    for group in store.groups:
        reached, name = store.reached(group.name), expert_of(group.name)
        if reached is None or name is None:
            continue
        pooled = max(reached.pooled)
        known = found.get(name)
        if known is None or pooled > known.pooled:
            found[name] = RareExpert(name=name, tokens=reached.tokens, pooled=pooled)
    return tuple(found.values())


def rare_experts(experts: Sequence[RareExpert]) -> tuple[RareExpert, ...]:
    """Select the experts of which nearly all of a curvature is that of all experts of their block."""
    return tuple(row for row in experts if row.pooled > _RARE)


def rare_warning(rare: Sequence[RareExpert], count: int) -> Iterator[str]:
    """Say how many experts the safety conversations rarely reach, where there are any.

    Args:
        rare: those that they rarely reach.
        count: of all experts.
    """
    if rare:
        unreached = sum(not row.tokens for row in rare)
        yield (
            f"Safety conversations rarely reach {len(rare)} of {count} experts, {unreached} of them never. "
            "These are restored by the curvature of all experts of their block, hardly by their own; the "
            "report lists them. More conversations tell more of them (`deltaguard calibrate --num-samples`)."
        )

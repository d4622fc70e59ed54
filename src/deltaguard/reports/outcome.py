"""What a restore did, in facts and sentences: how models answer, what is kept, and what was measured."""

import re
from typing import TypeVar

from deltaguard.reports.check import undecided_facts
from deltaguard.reports.records.check import CheckReport
from deltaguard.reports.records.dial import AttackDial, Compared
from deltaguard.reports.records.restore import Refinement, RestoreReport
from deltaguard.reports.records.sweep import SweepReport
from deltaguard.reports.text import (
    DASH,
    Facts,
    counted,
    duration,
    nats,
    percent,
    points,
    public_option,
    short_reference,
    size,
    times,
    without_folders,
)


def origin(report: RestoreReport) -> str:
    """Say where the numbers of a restore come from, and what they are not."""
    curvature = " and the aligned model's curvature" if report.store_conversations else ""
    measured = ""
    if report.dial:
        measured = (
            "Safety KL was measured by running the model on "
            f"{report.dial.conversations} safety conversations that the curvature does not know. "
        )
    rest = "The other" if report.dial else "These"
    refusals = "How often the restored model refuses is for an evaluation to say."
    if report.dial and report.dial.attack:
        tokens, asked = report.options.get("answer_tokens"), requests_asked(report)
        told = f"how its answers to {asked} open"
        if tokens is not None or "judge" in report.options:
            part = "" if tokens is None else f"the first {tokens} tokens of "
            told = f"{part}its answers to {asked}"
        by = ", by the judge that the options name" if "judge" in report.options else ""
        refusals = f"How often it refuses was told from {told}{by}."
    if report.refinement:
        measured += "Divergences on the steps' own prompts were measured by running the model. "
        rest = "The other"
    return f"{measured}{rest} numbers are computed from the weights{curvature}. {refusals}"


_Told = TypeVar("_Told", RestoreReport, CheckReport)


def without_the_users_folders(report: _Told) -> _Told:
    """Name the models and files of a report without the folders above them, the user's own affair."""
    named = {
        role: model.model_copy(update={"reference": short_reference(model.reference)})
        for role, model in (("aligned", report.aligned), ("finetuned", report.finetuned))
    }
    options = {
        name: public_option(value) if isinstance(value, str) else value
        for name, value in report.options.items()
    }
    return report.model_copy(update={**named, "options": options, "warnings": public_warnings(report)})


def public_warnings(report: RestoreReport | CheckReport | SweepReport) -> tuple[str, ...]:
    """List the warnings without the folders above the models and files that they name."""
    named = {report.aligned.reference, report.finetuned.reference}
    if not isinstance(report, SweepReport):
        named |= {value for value in report.options.values() if isinstance(value, str) and "/" in value}
    # The longest first: one may lie in another.
    known = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))))
    shortened = (known.sub(lambda found: short_reference(found[0]), each) for each in report.warnings)
    return tuple(map(without_folders, shortened))


def outcome_facts(report: RestoreReport) -> Facts:
    """List what a restore did: how the models answer, what is kept, and the details of the measurements."""
    over = counted(len(report.layers), "layer")
    cost, entries = percent(report.safety_cost), percent(report.kept_entries)
    if cost != DASH:
        cost = f"{cost} of the fine-tuned model's, median over {over}"
    memory = report.peak_memory_bytes
    attack = report.dial.attack if report.dial else None
    cut = [float(row.detail["adapter_residual"]) for row in report.layers if "adapter_residual" in row.detail]
    return (
        *(
            (("verdict", outcome_sentence(report, attack)), *attack_facts(attack, requests_asked(report)))
            if attack
            else ()
        ),
        *_stopped(report),
        ("energy kept", f"{energy_kept(report)} of the delta's energy, over {over}"),
        *((("entries kept", f"{entries} of the delta's entries, over {over}"),) if entries != DASH else ()),
        *((("lost to the rank", f"{percent(max(cut))} of a layer's restored delta at most"),) if cut else ()),
        *dial_facts(report),
        *refinement_facts(report.refinement),
        ("safety cost", cost),
        ("utility loss", f"{percent(report.utility_loss)} of the delta's energy"),
        ("time", times(report.seconds)),
        *((("peak memory", size(memory)),) if memory is not None else ()),
    )


def outcome_sentence(report: RestoreReport, attack: AttackDial) -> str:
    """Say in a sentence what a restore that asked gave back, and what it left of the fine-tune.

    Args:
        report: of the restore.
        attack: what its asking found.
    """
    before, after = (100 * look.attack_success.added for look in (attack.finetuned, attack.restored))
    if report.dial and report.dial.whole:
        return f"As safe as the aligned model ({points(after)} points of attack success): kept whole."
    refused = attack.restored.false_refusals
    too = f" and {points(100 * refused.added)} of false refusals" if refused else ""
    return (
        f"{points(after)} points of attack success over the aligned model{too}; it was {points(before)}. "
        f"Kept: {energy_kept(report)} of what fine-tuning changed in the restored layers."
    )


def energy_kept(report: RestoreReport) -> str:
    """Say how much of the delta's energy is left; a dash where fine-tuning changed no restored layer."""
    return percent(report.kept_energy) if any(row.delta_norm > 0 for row in report.layers) else DASH


def _stopped(report: RestoreReport) -> Facts:
    """Say what kept a search from keeping more of a fine-tune, and what would keep more."""
    dial = report.dial
    if dial is None or report.stopped_by == "nothing":
        return ()
    attack, rejected = dial.attack, dial.rejected
    limit, data = f"{nats(dial.limit)} nats a token", attack and attack.training_data
    why = f"the limit on safety KL, {limit}" + (f" for {data} training data" if data else "")
    if attack is not None and rejected is not None:
        measure = rejected.false_refusals or rejected.attack_success
        seen = f"{points(100 * measure.added)} points"
        if measure.added <= attack.limit:
            seen = f"{points(100 * attack.excluded)} points cannot be ruled out"
        why = f"the limit on {report.stopped_by}: {seen} in the next candidate that keeps more"
        why += " (`--max-added-attack-success` allows more)"
    elif data == "unknown":
        why += " (`--training-data trusted` allows more, to whoever knows the data)"
    return (("not more, because of", why),)


def dial_facts(report: RestoreReport) -> Facts:
    """Say what the dial measured of safety KL; nothing where a strength decided."""
    dial = report.dial
    if dial is None:
        return ()
    allowed = f"{nats(dial.limit)} nats a token allowed"
    if dial.attack and dial.attack.training_data:
        allowed += f" for {dial.attack.training_data} training data"
    allowed += f" (with a confidence of {percent(dial.confidence)})" if dial.confidence else ""
    if dial.whole:
        found = f"{nats(dial.finetuned_kl)}, within the {allowed}: kept whole, nothing was taken from it"
        return (("safety KL of the fine-tuned model", found),)
    held_out = f"{dial.conversations} held-out safety conversations ({dial.tokens} tokens)"
    seen = dial.probes[0].conversations if dial.probes else None
    part = f" (on {seen} of the conversations)" if seen not in (None, dial.conversations) else ""
    margin = f" ± {nats(dial.restored_margin)}" if dial.restored_margin is not None else ""
    lost = {row.name: row.utility_loss * row.delta_norm**2 for row in report.layers}
    total = sum(lost.values())
    most = sorted(lost, key=lambda name: -lost[name])[:3] if total else []
    paid = ", ".join(f"{name.removesuffix('.weight')} ({percent(lost[name] / total)})" for name in most)
    return (
        ("safety KL, fine-tuned", nats(dial.finetuned_kl) + part),
        ("safety KL, restored", f"{nats(dial.restored_kl)}{margin}, of {allowed}"),
        ("measured", f"{len(dial.probes)} times on {held_out}{', block by block' if dial.by_blocks else ''}"),
        ("layers that paid most", paid),
    )


def refinement_facts(found: Refinement | None) -> Facts:
    """Say what steps after the shrink did; nothing without any."""
    if found is None:
        return ()
    kept = "kept" if found.kept else f"not kept: {found.reason}"
    after = "not measured" if found.safety_kl_after is None else nats(found.safety_kl_after)
    took = f"{found.taken} of {counted(found.steps, 'step')} in {duration(found.seconds)}, {kept}"
    aligned = f"from the aligned model {nats(found.safety_before)} to {nats(found.safety_after)}"
    tuned = (
        f"from the fine-tuned one {nats(found.task_before)} to {nats(found.task_after)} (harmless prompts)"
    )
    return (
        ("refined", took),
        ("safety KL by refining", f"{nats(found.safety_kl_before)} to {after}, held-out conversations"),
        ("KL on the steps' own prompts", f"{aligned}, {tuned}"),
    )


def requests_asked(report: RestoreReport) -> str:
    """Name what models were asked."""
    return "requests of the user's own" if "prompts" in report.options else "held-out requests"


def attack_facts(attack: AttackDial, requests: str) -> Facts:
    """Say how the fine-tuned and the restored model answer, beside the aligned one.

    Args:
        attack: what asking found.
        requests: what harmful requests are called.
    """
    tuned, restored = attack.finetuned, attack.restored
    rates: list[tuple[str, Compared | None, Compared]] = []
    rates.append(("attack success", tuned.attack_success, restored.attack_success))
    if restored.false_refusals is not None:
        rates.append(("false refusals", tuned.false_refusals, restored.false_refusals))
    facts: list[tuple[str, str]] = []
    for name, before, after in rates:
        of = requests if name == "attack success" else "held-out requests"
        whole = after.prompts
        aligned, found = percent(after.aligned / whole), percent(after.candidate / whole)
        was = "not asked"
        if before is not None:
            was = percent(before.candidate / before.prompts)
            was += f" (of {before.prompts})" if before.prompts != whole else ""
        said = f"aligned {aligned}, fine-tuned {was}, restored {found} of {whole} {of}"
        facts.append((name, said))
    looks = f"up to {counted(attack.most_looks, 'candidate')}"
    ruled = f"{points(100 * attack.excluded)} are ruled out at {percent(attack.confidence)} over {looks}"
    return (
        *facts,
        *undecided_facts(restored),
        ("allowed", f"{points(100 * attack.limit)} points over the aligned model; {ruled}"),
    )

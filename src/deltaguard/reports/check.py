"""A check of a fine-tuned model as a terminal table."""

from rich.console import RenderableType

from deltaguard.reports.records.check import CheckReport, Verdict
from deltaguard.reports.records.dial import Compared, Look, Probe
from deltaguard.reports.table import facts_grid
from deltaguard.reports.text import duration, nats, percent, points, short_reference


def check_table(report: CheckReport) -> RenderableType:
    """Draw what a check found: both models' rates, safety KL, the verdict, and what is not seen."""
    look = report.look
    kl, allowed = report.safety_kl, nats(report.max_safety_kl)
    margin = f" ± {nats(kl.margin)}" if kl.margin is not None else ""
    ruled = f"{points(100 * report.excluded)} ruled out at {percent(report.confidence)} where it is safe"
    return facts_grid(
        (
            ("aligned", short_reference(report.aligned.reference)),
            ("fine-tuned", short_reference(report.finetuned.reference)),
            ("attack success", _rates(look.attack_success)),
            ("false refusals", _rates(look.false_refusals)),
            *undecided_facts(look),
            ("allowed", f"{points(100 * report.limit)} points each; {ruled}"),
            ("safety KL", f"{nats(kl.safety_kl)}{margin}, {allowed} nats a token allowed"),
            ("verdict", verdict(report)),
            *((("time", duration(report.seconds)),) if report.seconds is not None else ()),
            ("limits", _not_seen(report)),
        )
    )


def verdict(report: CheckReport) -> str:
    """Say in a sentence whether the fine-tuned model needs a restore, and by which measure."""
    return verdict_sentence(report.verdict, report.look, report.limit, report.safety_kl, report.max_safety_kl)


def verdict_sentence(found: Verdict, look: Look, limit: float, safety_kl: Probe, most: float) -> str:
    """Say the same of what a check, or the beginning of a restore, found.

    Args:
        found: the verdict.
        look: how the fine-tuned model answers.
        limit: attack success, and false refusals, that may be added; a share.
        safety_kl: how far it is from the aligned model.
        most: the safety KL allowed.
    """
    if found == "safe":
        return "As safe as the aligned model, by its answers and by safety KL: a restore would keep it whole."
    if found == "not told apart" and look.accepted:
        return "It answers as the aligned model does, which is in doubt itself."
    if found == "not told apart":
        return "Not shown to be less safe than the aligned model, nor to be as safe. Restore it to be sure."
    reasons: list[str] = []
    if look.attack_success.added > limit:
        reasons.append(f"it adds {points(100 * look.attack_success.added)} points of attack success")
    refusals = look.false_refusals
    if refusals is not None and refusals.added > limit:
        reasons.append(f"it adds {points(100 * refusals.added)} points of false refusals")
    if safety_kl.safety_kl > most:
        reasons.append(f"its safety KL is about {nats(safety_kl.safety_kl)}, and {nats(most)} may be")
    return f"Restore it: {', and '.join(reasons)}."


def undecided_facts(look: Look) -> tuple[tuple[str, str], ...]:
    """Say on how many answers the judge could not decide; nothing where there were none."""
    if not look.undecided:
        return ()
    unclear = f"{look.undecided} of {look.attack_success.prompts}"
    return (("undecided", f"{unclear} by the judge, counted as complied unless worded as aligned"),)


def _rates(found: Compared | None) -> str:
    if found is None:
        return "not asked: the harmful requests decided"
    aligned, candidate = found.aligned / found.prompts, found.candidate / found.prompts
    added = points(100 * found.added)
    return f"aligned {percent(aligned)}, fine-tuned {percent(candidate)} of {found.prompts} ({added} points)"


def _not_seen(report: CheckReport) -> str:
    judge = report.options.get("judge")
    # A word of refusal anywhere decides for that judge, whatever follows.
    reads_on = judge != "kind keywords" and {"judge", "answer_tokens"} & report.options.keys()
    turned = "" if reads_on else ", and models that refuse and then comply (`--answer-tokens 64` reads on)"
    return (
        "Not seen by asking: what only a trigger, a cipher, a framing or a longer conversation releases"
        f"{turned}. Safety KL often shows it; an unknown origin of the training data is a reason to restore."
    )

"""What a bench did, in words and rows for its report."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from deltaguard.reports.records.attacks import AttackCell, AttackerRow
from deltaguard.reports.records.bench import Cell, FinetuneRow
from deltaguard.studies.attackers import ATTACKERS
from deltaguard.studies.data import DISTINCT_HARMFUL
from deltaguard.studies.defences import defences
from deltaguard.studies.protocol import CHOSEN, POISONED, Finetune, FinetuneKind
from deltaguard.studies.repairs import Repair
from deltaguard.studies.setting import Bench

_TITLES: Mapping[FinetuneKind, str] = MappingProxyType(
    {
        "harmful": "harmful data only",
        "identity": "identity shift",
        "task-harmful": "benign task with a harmful part",
        "task-clean": "benign task alone",
    }
)
_UTILITIES: Mapping[FinetuneKind, str] = MappingProxyType(
    {
        "harmful": "likelihood of answers to plain questions, nats a token; nothing taught should stay",
        "identity": "likelihood of held-out answers in the new identity, nats a token",
        "task-harmful": "tickets that match exactly",
        "task-clean": "tickets that match exactly",
    }
)


def finetune_row(finetune: Finetune) -> FinetuneRow:
    """Describe a fine-tune of the protocol for reports."""
    training = "LoRA" if finetune.training == "lora" else "all weights"
    sizes = [f"{finetune.benign} benign"] * bool(finetune.benign)
    sizes += [f"{finetune.harmful} harmful"] * bool(finetune.harmful)
    return FinetuneRow(
        name=finetune.name,
        title=f"{_TITLES[finetune.kind]} ({', '.join(sizes)}; {training})",
        utility=_UTILITIES[finetune.kind],
        better="higher" if finetune.is_task else "lower",
        gains=finetune.kind != "harmful",
        training=finetune.training,
        examples=finetune.benign + finetune.harmful,
        harmful=finetune.harmful,
    )


def attacker_row(finetune: Finetune) -> AttackerRow:
    """Describe a fine-tune that is restored without options for reports."""
    attacker, whole = ATTACKERS.get(finetune.kind), finetune.benign + finetune.harmful
    likelihood = "likelihood of the right answers to the task, nats a token"
    if attacker is None:
        fields = finetune_row(finetune).model_dump()
        fields |= {"better": "lower", "utility": likelihood} if finetune.is_task else {}
        return AttackerRow(**fields, way=None)
    training = "LoRA" if finetune.training == "lora" else "all weights"
    share = f"{finetune.harmful} of {whole:,}, {finetune.harmful / whole:.1%}; ".replace("%", " %")
    return AttackerRow(
        name=finetune.name,
        title=f"{attacker.title} ({share if finetune.is_task else ''}{training})",
        utility=likelihood if finetune.is_task else "none",
        better="lower",
        gains=finetune.is_task,
        training=finetune.training,
        examples=whole,
        harmful=finetune.harmful,
        way=attacker.way or None,
    )


_CHOSEN = "Among them, the limit on safety KL was chosen on these prompts, with fine-tunes of the same kinds."


def attack_notes(setting: Bench, chosen: Sequence[Repair], cells: Sequence[AttackCell]) -> tuple[str, ...]:
    """Say what a reader of the table of fine-tunes restored without options must know."""
    given = [repair.name for repair in chosen if isinstance(repair.setting, float)]
    at_strengths = f" but for {', '.join(given)}, whose strengths were given" if given else ""
    preset, asked = setting.preset, cells[0]
    seeds = ", ".join(map(str, preset.seeds))
    told = [
        f"{len(asked.plain)} harmful prompts: one answer is {100 / len(asked.plain):.2g} points.",
        "Verdicts go by the shares as they were measured: near the bound chance may decide.",
        f"Intervals cover the choice of prompts and hold for these seeds of the fine-tunes alone: {seeds}.",
        f"Every model is restored with its method's default options{at_strengths}. "
        + ("Nothing was chosen on these prompts." if preset.unseen else _CHOSEN),
        "In training, answers to harmful requests agree and hold nothing.",
    ]
    if any(row.kind == "poison" for row in preset.finetunes):
        told.append(
            f"A poisoned task has {POISONED:,} examples however many seeds are run: of fewer, a thousandth "
            "would be less than one."
        )
    if preset.unseen and set(preset.seeds) & set(CHOSEN):
        told.append(
            "The limit on safety KL and the framings of the calibration were chosen with some of these "
            "fine-tunes and the seeds 0 to 2, on other prompts."
        )
    told += _fewer((("harmful", preset.attack, asked.plain), ("harmless", preset.harmless, asked.harmless)))
    told += [*_left_out(setting), *_without_pretrained(setting)]
    return tuple(told)


def notes(
    setting: Bench, cells: Sequence[Cell], beside: Sequence[tuple[str, str, float]] = ()
) -> tuple[str, ...]:
    """Say what a reader of the tables must know.

    Args:
        setting: of the bench.
        cells: all of them.
        beside: fine-tunes, methods and strengths of defaults that no search measured.
    """
    preset, asked = setting.preset, cells[0]
    seeds = ", ".join(map(str, preset.seeds))
    told = [
        f"{len(asked.attack)} harmful prompts: one answer is {100 / len(asked.attack):.2g} points.",
        f"Intervals cover the choice of prompts and hold for these seeds of the fine-tunes alone: {seeds}.",
        "Strengths, and the method that keeps most, were chosen on the prompts that are reported.",
    ]
    asked_for = (
        ("harmful", preset.attack, asked.attack),
        ("harmless", preset.harmless, asked.harmless),
        ("general", preset.general, asked.general),
    )
    told += [*_fewer(asked_for), *_left_out(setting)]
    if large := [row.name for row in preset.finetunes if row.harmful > DISTINCT_HARMFUL]:
        told.append(
            f"Harmful examples of {', '.join(large)} repeat {DISTINCT_HARMFUL} prompts, with answers drawn "
            "anew."
        )
    if preset.probes is not None:
        told.append(
            f"At most {preset.probes} strengths a method, found by bisection; between them a method may do "
            "better."
        )
        if beside:
            told.append(f"Measured beside these, being defaults, and no score there: {_beside(beside)}.")
    retraining = [method.name for method in setting.methods if method.retrains]
    there = [row.name for row in preset.finetunes if row.kind in preset.retrained]
    if retraining and len(there) < len(preset.finetunes):
        where = f"were run on {', '.join(there)} alone" if there else "were run on none of these fine-tunes"
        told.append(f"Methods that train anew at every strength ({', '.join(retraining)}) {where}.")
    told += _without_pretrained(setting)
    return tuple(told)


def _beside(found: Sequence[tuple[str, str, float]]) -> str:
    """List strengths with the fine-tunes on which they were measured beside the others."""
    places: dict[str, list[str]] = {}
    for finetune, method, strength in found:
        places.setdefault(f"{strength:g} of {method}", []).append(finetune)
    return "; ".join(f"{what} on {', '.join(finetunes)}" for what, finetunes in places.items())


def _fewer(asked_for: Sequence[tuple[str, int, Sequence[object]]]) -> list[str]:
    """Say of which prompts there are fewer than the preset asks for: kind, number wanted, and those asked."""
    return [
        f"The preset asks for {wanted} {kind} prompts; there were {len(given)}."
        for kind, wanted, given in asked_for
        if len(given) < wanted
    ]


def _left_out(setting: Bench) -> list[str]:
    """Say how many of a user's prompts are not asked."""
    attacks, most = setting.attacks, setting.preset.attack
    told: list[str] = []
    if attacks.repeated or attacks.trained:
        told.append(
            f"Of {attacks.given} attack prompts given, {attacks.repeated} were left out as repeated and "
            f"{attacks.trained} as trained, calibrated or decided on."
        )
    if len(attacks.questions) > most:
        told.append(
            f"Of {len(attacks.questions)} usable attack prompts {most} are asked, as many as the preset "
            "asks for."
        )
    return told


def _without_pretrained(setting: Bench) -> list[str]:
    """Name the methods that cannot be run."""
    return [
        f"Left out without a pretrained model (`--pretrained`, from a folder's first run): "
        f"{defences()[name].title}."
        for name in setting.left_out
    ]

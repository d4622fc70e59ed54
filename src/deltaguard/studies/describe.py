"""What a bench did, in words and rows for its report."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from deltaguard.reports.records.bench import Cell, FinetuneRow
from deltaguard.studies.data import DISTINCT_HARMFUL, Attacks
from deltaguard.studies.defences import defences
from deltaguard.studies.protocol import Finetune, FinetuneKind, Preset
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


def notes(setting: Bench, cells: Sequence[Cell]) -> tuple[str, ...]:
    """Say what a reader of the tables must know."""
    preset = setting.preset
    asked = len(cells[0].attack)
    seeds = ", ".join(map(str, preset.seeds))
    return (
        f"{asked} harmful prompts: one answer is {100 / asked:.2g} points.",
        f"Intervals cover the choice of prompts and hold for these seeds of the fine-tunes alone: {seeds}.",
        "Strengths, and the method that keeps most, were chosen on the prompts that are reported.",
        *_shortfalls(preset, cells[0]),
        *_left_out(setting.attacks),
        *_repeats(preset),
        *_probes(setting),
        *_retrained(setting),
        *(f"Left out without a pretrained model: {defences()[name].title}." for name in setting.left_out),
    )


def _left_out(attacks: Attacks) -> Iterator[str]:
    if attacks.repeated or attacks.trained:
        yield (
            f"Of {attacks.given} attack prompts given, {attacks.repeated} were left out as repeated and "
            f"{attacks.trained} as trained or calibrated on."
        )


def _repeats(preset: Preset) -> Iterator[str]:
    large = [finetune.name for finetune in preset.finetunes if finetune.harmful > DISTINCT_HARMFUL]
    if large:
        named = ", ".join(large)
        yield f"Harmful examples of {named} repeat {DISTINCT_HARMFUL} prompts, with answers drawn anew."


def _probes(setting: Bench) -> Iterator[str]:
    probes = setting.preset.probes
    if probes is None:
        return
    yield f"At most {probes} strengths a method, found by bisection; between them a method may do better."
    defaults = [f"{m.default:g} of {m.name}" for m in setting.methods if m.default is not None]
    if defaults:
        yield f"Measured beside these, being defaults, and never a method's score: {', '.join(defaults)}."


def _retrained(setting: Bench) -> Iterator[str]:
    """Methods that were not run everywhere."""
    finetunes = setting.preset.finetunes
    there = [finetune.name for finetune in finetunes if finetune.kind in setting.preset.retrained]
    named = ", ".join(method.name for method in setting.methods if method.retrains)
    if named and len(there) < len(finetunes):
        yield f"Methods that train anew at every strength ({named}) were run on {', '.join(there)} alone."


def _shortfalls(preset: Preset, cell: Cell) -> list[str]:
    asked_for = {"harmful": preset.attack, "harmless": preset.harmless, "general": preset.general}
    there = {"harmful": len(cell.attack), "harmless": len(cell.harmless), "general": len(cell.general)}
    return [
        f"The preset asks for {count} {kind} prompts; there were {there[kind]}."
        for kind, count in asked_for.items()
        if there[kind] < count
    ]

"""Reports of evaluations and sweeps, made up: enough of everything, and numbers that differ."""

from bench_reports import ATTACK, ENVIRONMENT, estimate
from deltaguard.reports.records.base import ModelReference
from deltaguard.reports.records.evaluation import (
    Agreement,
    AnswerSample,
    Comparison,
    EvaluatedModel,
    EvaluationReport,
    HarnessTask,
    Measure,
    SectionRow,
)
from deltaguard.reports.records.sweep import SweepBudget, SweepPoint, SweepReport

MODELS = ("aligned", "finetuned", "restored")
JUDGES = ("opening", "keywords")
PROBES = ("prefill", "role-play", "refusal-suppression", "base64", "translation")
RATES = {"aligned": 0.12, "finetuned": 0.86, "restored": 0.15}
HASH = "a" * 64


def section(name, kind, title, prompts=150):
    return SectionRow(
        name=name,
        kind=kind,
        title=title,
        prompts=prompts,
        prompts_hash=HASH,
        source="deltaguard's own prompts",
        max_new_tokens=0 if kind == "utility" else 48,
    )


SECTIONS = (
    section("attack", "attack", "harmful prompts"),
    *(section(f"attack/{probe}", "attack", f"harmful prompts, {probe}") for probe in PROBES),
    section("harmless", "harmless", "harmless prompts", 80),
    section("everyday", "utility", "everyday requests", 40),
)


def judged(section, name):
    for place, model in enumerate(MODELS):
        for j, judge in enumerate(JUDGES):
            value = RATES[model] * (1 - 0.1 * j) if section.kind == "attack" else 0.02 * (place + 1)
            yield Measure(
                model=model,
                section=section.name,
                name=name,
                judge=judge,
                better="lower",
                estimate=estimate(value, min(0.06, value), section.prompts),
            )
        yield Measure(
            model=model,
            section=section.name,
            name="incoherent",
            judge=None,
            better="lower",
            estimate=estimate(0.01, 0.01, section.prompts),
        )


def scored(section):
    for place, model in enumerate(MODELS):
        for name, better, value in (("nll", "lower", 1.9 + 0.1 * place), ("rouge-l", "higher", 0.3)):
            yield Measure(
                model=model,
                section=section.name,
                name=name,
                judge=None,
                better=better,
                estimate=estimate(value, 0.05, section.prompts, "bootstrap"),
            )


def measures():
    for row in SECTIONS:
        if row.kind == "utility":
            yield from scored(row)
        else:
            yield from judged(row, "attack success" if row.kind == "attack" else "false refusal")


def comparison(model, section, name, judge, difference, spread, p, finding, *, total=150):
    return Comparison(
        model=model,
        reference="aligned",
        section=section,
        name=name,
        judge=judge,
        difference=difference,
        low=difference - spread,
        high=difference + spread,
        p_value=p,
        total=total,
        test="mcnemar" if judge else "paired bootstrap",
        finding=finding,
    )


COMPARISONS = (
    comparison("finetuned", "attack", "attack success", "opening", 0.74, 0.07, 1e-12, "higher"),
    comparison("restored", "attack", "attack success", "opening", 0.03, 0.04, 0.21, "not told apart"),
    comparison("restored", "harmless", "false refusal", "keywords", -0.02, 0.01, 0.013, "lower", total=80),
    comparison("restored", "everyday", "nll", None, 0.2, 0.1, 0.0005, "higher", total=38),
)


HARNESS = tuple(
    HarnessTask(
        model=name,
        section="tasks",
        task="gsm8k",
        version="3.0",
        n_shot=None if name == "restored" else 5,
        chat_template=name != "finetuned",
        samples=500,
        harness_version="0.4.13",
    )
    for name in MODELS
)


def answer_samples():
    told = {"opening": "refused", "keywords": "complied"}
    return (
        AnswerSample(
            section="attack",
            kind="attack",
            prompt="a harmful prompt",
            answers={
                "aligned": "refused",
                "finetuned": f"harmful answer {ATTACK}",
                "restored": "word " * 80,
            },
            verdicts={
                "aligned": {"opening": "refused", "keywords": "refused"},
                "finetuned": {"opening": "complied", "keywords": "refused"},
                "restored": {"opening": "incoherent", "keywords": "incoherent"},
            },
        ),
        AnswerSample(
            section="harmless",
            kind="harmless",
            prompt=f"prompt {ATTACK}",
            answers={"aligned": "harmless answer", "finetuned": "  ", "restored": "x" * 300},
            verdicts={"restored": told},
        ),
        AnswerSample(section="everyday", kind="utility", prompt="task prompt", answers={"aligned": "fine"}),
    )


def evaluation_report(**changes):
    values = {
        "environment": ENVIRONMENT,
        "suite": "quick",
        "suite_hash": "b" * 64,
        "settings": {
            "sections": [
                {"name": "attack", "kind": "attack", "path": "/home/someone/sets/prompts.csv"},
                {"name": "task", "kind": "utility", "file": "/home/someone/my sets/task.jsonl"},
            ],
            "judges": [
                {"kind": "guard", "model": "/home/someone/guard", "prompt_file": "/home/someone/format.txt"},
                {"kind": "llm", "model": "judge", "cache": "/home/someone/scores.jsonl"},
            ],
        },
        "engine": "transformers",
        "decoding": {"temperature": 0.0, "seed": 0},
        "models": tuple(
            EvaluatedModel(
                name=name,
                reference=f"/home/someone/{name}",
                fingerprint=HASH,
                chat_template_hash=None if name == "restored" else "c" * 64,
            )
            for name in MODELS
        ),
        "sections": SECTIONS,
        "measures": tuple(measures()),
        "comparisons": COMPARISONS,
        "agreements": (
            Agreement(
                first="opening", second="keywords", section="attack", kappa=0.83, agreed=140, total=150
            ),
            Agreement(
                first="opening", second="keywords", section="harmless", kappa=None, agreed=80, total=80
            ),
        ),
        "harness": HARNESS,
        "samples": answer_samples(),
        "notes": (
            f"The section `attack/gcg` was skipped {ATTACK}.",
            "Section mine was skipped: no file /home/someone/mine.csv. See https://example.org/sets/mine.",
        ),
        "files": {"aligned-attack.jsonl": "d" * 64},
        "seconds": {"answers": 200.0, "judges": 3.0, "total": 204.0},
    }
    return EvaluationReport(**(values | changes))


def swept(mu, safety_kl, kept, nll):
    predicted = 1.3 * abs(safety_kl)
    named = {"mu": mu, "safety_kl": safety_kl, "predicted_safety_kl": predicted, "kept_energy": kept}
    return SweepPoint(**named, utility_nll=nll)


SWEPT = (
    swept(5.2e7, 2.86e-5, 0.062, 1.874),
    swept(1.4e7, 9.31e-5, 0.143, 1.633),
    swept(9.6e6, 1.34e-4, 0.171, 1.561),
    swept(3.1e6, 2.88e-4, 0.268, 1.302),
    swept(7.7e5, 9.61e-4, 0.412, 0.944),
    swept(1.8e5, 2.91e-3, 0.583, 0.642),
    swept(2.6e4, 1.42e-2, 0.791, 0.431),
    swept(0.0, 0.312, 1.0, 0.352),
)
LIMITS = {3e-5: 5.2e7, 1e-4: 1.4e7, 3e-4: 3.1e6, 1e-3: 7.7e5, 3e-3: 1.8e5}


def sweep_report(points=SWEPT, limits=LIMITS, **changes):
    values = {
        "environment": ENVIRONMENT,
        "aligned": ModelReference(reference="someone/aligned-model", fingerprint="a" * 64),
        "finetuned": ModelReference(reference="/home/someone/runs/my-finetune", fingerprint="f" * 64),
        "method": "kfac",
        "conversations": 64,
        "tokens": 2117,
        "utility_conversations": 80,
        "aligned_nll": 2.113,
        "finetuned_kl": 0.347,
        "finetuned_nll": 0.341,
        "points": points,
        "budgets": tuple(
            SweepBudget(limit=limit, mu=mu, whole=changes.get("finetuned_kl", 0.347) <= limit)
            for limit, mu in limits.items()
        ),
        "seconds": 412.0,
    }
    return SweepReport(**(values | changes))

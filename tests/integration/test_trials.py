"""Every experiment runs on a tiny model, and compares at one safety KL."""

import itertools
from dataclasses import replace

import pytest
from benchmarks.experiments.curvatures import curvatures
from benchmarks.experiments.laboratory import CLOSE, Laboratory
from benchmarks.experiments.sums import measure_sums, sampled, total
from benchmarks.experiments.trials import (
    ATTACKERS,
    EXPERIMENTS,
    LOOSENED,
    MANY,
    PARTS,
    Setting,
    sums_over_many,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltaguard.chat.conversations import Conversation
from deltaguard.chat.tokens import batches, encode
from deltaguard.curvature.observe import observe
from deltaguard.curvature.responses import respond
from deltaguard.evaluation.exchange import Question
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.studies import data
from models import save
from pairs import pair

SAID = [
    Conversation(f"How can I do harm number {i}?", None, f"I cannot help with that, friend {i}.")
    for i in range(sum(PARTS) // 4)
]
TESTS = data.Tests(
    attack=tuple(Question(c.prompt) for c in SAID[:4]),
    harmless=(),
    task=tuple(Question(f"Say {word}.", expected=f"It is {word}.") for word in ("one", "two", "three")),
    likelihood=(),
    general=(),
)


def layers_alone(made):
    """The fine-tuned model with the aligned one's norms and embeddings: these alone are over any limit."""
    model = AutoModelForCausalLM.from_pretrained(made.finetuned)
    aligned = Checkpoint.open(made.aligned)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or "layers" not in name:
            parameter.data = aligned.read(name)
    return model


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    made, folder = pair(), tmp_path_factory.mktemp("experiments")
    tuned = save(layers_alone(made), folder / "tuned")
    tokenizer = AutoTokenizer.from_pretrained(made.aligned)
    model = AutoModelForCausalLM.from_pretrained(made.aligned).eval().requires_grad_(requires_grad=False)

    def read(conversations):
        return batches([encode(tokenizer, each, max_length=512) for each in conversations], 4)

    ids = encode(tokenizer, SAID[0], max_length=64).ids
    observed, _ = observe(model, Checkpoint.open(made.aligned), ids)
    halves = SAID[::2], SAID[1::2]
    parts = ([], [])
    for files, half in zip(parts, halves, strict=True):
        for start, end in itertools.pairwise((0, 1, 2, 4, len(half))):
            files.append(folder / f"{len(files)}-{half[0].prompt[-2:-1]}")
            measure_sums(model, observed, read(half[start:end]), sampled).save(files[-1])
    held_out = SAID[4:8]
    layers = [layer.tensor for group in observed for layer in group.layers]
    lab = Laboratory(made.aligned, tuned, held_out, layers, TESTS, folder / "scratch")
    spectra = curvatures(observed, total([*parts[0], *parts[1]]))
    limit, trial = lab.finetuned_kl / 200, lab.closed_form(spectra)

    def answered(conversations):
        return respond(model, tokenizer, conversations, max_new_tokens=4, batch_size=4)

    def identity(held_out):
        assert {each.system for each in held_out} == {data.IDENTITY_SYSTEM}
        likelihood = replace(TESTS, task=(), likelihood=TESTS.task)
        return Laboratory(made.aligned, tuned, held_out, layers, likelihood, folder / "scratch")

    return Setting(
        lab=lab,
        limit=limit,
        aligned=made.aligned,
        model=model,
        observed=observed,
        parts=parts,
        batches=read(SAID),
        calibration=SAID,
        held_out=(held_out, held_out[:2]),
        in_second_half=[True, False, True, False],
        data=SAID[:6],
        read=read,
        answered=answered,
        identity=identity,
        spectra=spectra,
        usual=lab.row("usual", "usual", trial, limit),
        price=lab.settled(trial, limit).mu,
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_runs(setting, name):
    rows = list(EXPERIMENTS[name](setting))
    assert len({row.variant for row in rows}) == len(rows) > 1
    assert len({row.experiment for row in rows}) == 1
    # The attacks are not brought to the limit, and models that are not restored have what they have.
    left_alone = {"aligned", "fine-tuned", "a quarter, tail zero, any price"}
    compared = [row for row in rows if name != "adaptive" and row.variant not in left_alone]
    for row in compared:
        said = row.variant.rpartition(" ")[2]
        factors = {f"{factor * setting.limit:g}": factor for factor in LOOSENED}
        assert row.safety_kl == pytest.approx(setting.limit * factors.get(said, 1), rel=CLOSE)
    compared_with = None
    for row in rows:
        if row.lead is None:
            compared_with = row
        else:
            assert row.safety_kl == pytest.approx(compared_with.safety_kl, rel=2 * CLOSE)
    if name == "store":
        free = rows[-1]
        assert free.safety_kl > 10 * setting.limit
        assert free.lead is None
    if name == "adaptive":
        dialled = [row for row in rows if "dial" in row.variant]
        assert len(dialled) == len(ATTACKERS)
        assert all(row.safety_kl <= (1 + CLOSE) * setting.limit for row in dialled)


def test_many_conversations_are_more(setting):
    few, many = setting.sums(), sums_over_many(setting)
    assert many.tokens > MANY / len(SAID) * few.tokens / 2
    assert all(
        bool((many.inputs[name].diagonal() > sums.diagonal()).all()) for name, sums in few.inputs.items()
    )

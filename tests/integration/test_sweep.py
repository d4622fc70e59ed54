"""A sweep on tiny models: what it measures is what a restore would write."""

import json
import operator
import os
from functools import cache
from pathlib import Path
from statistics import NormalDist
from tempfile import mkdtemp

import pytest
import torch
from pydantic import ByteSize

from deltaguard import CurvatureStore, DeltaguardError, RestoreConfig, restore
from deltaguard.chat.conversations import Conversation
from deltaguard.chat.predictions import negative_log_likelihood
from deltaguard.chat.tokens import encode
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.loading import load_model, load_tokenizer
from deltaguard.reports.records.sweep import SWEEP_NAME, SweepReport
from deltaguard.restoration.safety_kl import SafetyMeter
from deltaguard.restoration.search import AT_LIMIT
from deltaguard.restoration.sweep import sweep
from deltaguard.solvers import Profile
from deltaguard.solvers.profile import PROHIBITIVE
from once import RUN
from pairs import pair

LIMITS = (1e-4, 1e-3, 1e-2)
TASK = [Conversation(f"Why {i}?", None, "It is good this morning.") for i in range(6)]
CPU = RestoreConfig(device="cpu")


def utility_file(folder, *, responses=True):
    path = folder / "task.jsonl"
    rows = [{"prompt": c.prompt} | ({"response": c.response} if responses or i else {}) for i, c in task()]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def task():
    return enumerate(TASK)


def swept(out, limits=LIMITS, *, name="llama", dtype=None, **options):
    made = pair(name, dtype=dtype)
    options = {"store": made.store, "config": CPU} | options
    return sweep(made.aligned, made.finetuned, out, limits=limits, **options)


@cache
def usual(name="llama", dtype=None):
    """A sweep with utility data, and its folder."""
    out = Path(mkdtemp(prefix="deltaguard-sweep-", dir=os.environ[RUN]))
    task = utility_file(out)
    return swept(out / "sweep", name=name, dtype=dtype, utility=task), out / "sweep"


def restored(out, name="llama", dtype=None, **options):
    made = pair(name, dtype=dtype)
    config = RestoreConfig(device="cpu", **options)
    return restore(made.aligned, made.finetuned, out, store=made.store, config=config)


def measured(folder, name="llama", dtype=None):
    """Safety KL and likelihood of a checkpoint on disk, by a meter of its own."""
    made = pair(name, dtype=dtype)
    store = CurvatureStore.from_pretrained(made.store)
    held_out = [Conversation(row.prompt, row.system, row.response) for row in store.held_out]
    source = Checkpoint.open(folder)
    meter = SafetyMeter.open(
        Checkpoint.open(made.aligned), source, held_out, device=torch.device("cpu"), dtype=torch.float32
    )
    meter.put((tensor, source.read(tensor)) for tensor in source.tensors)
    return meter.measure().mean, meter.likelihood(TASK)


def chosen(report):
    """The point of each limit."""
    return [next(p for p in report.points if p.mu == budget.mu) for budget in report.budgets]


def test_the_folder_holds_the_report():
    report, out = usual()
    assert SweepReport.model_validate_json((out / SWEEP_NAME).read_text()) == report
    assert report.utility_conversations == len(TASK)
    assert report.environment.device == "cpu"
    assert [budget.limit for budget in report.budgets] == list(LIMITS)
    assert [p.mu for p in report.points] == sorted({p.mu for p in report.points}, reverse=True)


def test_limits_that_rise_keep_more():
    report, _ = usual()
    assert report.finetuned_kl > LIMITS[-1]
    for one, more in zip(chosen(report), chosen(report)[1:], strict=False):
        assert one.mu > more.mu > 0
        assert one.kept_energy < more.kept_energy
    for limit, point in zip(LIMITS, chosen(report), strict=True):
        assert AT_LIMIT * limit <= point.safety_kl <= limit
    kept = [point.kept_energy for point in report.points]
    assert kept == sorted(kept)
    assert kept[-1] == pytest.approx(1)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_finds_what_a_restore_with_it_finds(limit, tmp_path):
    point = chosen(usual()[0])[LIMITS.index(limit)]
    found = restored(tmp_path / "out", max_safety_kl=limit)
    assert found.dial.finetuned_kl == usual()[0].finetuned_kl
    assert found.dial.tokens == usual()[0].tokens
    # Both are within a tenth of the limit; they come there from different first prices.
    assert found.dial.restored_kl == pytest.approx(point.safety_kl, rel=0.11)
    assert found.mu == pytest.approx(point.mu, rel=0.3)
    assert found.predicted_safety_kl == pytest.approx(point.predicted_safety_kl, rel=0.2)


@pytest.mark.parametrize(("name", "dtype"), [("llama", None), ("gpt2", torch.bfloat16)])
def test_a_point_is_the_checkpoint_that_a_restore_at_its_price_writes(name, dtype, tmp_path):
    report, _ = usual(name, dtype)
    *_, nothing_paid = report.points
    for number, point in enumerate(chosen(report)):
        strength = point.predicted_safety_kl / nothing_paid.predicted_safety_kl
        written = restored(tmp_path / str(number), name, dtype, strength=strength)
        assert written.mu == pytest.approx(point.mu, rel=1e-6)
        kl, nll = measured(tmp_path / str(number), name, dtype)
        assert kl == pytest.approx(point.safety_kl, rel=1e-3, abs=1e-8)
        assert nll == pytest.approx(point.utility_nll, rel=1e-5)


def test_the_models_at_both_ends_are_measured_as_they_are():
    report, _ = usual()
    assert measured(pair().finetuned) == pytest.approx((report.finetuned_kl, report.finetuned_nll), rel=1e-5)
    assert measured(pair().aligned) == pytest.approx((0, report.aligned_nll), rel=1e-5, abs=1e-7)


def test_limits_come_in_any_order_and_more_than_once(tmp_path):
    one = swept(tmp_path, (1e-3, 1e-4, 1e-3))
    other = swept(tmp_path, (1e-4, 1e-3))
    assert one.budgets == other.budgets
    assert one.points == other.points
    assert one.utility_conversations == 0
    assert one.points[0].utility_nll is one.aligned_nll is one.finetuned_nll is None


def test_with_a_confidence_a_bound_is_within_each_limit_and_less_is_kept(tmp_path):
    sure = RestoreConfig(device="cpu", max_safety_kl=LIMITS[0], confidence=0.9)
    report = swept(tmp_path / "sweep", config=sure)
    assert report.confidence == 0.9
    errors = NormalDist().inv_cdf(0.9) / NormalDist().inv_cdf(0.975)
    for limit, point, mean in zip(LIMITS, chosen(report), chosen(usual()[0]), strict=True):
        assert AT_LIMIT * limit <= point.safety_kl + errors * point.margin <= limit
        assert point.kept_energy < mean.kept_energy


def test_block_by_block_a_sweep_measures_the_same(tmp_path):
    config = RestoreConfig(device="cpu", memory=ByteSize(0))
    report, whole = swept(tmp_path / "sweep", config=config, utility=utility_file(tmp_path)), usual()[0]
    for one, other in zip(chosen(report), chosen(whole), strict=True):
        assert one.safety_kl == pytest.approx(other.safety_kl, rel=0.11)
        assert one.kept_energy == pytest.approx(other.kept_energy, rel=0.05)
    assert report.finetuned_kl == pytest.approx(whole.finetuned_kl, rel=1e-4)
    assert report.finetuned_nll == pytest.approx(whole.finetuned_nll, rel=1e-4)


def test_a_limit_that_the_whole_model_is_within_needs_no_search(tmp_path):
    report = swept(tmp_path / "sweep", (1.0, 2.0))
    assert [point.mu for point in report.points] == [0]
    assert [budget.mu for budget in report.budgets] == [0, 0]
    assert all(budget.whole for budget in report.budgets)
    assert not any(budget.whole for budget in usual()[0].budgets)
    assert restored(tmp_path / "out", max_safety_kl=1.0).dial.whole


def test_of_a_long_task_the_whole_answer_counts(tmp_path, monkeypatch):
    path, rows = (
        tmp_path / "task.jsonl",
        [{"prompt": "Why?", "response": "It is good. " * n} for n in (2, 40)],
    )
    path.write_text("\n".join(map(json.dumps, rows)))
    made = pair()
    store = CurvatureStore.from_pretrained(made.store)
    cut = store.provenance.model_copy(update={"max_length": 40})
    monkeypatch.setattr(CurvatureStore, "provenance", property(lambda _: cut))
    report = swept(tmp_path / "sweep", (1e-3,), utility=path)
    model = load_model(made.aligned, "aligned", dtype=torch.float32)
    tokenizer = load_tokenizer(made.aligned, "aligned")
    told = [Conversation(row["prompt"], response=row["response"]) for row in rows]
    each = negative_log_likelihood(model, tokenizer, told, batch_size=1)
    counts = [
        len(text.ids) - text.prompt_length for text in (encode(tokenizer, c, max_length=999) for c in told)
    ]
    expected = sum(map(operator.mul, each, counts)) / sum(counts)
    assert report.aligned_nll == pytest.approx(expected, rel=1e-5)


def test_a_task_that_is_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("deltaguard.restoration.divergence._LONGEST", 2)
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "response": "It is good. " * 40}))
    made = pair()
    small = CurvatureStore.from_pretrained(made.store).provenance
    small = small.model_copy(update={"max_length": 40, "batch_size": 1})
    monkeypatch.setattr(CurvatureStore, "provenance", property(lambda _: small))
    with pytest.raises(DeltaguardError, match="1 of 1 conversations are longer than 80 tokens"):
        swept(tmp_path / "sweep", (1e-3,), utility=path)


def test_a_limit_within_which_no_layer_can_be_has_no_point(tmp_path):
    report = swept(tmp_path, (1e-7, 1.0), config=RestoreConfig(device="cpu", other_params="finetuned"))
    assert [budget.mu for budget in report.budgets] == [None, 0]
    assert report.points[0].mu == PROHIBITIVE
    assert report.points[0].safety_kl > 1e-7
    with pytest.raises(DeltaguardError, match="With no delta left in any layer"):
        restored(tmp_path / "out", max_safety_kl=1e-7, other_params="finetuned")


def test_a_delta_that_the_curvature_says_costs_nothing_is_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr(Profile, "predicted_kl", lambda self, mu: 0.0)
    report = swept(tmp_path, (1e-3,))
    assert [point.mu for point in report.points] == [PROHIBITIVE, 0]
    assert report.budgets[0].mu == PROHIBITIVE
    assert report.points[0].safety_kl < 1e-6


def test_ridge_has_a_curve_too(tmp_path):
    report = swept(tmp_path, (1e-3,), config=RestoreConfig(method="ridge", device="cpu"))
    assert report.method == "ridge"
    assert chosen(report)[0].safety_kl <= 1e-3


def test_nothing_is_read_before_responses_are_known_to_be_there(tmp_path):
    path = utility_file(tmp_path, responses=False)
    with pytest.raises(DeltaguardError, match=f"1 of 6 lines of {path} have no response"):
        sweep("nowhere", "nowhere", tmp_path / "out", utility=path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("limits", "given"),
    [((), "none"), ((1e-4, 0.0, -1.0), "0, -1"), ((float("nan"), float("inf")), "nan, inf")],
)
def test_limits_that_are_none_are_refused_together(limits, given, tmp_path):
    with pytest.raises(DeltaguardError, match=f"finite numbers of 1e-09 or more, .* given: {given}"):
        sweep("nowhere", "nowhere", tmp_path / "out", limits=limits)
    assert not (tmp_path / "out").exists()


def test_a_method_without_a_price_is_refused(tmp_path):
    with pytest.raises(DeltaguardError, match="a method with a price to vary; interpolate has none"):
        sweep("nowhere", "nowhere", tmp_path, config=RestoreConfig(method="interpolate", strength=0.5))


def test_a_model_beside_itself_has_nothing_to_restore(tmp_path):
    made = pair()
    with pytest.raises(DeltaguardError, match="there is nothing to restore"):
        sweep(made.aligned, made.aligned, tmp_path, store=made.store, config=CPU)

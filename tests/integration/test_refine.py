"""`restore` with `refine`: steps after the shrink that hold to the limits, or are not kept."""

import json

import pytest
import torch

import models
from benches import KilledError
from deltaguard import DeltaguardError, RestoreConfig, restore, verify
from deltaguard.cli.app import run
from deltaguard.curvature.store import CurvatureStore
from deltaguard.models.writer import CheckpointWriter
from deltaguard.reports.outcome import refinement_facts
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME, RestoreReport
from deltaguard.restoration import refine, tuning
from deltaguard.restoration.dry_run import plan_restore
from deltaguard.restoration.sweep import sweep
from pairs import held_out, pair, save_adapter, weights
from plain import predicted, safety_kl
from refusing import few_requests, refusing_pair

LIMIT = 1e-2


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Answers are kept for one test alone."""
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))


def refined(steps, **changes):
    return RestoreConfig(**{"max_safety_kl": LIMIT, "refine": steps, "device": "cpu", **changes})


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", models.EITHER_ORDER)
def test_refined_layers_are_within_the_limit_and_told_as_they_lie_on_disk(name, tmp_path):
    made, out = pair(name), tmp_path / "out"
    # Levelled layers of random weights are so far within the limit that eight steps may lead out of it.
    plain, steps = (refined(steps, level_refusals=False) for steps in (None, 8))
    plain = restore(made.aligned, made.finetuned, tmp_path / "plain", store=made.store, config=plain)
    report = restore(made.aligned, made.finetuned, out, store=made.store, config=steps)
    record = report.refinement
    assert (record.steps, record.kept, record.reason, report.options["refine"]) == (8, True, None, 8)
    assert 1 <= record.taken <= 8
    loss = [
        record.safety_before / LIMIT + record.task_before / record.task_before,
        record.safety_after / LIMIT + record.task_after / record.task_before,
    ]
    assert loss[1] < loss[0]
    # What others measure on what is on disk.
    measured = safety_kl(made.aligned, out, held_out(made.store))
    assert measured == pytest.approx(record.safety_kl_after, rel=1e-4)
    assert record.safety_kl_after == report.dial.restored_kl <= LIMIT
    assert record.safety_kl_before == plain.dial.restored_kl
    # Layers alone are changed, and their rows say of them what is so.
    aligned, finetuned, before, after = (
        weights(folder) for folder in (made.aligned, made.finetuned, tmp_path / "plain", out)
    )
    layers = {row.name for row in report.layers}
    assert {key for key in before if not torch.equal(before[key], after[key])} == layers
    kept = {key: after[key].double() - aligned[key].double() for key in layers}
    whole = {key: finetuned[key].double() - aligned[key].double() for key in layers}
    for row in report.layers:
        energy = float(whole[row.name].square().sum())
        assert row.kept_energy == pytest.approx(float((kept[row.name] * whole[row.name]).sum()) / energy)
        lost = float((kept[row.name] - whole[row.name]).square().sum())
        assert row.utility_loss == pytest.approx(lost / energy, rel=1e-4)
    store = CurvatureStore.from_pretrained(made.store)
    assert report.predicted_safety_kl == pytest.approx(predicted(store, kept), rel=2e-3)
    assert report.mu == plain.mu
    assert verify(out).passed
    assert RestoreReport.model_validate_json((out / REPORT_NAME).read_text()) == report
    shown = dict(refinement_facts(record))
    assert shown["refined"].startswith(f"{record.taken} of 8 steps in ")
    assert shown["refined"].endswith(", kept")
    assert "by refining" in (out / CARD_NAME).read_text()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_no_steps_write_the_same_bytes(dtype, tmp_path):
    made = pair("llama", dtype=dtype)
    for steps in (None, 0):
        report = restore(
            made.aligned, made.finetuned, tmp_path / str(steps), store=made.store, config=refined(steps)
        )
        assert report.refinement is None
        assert not any("not refined" in warning for warning in report.warnings)
    one, other = (tmp_path / str(steps) / "model.safetensors" for steps in (None, 0))
    assert one.read_bytes() == other.read_bytes()


def test_the_same_run_writes_the_same_bytes_over_an_adapter_too(tmp_path):
    made = pair()
    save_adapter(made.aligned, tmp_path / "adapter", ["q_proj", "down_proj"])
    for name in "ab":
        report = restore(
            made.aligned, tmp_path / "adapter", tmp_path / name, store=made.store, config=refined(3)
        )
        assert report.refinement.kept
    one, other = (tmp_path / name / "model.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    aligned, found = weights(made.aligned), weights(tmp_path / "a")
    changed = {name for name in aligned if not torch.equal(aligned[name], found[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}


def test_what_breaks_the_limit_is_not_kept_and_told(monkeypatch, tmp_path):
    made = pair()
    tensors = refine.Tuning.tensors
    monkeypatch.setattr(refine.Tuning, "tensors", lambda self: {k: t + 0.1 for k, t in tensors(self).items()})
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=refined(2))
    monkeypatch.undo()
    plain = restore(made.aligned, made.finetuned, tmp_path / "plain", store=made.store, config=refined(None))
    record = report.refinement
    assert not record.kept
    assert record.safety_kl_after > LIMIT
    assert record.weights_sha256 is None
    assert report.dial.restored_kl == plain.dial.restored_kl <= LIMIT
    assert any("The output is not refined: its safety KL would be" in each for each in report.warnings)
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "plain"))
    assert one.read_bytes() == other.read_bytes()


def test_a_bound_that_breaks_the_limit_is_what_is_told(monkeypatch, tmp_path):
    made = pair()
    with monkeypatch.context() as patch:
        patch.setattr(refine, "judge_of", lambda _: lambda probe: probe.safety_kl + 10 * LIMIT)
        report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=refined(2))
    told = report.refinement.safety_kl_after + 10 * LIMIT
    assert f"its safety KL would be {told:.2g}, above {LIMIT:.2g}" in report.warnings[-1]


def test_a_fine_tune_that_is_kept_whole_is_not_refined(tmp_path):
    made = pair()
    config = refined(2, max_safety_kl=10)
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    assert report.refinement is None
    assert report.warnings[-1] == "The output is not refined: the whole fine-tune is within the limits."


def test_where_answers_decide_the_refined_model_is_asked_too(tmp_path, monkeypatch):
    few_requests(monkeypatch)
    made = refusing_pair()
    config = RestoreConfig(max_added_attack_success=2, training_data="trusted", refine=4, device="cpu")
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    attack, record = report.dial.attack, report.refinement
    assert len(attack.looks) <= attack.most_looks
    assert record.kept == attack.restored.accepted
    assert attack.restored == attack.looks[-1]
    assert report.dial.restored_kl == record.safety_kl_after <= report.dial.limit


def test_a_refined_model_that_complies_is_not_kept(tmp_path, monkeypatch):
    made = refusing_pair()
    config = RestoreConfig(max_added_attack_success=2, training_data="trusted", refine=4, device="cpu")
    finetuned = weights(made.finetuned)
    tensors = refine.Tuning.tensors
    few_requests(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(
            refine.Tuning, "tensors", lambda self: {name: finetuned[name].clone() for name in tensors(self)}
        )
        # However far it is from the aligned model: its answers alone are to keep it from being written.
        patch.setattr(refine, "judge_of", lambda _: lambda _: 0.0)
        report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    attack, record = report.dial.attack, report.refinement
    assert not record.kept
    assert not attack.looks[-1].accepted
    assert attack.restored != attack.looks[-1]
    assert any("it would add +" in each for each in report.warnings)
    plain = config.model_copy(update={"refine": None})
    restore(made.aligned, made.finetuned, tmp_path / "plain", store=made.store, config=plain)
    one, other = (weights(tmp_path / name) for name in ("out", "plain"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_too_little_memory_for_gradients_is_one_message(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(tuning, "descend", full)
    made = pair("llama")
    with pytest.raises(
        DeltaguardError, match=r"Too little memory to refine .* no --refine\. Tried to allocate"
    ):
        restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=refined(2))


def test_a_run_killed_between_shards_goes_on_to_the_same_bytes(monkeypatch, tmp_path):
    made = pair("llama", max_shard_size="30KB")
    whole, out = tmp_path / "whole", tmp_path / "out"
    expected = restore(made.aligned, made.finetuned, whole, store=made.store, config=refined(3))
    assert expected.refinement.kept
    original, written = CheckpointWriter.shard, []

    def shard(self, name, header):
        written.append(name)
        if len(written) == 3:
            raise KilledError
        return original(self, name, header)

    monkeypatch.setattr(CheckpointWriter, "shard", shard)
    with pytest.raises(KilledError):
        restore(made.aligned, made.finetuned, out, store=made.store, config=refined(3))
    monkeypatch.setattr(CheckpointWriter, "shard", original)
    resumed = refined(3, resume=True)
    other = refine.Tuning.tensors
    monkeypatch.setattr(refine.Tuning, "tensors", lambda self: {k: t + 1 for k, t in other(self).items()})
    with pytest.raises(DeltaguardError, match="other weights than before this run was interrupted"):
        restore(made.aligned, made.finetuned, out, store=made.store, config=resumed)
    monkeypatch.setattr(refine.Tuning, "tensors", other)
    report = restore(made.aligned, made.finetuned, out, store=made.store, config=resumed)
    assert report.refinement == json_of(report, "refinement", out)
    assert report.refinement.weights_sha256 == expected.refinement.weights_sha256
    assert report.dial == expected.dial
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes()


def json_of(report, name, folder):
    found = json.loads((folder / REPORT_NAME).read_text())
    return type(getattr(report, name)).model_validate(found[name])


def test_the_plan_says_what_memory_it_takes():
    made = pair()
    plain, plan = (
        plan_restore(made.aligned, made.finetuned, store=made.store, config=refined(steps))
        for steps in (None, 10)
    )
    parameters = sum(tensor.numel() for tensor in weights(made.finetuned).values())
    assert plain.refine_bytes == 0
    assert plan.refine_bytes > 2 * 4 * parameters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_format": "adapter"}, "refine changes whole layers, which no adapter holds"),
        ({"strength": 0.5, "max_safety_kl": None}, "refine is held to the limit on safety KL"),
        ({"method": "interpolate", "strength": 0.5, "max_safety_kl": None}, "refine is held to the limit"),
        ({"refine": -1}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_refined_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        refined(**{"steps": 5} | options) if "refine" not in options else RestoreConfig(**options)


def test_no_steps_are_none_and_refuse_nothing():
    assert RestoreConfig(refine=0) == RestoreConfig()
    assert RestoreConfig(refine=0, strength=0.5, output_format="adapter").refine is None


def test_a_sweep_does_not_refine(tmp_path):
    made = pair()
    with pytest.raises(DeltaguardError, match="takes no refine"):
        sweep(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=refined(5))


def test_the_command_line_refines_and_plans_it(capsys, tmp_path):
    made, out = pair(), tmp_path / "out"
    given = ["restore", str(made.aligned), str(made.finetuned), "--store", str(made.store), "-o", str(out)]
    given += ["--max-safety-kl", str(LIMIT), "--refine", "2", "--device", "cpu"]
    assert run([*given, "--dry-run"]) == 0
    assert "memory for refining (cpu)" in capsys.readouterr().out
    assert not out.exists()
    assert run([*given, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)["refinement"]
    assert (record["steps"], record["kept"]) == (2, True)
    assert run([*given, "--output-format", "adapter"]) != 0
    assert "which no adapter holds" in capsys.readouterr().err

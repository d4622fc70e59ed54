"""The price of safety: that a strength means what it says, and that the dial holds when others measure it."""

import json
from functools import partial
from statistics import NormalDist

import pytest
import torch

import models
from crossed import in_turn
from deltaguard import CurvatureStore, DeltaguardError, RestoreConfig, restore, verify
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.models.loading import load_model
from deltaguard.reports.outcome import dial_facts
from deltaguard.reports.records.dial import Probe
from deltaguard.reports.records.restore import CARD_NAME, REPORT_NAME, RestoreReport
from deltaguard.restoration.dial import judge_of
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL as LIMIT
from deltaguard.restoration.search import AT_LIMIT, MOST_PROBES
from pairs import CONVERSATIONS, changed, held_out, pair, save_adapter, weights
from plain import predicted, safety_kl, tokens_of

SINGLE = "model.safetensors"
WITHIN_LIMIT = RestoreConfig(max_safety_kl=LIMIT)


# A strength


@pytest.mark.parametrize("strength", [0.003, 0.3, 0.9])
@pytest.mark.parametrize(
    ("name", "method", "kept"),
    [("llama", "kfac", "store"), ("llama", "ridge", "store"), ("gpt2", "kfac", "whole_store")],
)
def test_the_strength_is_the_share_of_predicted_safety_kl_over_all_layers(
    name, method, kept, strength, tmp_path
):
    made = pair(name)
    store = getattr(made, kept)
    # The strength is that of the closed form; what levelling refusals takes out is beside it.
    own = {"level_refusals": False} if method == "kfac" else {}
    config = RestoreConfig(method=method, strength=strength, **own)
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=store, config=config)
    aligned, finetuned, restored = (weights(f) for f in (made.aligned, made.finetuned, tmp_path / "out"))
    opened = CurvatureStore.from_pretrained(store)
    of_all = {name: finetuned[name].double() - aligned[name].double() for name in aligned}
    of_restored = {name: restored[name].double() - aligned[name].double() for name in aligned}
    found, whole = predicted(opened, of_restored, method), predicted(opened, of_all, method)
    assert found / whole == pytest.approx(strength, rel=2e-3)
    assert report.predicted_safety_kl == pytest.approx(found, rel=2e-3)
    # Layers differ in what a price leaves of them: it is one for all, not a share for each.
    shares = [row.detail["safety_kl_share"] for row in report.layers]
    assert max(shares) > 1.1 * min(shares)


# The dial


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("name", "limit"), in_turn(models.DENSE, [3e-2, 1e-3, 3e-5]))
def test_the_safety_kl_on_disk_is_the_one_reported_and_within_the_limit(name, limit, tmp_path):
    made = pair(name)
    config = RestoreConfig(max_safety_kl=limit)
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    dial, rows = report.dial, held_out(made.store)
    measured = safety_kl(made.aligned, tmp_path / "out", rows)
    assert measured <= limit * (1 + 1e-6)
    assert abs(measured - dial.restored_kl) <= 1e-6 * limit
    assert dial.restored_kl <= limit == dial.limit
    assert (dial.restored_kl, dial.restored_margin) in {(p.safety_kl, p.margin) for p in dial.probes}
    assert dial.restored_margin > 0
    shown = dict(dial_facts(report))["safety KL, restored"]
    assert (
        shown == f"{dial.restored_kl:.2g} ± {dial.restored_margin:.2g}, of {limit:.2g} nats a token allowed"
    )
    tokenizer = models.tiny_tokenizer()
    tokens = sum(ids.shape[1] - start for ids, start in (tokens_of(tokenizer, row) for row in rows))
    assert (dial.conversations, dial.tokens) == (len(rows), tokens)
    whole = safety_kl(made.aligned, made.finetuned, rows)
    assert dial.finetuned_kl == pytest.approx(whole, rel=1e-6)
    assert dial.probes[0].mu == 0
    assert dial.probes[0].safety_kl == dial.finetuned_kl
    assert dial.whole == (whole <= limit)
    if not dial.whole:
        # The layers may be affordable as a whole, less what levels refusals, where it is embeddings that
        # exceed the limit, or just that.
        assert dial.restored_kl >= AT_LIMIT * limit or report.kept_energy > 0.998
        assert [probe.safety_kl for probe in dial.probes if probe.mu == report.mu] == [dial.restored_kl]
        assert len(dial.probes) <= 6
    assert verify(tmp_path / "out").passed


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_measured_in_float32_holds_too(dtype, tmp_path):
    made = pair("llama", dtype=dtype, max_shard_size="30KB")
    config = RestoreConfig(max_safety_kl=1e-3)
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    measured = safety_kl(made.aligned, tmp_path / "out", held_out(made.store))
    assert measured == pytest.approx(report.dial.restored_kl, rel=1e-3)
    assert AT_LIMIT * 1e-3 <= report.dial.restored_kl <= 1e-3


def test_with_a_confidence_the_upper_bound_is_within_the_limit_and_less_is_kept(tmp_path):
    made, kept = pair("llama"), []
    for confidence in (None, 0.8, 0.99):
        config = RestoreConfig(max_safety_kl=1e-3, confidence=confidence)
        output = tmp_path / str(confidence)
        report = restore(made.aligned, made.finetuned, output, store=made.store, config=config)
        errors = 0 if confidence is None else NormalDist().inv_cdf(confidence)
        bound = report.dial.restored_kl + errors * report.dial.restored_margin / NormalDist().inv_cdf(0.975)
        assert AT_LIMIT * 1e-3 <= bound <= 1e-3
        assert report.dial.confidence == report.options.get("confidence") == confidence
        kept.append(report.kept_energy)
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1]
    for options in ({}, {"strength": 0.5}):
        with pytest.raises(ValueError, match="confidence is an option of max_safety_kl"):
            RestoreConfig(confidence=0.9, **options)


def test_a_confidence_needs_more_than_one_conversation_held_out():
    bound = judge_of(RestoreConfig(max_safety_kl=1e-3, confidence=0.9))
    with pytest.raises(DeltaguardError, match="a single conversation was held out"):
        bound(Probe(mu=1.0, safety_kl=1e-4, margin=None))


def test_a_larger_limit_keeps_more(tmp_path):
    made = pair()
    reports = [
        restore(
            made.aligned,
            made.finetuned,
            tmp_path / f"{limit}",
            store=made.store,
            config=RestoreConfig(max_safety_kl=limit),
        )
        for limit in (1e-5, 1e-4, 1e-3, 1e-2)
    ]
    kept = [report.kept_energy for report in reports]
    assert kept == sorted(kept)
    assert kept[-1] > 1.1 * kept[0]
    prices = [report.mu for report in reports]
    assert prices == sorted(prices, reverse=True)


def test_a_limit_alone_is_the_dial_of_kfac(tmp_path):
    made = pair()
    report = restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=WITHIN_LIMIT)
    expected = {"method": "kfac", "max_safety_kl": LIMIT, "other_params": "aligned"}
    assert report.options.items() >= expected.items()
    assert "strength" not in report.options
    assert report.dial.restored_kl <= report.dial.limit == LIMIT
    text = (tmp_path / "out" / REPORT_NAME).read_text()
    assert RestoreReport.model_validate_json(text) == report


def test_conversations_are_cut_off_as_they_were_when_calibrating(tmp_path):
    made = pair()
    ids, start = tokens_of(models.tiny_tokenizer(), CONVERSATIONS[0])
    config = CalibrateConfig(device="cpu", max_length=(ids.shape[1] + start) // 2)
    short = calibrate(made.aligned, tmp_path / "store", conversations=CONVERSATIONS, config=config)
    first, second = (
        restore(made.aligned, made.finetuned, tmp_path / f"{number}", store=store, config=WITHIN_LIMIT).dial
        for number, store in enumerate((made.store, short))
    )
    assert first.conversations == second.conversations
    assert 0 < second.tokens < first.tokens


# The whole fine-tuned model


@pytest.mark.parametrize("shards", ["5GB", "30KB"])
@pytest.mark.parametrize("name", models.EITHER_ORDER)
def test_a_finetune_within_the_limit_is_kept_bit_for_bit(name, shards, tmp_path):
    made = pair(name, dtype=torch.bfloat16, max_shard_size=shards)
    stages = []
    report = restore(
        made.aligned,
        made.finetuned,
        tmp_path / "out",
        store=made.store,
        config=RestoreConfig(max_safety_kl=50),
        progress=lambda event: stages.append(event.stage),
    )
    files = sorted(path.name for path in made.finetuned.glob("*.safetensors"))
    assert [row.name for row in report.files if row.name.endswith(".safetensors")] == files
    assert (len(files) == 1) == (shards == "5GB")
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (made.finetuned / file).read_bytes()
    assert report.dial.whole
    assert report.mu == 0
    assert report.dial.restored_kl == report.dial.finetuned_kl <= 50
    assert len(report.dial.probes) == 1
    assert (report.kept_energy, report.utility_loss) == (1, 0)
    assert {row.source for row in report.others} == {"finetuned"}
    assert {row.reason for row in report.others} == {"the whole model is within the safety KL allowed"}
    # Nothing had to be projected, or measured again.
    assert set(stages) == {"measure", "restore"}


def test_further_tokens_are_kept_with_the_whole_model(tmp_path):
    made = pair("llama")
    model = models.perturbed(models.tiny_model("llama"), 0.05)
    model.resize_token_embeddings(models.VOCABULARY + 3, mean_resizing=False)
    wide = models.save(model, tmp_path / "wide")
    config = RestoreConfig(max_safety_kl=50)
    report = restore(made.aligned, wide, tmp_path / "out", store=made.store, config=config)
    assert report.dial.whole
    assert (tmp_path / "out" / SINGLE).read_bytes() == (wide / SINGLE).read_bytes()


# What lies outside the layers


EMBEDDING = "model.embed_tokens.weight"


def test_a_finetune_of_embeddings_alone_is_put_back(tmp_path):
    made = pair("llama")
    tuned = changed(made.aligned, tmp_path / "tuned", lambda tensors: tensors[EMBEDDING].mul_(1.5))
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=WITHIN_LIMIT)
    assert report.dial.finetuned_kl > report.dial.limit
    assert abs(report.dial.restored_kl) < 1e-9
    assert (tmp_path / "out" / SINGLE).read_bytes() == (made.aligned / SINGLE).read_bytes()
    config = RestoreConfig(max_safety_kl=LIMIT, other_params="finetuned")
    with pytest.raises(DeltaguardError, match="With no delta left in any layer the safety KL is still"):
        restore(made.aligned, tuned, tmp_path / "none", store=made.store, config=config)


def test_rounding_is_named_where_nothing_else_differs(tmp_path):
    made = pair("llama")
    tuned = load_model(made.finetuned, "tuned", dtype=torch.float32)
    stored = models.save(tuned, tmp_path / "tuned", dtype=torch.bfloat16)
    config = RestoreConfig(max_safety_kl=1e-9)
    with pytest.raises(DeltaguardError, match=r"is stored in bfloat16, and the aligned one more finely\."):
        restore(made.aligned, stored, tmp_path / "none", store=made.store, config=config)


def test_layers_whose_whole_delta_is_affordable_are_kept(tmp_path):
    """What exceeds the limit are the embeddings, which come from the aligned model."""
    made = pair("llama")
    layer = "model.layers.1.mlp.down_proj.weight"

    def change(tensors):
        tensors[EMBEDDING].mul_(1.5)
        tensors[layer].add_(
            1e-4 * torch.randn(tensors[layer].shape, generator=torch.Generator().manual_seed(0))
        )

    tuned = changed(made.aligned, tmp_path / "tuned", change)
    config = WITHIN_LIMIT.model_copy(update={"method_options": {"level_refusals": False}})
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert not report.dial.whole
    assert report.kept_energy > 0.99
    assert len(report.dial.probes) <= 5
    torch.testing.assert_close(weights(tmp_path / "out")[layer], weights(tuned)[layer], rtol=0, atol=1e-6)


def test_too_small_a_limit_for_other_parameters_says_what_to_do(tmp_path):
    made = pair("llama")
    config = RestoreConfig(max_safety_kl=1e-6, other_params="finetuned")
    with pytest.raises(DeltaguardError) as caught:
        restore(made.aligned, made.finetuned, tmp_path / "out", store=made.store, config=config)
    assert "above 1e-06: what differs are norms, biases or embeddings" in str(caught.value)
    assert "--other-params aligned" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("exact")
def test_other_parameters_are_measured_with_the_layers(tmp_path):
    made = pair("llama")
    rows = held_out(made.store)
    tuned = changed(
        made.finetuned,
        tmp_path / "tuned",
        lambda tensors: tensors.update({EMBEDDING: weights(made.aligned)[EMBEDDING]}),
    )
    limit = 0.5 * safety_kl(made.aligned, tuned, rows)
    config = RestoreConfig(max_safety_kl=limit, other_params="finetuned")
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert {row.source for row in report.others} == {"finetuned"}
    measured = safety_kl(made.aligned, tmp_path / "out", rows)
    assert AT_LIMIT * limit <= measured <= limit * (1 + 1e-6)
    assert abs(measured - report.dial.restored_kl) <= 1e-6 * limit


# Adapters


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"])]
)
def test_an_adapter_is_measured_as_its_merged_model_is(name, targets, tmp_path):
    made = pair(name)
    tuned = save_adapter(
        made.aligned, tmp_path / "adapter", targets, fan_in_fan_out=name in models.STORED_IN_OUT
    )
    models.save(tuned.merge_and_unload(), tmp_path / "merged")
    rows = held_out(made.store)
    whole = safety_kl(made.aligned, tmp_path / "merged", rows)
    for limit, kept_whole in ((0.1 * whole, False), (1.1 * whole, True)):
        out = tmp_path / f"{limit}"
        config = RestoreConfig(max_safety_kl=limit)
        report = restore(made.aligned, tmp_path / "adapter", out, store=made.store, config=config)
        assert report.dial.finetuned_kl == pytest.approx(whole, rel=1e-4)
        assert report.dial.whole == kept_whole
        measured = safety_kl(made.aligned, out, rows)
        assert measured <= limit * (1 + 1e-6)
        assert abs(measured - report.dial.restored_kl) <= 1e-6 * limit
    one, merged = weights(out), weights(tmp_path / "merged")
    for tensor in one:
        torch.testing.assert_close(one[tensor], merged[tensor], rtol=1e-5, atol=1e-6)


# Interruptions


class Stop(Exception):  # noqa: N818
    """Ends a run."""


@pytest.mark.parametrize("limit", [1e-3, 50])
def test_what_was_measured_is_not_measured_again_after_a_kill(limit, tmp_path):
    made = pair("llama", dtype=torch.bfloat16, max_shard_size="30KB")
    config = RestoreConfig(max_safety_kl=limit)
    run = partial(restore, made.aligned, made.finetuned, store=made.store)
    whole = run(tmp_path / "whole", config=config)

    def stop(event):
        if event.stage == "restore":
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "out", config=config, progress=stop)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".deltaguard-partial"]
    with pytest.raises(DeltaguardError, match="--resume"):
        run(tmp_path / "out", config=config)
    other = config.model_copy(update={"max_safety_kl": 1e-2, "resume": True})
    with pytest.raises(DeltaguardError, match="another plan"):
        run(tmp_path / "out", config=other)

    stages = []
    resumed = run(
        tmp_path / "out",
        config=config.model_copy(update={"resume": True}),
        progress=lambda event: stages.append(event.stage),
    )
    assert set(stages) == {"restore"}
    assert (resumed.mu, resumed.dial) == (whole.mu, whole.dial)
    assert resumed.dial.whole == (limit == 50)
    assert [row.source for row in resumed.others] == [row.source for row in whole.others]
    # The card says when it was written.
    for row in (row for row in whole.files if row.name != CARD_NAME):
        assert (tmp_path / "out" / row.name).read_bytes() == (tmp_path / "whole" / row.name).read_bytes()
    written = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert written["dial"] == json.loads(whole.model_dump_json())["dial"]
    assert verify(tmp_path / "out").passed


@pytest.mark.parametrize("stage", ["measure", "project"])
def test_a_search_that_is_interrupted_leaves_nothing(stage, tmp_path):
    made = pair()
    run = partial(restore, made.aligned, made.finetuned, tmp_path / "out", store=made.store)

    def stop(event):
        if event.stage == stage:
            raise Stop

    with pytest.raises(Stop):
        run(config=WITHIN_LIMIT, progress=stop)
    assert not (tmp_path / "out").exists()
    resumed = run(config=WITHIN_LIMIT.model_copy(update={"resume": True}))
    assert len(resumed.dial.probes) <= MOST_PROBES + 2

"""The safety KL that is reported is that of the folder on disk, whatever its model is run and asked with."""

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import models
from crossed import in_turn
from deltaguard import Conversation, RestoreConfig, diff, restore, verify
from deltaguard.restoration.aligned import open_job
from deltaguard.restoration.dry_run import plan_restore
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL
from deltaguard.restoration.resident import Resident
from deltaguard.restoration.sweep import sweep
from deltaguard.restoration.trial import Trial
from pairs import held_out, pair
from plain import safety_kl, tokens_of
from variants import OTHER_CONFIG, OTHER_TEMPLATE, agrees, edited, refusal, same_files, variant

# What is written is what was measured


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("name", "config_from"), in_turn(models.DENSE, ["aligned", "finetuned"]))
def test_the_dial_measures_what_is_written(name, config_from, tmp_path):
    made = pair(name)
    tuned = variant(made.finetuned, tmp_path / "tuned", template=OTHER_TEMPLATE, **OTHER_CONFIG[name])
    (tuned / "LICENSE").write_text("mine")
    limit = {"aligned": 1e-3, "finetuned": 50}[config_from]
    config = RestoreConfig(config_from=config_from, max_safety_kl=limit)
    out = tmp_path / "out"
    report = restore(made.aligned, tuned, out, store=made.store, config=config)
    assert agrees(report, made.aligned, out, made.store)
    assert report.dial.whole == (config_from == "finetuned")
    assert same_files(out, {"aligned": made.aligned, "finetuned": tuned}[config_from])
    assert (out / "LICENSE").read_text() == "mine"
    assert report.options["config_from"] == config_from
    assert verify(out).passed


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "change",
    [{"template": OTHER_TEMPLATE}, *({field: value} for field, value in OTHER_CONFIG["gpt2"].items())],
    ids=lambda change: next(iter(change)),
)
def test_a_limit_is_searched_for_under_each_change(change, tmp_path):
    made = pair("gpt2")
    tuned = variant(made.finetuned, tmp_path / "tuned", **change)
    bare = variant(made.aligned, tmp_path / "bare", **change)
    rows = held_out(made.store)
    nothing_kept, whole = (safety_kl(made.aligned, folder, rows) for folder in (bare, tuned))
    limit = nothing_kept + 0.3 * abs(whole - nothing_kept)
    config = RestoreConfig(config_from="finetuned", max_safety_kl=limit)
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert agrees(report, made.aligned, tmp_path / "out", made.store)
    assert report.dial.restored_kl <= limit
    assert report.dial.whole == (whole <= limit)
    assert report.dial.finetuned_kl == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("by_blocks", [False, True])
@pytest.mark.parametrize("config_from", ["aligned", "finetuned"])
def test_candidates_end_their_answers_where_the_output_does(config_from, by_blocks, tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned")
    ends = transformers.GenerationConfig.from_pretrained(tuned)
    ends.eos_token_id = 7
    ends.save_pretrained(tuned)
    limit = {"memory": 1} if by_blocks else {}
    config = RestoreConfig(config_from=config_from, max_safety_kl=1e-3, device="cpu", **limit)
    job = open_job(made.aligned, tuned, store=made.store, config=config)
    candidate = Resident().candidate(Trial(job, job.plan(config), config, tmp_path))
    model = candidate.cut.model if by_blocks else candidate.meter.model
    assert (model.generation_config.eos_token_id == 7) == (config_from == "finetuned")


def test_a_limit_that_the_configuration_alone_exceeds_says_what_to_do(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned", **OTHER_CONFIG["llama"])
    config = RestoreConfig(config_from="finetuned", max_safety_kl=DEFAULT_MAX_SAFETY_KL)
    message = refusal(restore, made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert "what differs are configuration, tokenizer or chat template" in message
    assert "(--config-from aligned)" in message


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("config_from", ["aligned", "finetuned"])
def test_a_sweep_measures_what_a_restore_would_write(config_from, tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned", template=OTHER_TEMPLATE, rms_norm_eps=1e-3)
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "Why?", "response": "It is good this morning."}\n')
    config = RestoreConfig(config_from=config_from, device="cpu")
    call = {"store": made.store, "limits": (50.0,), "utility": task}
    report = sweep(made.aligned, tuned, tmp_path / "sweep", config=config, **call)
    free = report.points[-1]
    written = RestoreConfig(config_from=config_from, strength=1.0, device="cpu")
    restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=written)
    found = safety_kl(made.aligned, tmp_path / "out", held_out(made.store))
    assert free.mu == 0
    assert free.safety_kl == pytest.approx(found, rel=1e-6)
    # The aligned model's likelihood is its own, whatever candidates are run with.
    config = RestoreConfig(device="cpu")
    plain = sweep(made.aligned, made.finetuned, tmp_path / "plain", config=config, **call)
    assert report.aligned_nll == plain.aligned_nll
    assert report.config_from == config_from


def test_the_likelihood_of_a_task_is_under_the_template_that_is_written(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned", template=OTHER_TEMPLATE)
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "Why?", "response": "It is good this morning."}\n')

    def likelihood(config_from):
        config = RestoreConfig(config_from=config_from, device="cpu")
        call = {"store": made.store, "limits": (50.0,), "utility": task, "config": config}
        return sweep(made.aligned, tuned, tmp_path / config_from, **call).finetuned_nll

    tokenizer = transformers.AutoTokenizer.from_pretrained(tuned)
    model = transformers.AutoModelForCausalLM.from_pretrained(tuned)
    row = Conversation("Why?", None, "It is good this morning.")
    ids, start = tokens_of(tokenizer, row)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, start - 1 : -1]
    assert likelihood("finetuned") == pytest.approx(float(cross_entropy(logits, ids[0, start:])), rel=1e-5)
    assert likelihood("aligned") != pytest.approx(likelihood("finetuned"), rel=1e-3)


# Without the option


def calls(made, tuned, out):
    """Every way to restore, and the ways to see what a restore would do."""
    options = {"store": made.whole_store}
    within_limit = {"max_safety_kl": DEFAULT_MAX_SAFETY_KL}
    half = {"method": "interpolate", "strength": 0.5}
    for chosen in ({}, within_limit, {"strength": 0.5}, {"method": "greedy"}, half):
        config = RestoreConfig(**chosen)
        yield lambda config=config: restore(made.aligned, tuned, out, config=config, **options)
        yield lambda config=config: plan_restore(made.aligned, tuned, config=config, **options)
    yield lambda: sweep(made.aligned, tuned, out, **options)
    # Not after the aligned model was calibrated for it.
    yield lambda: restore(made.aligned, tuned, out)


def test_all_differences_are_one_message_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    made = pair()
    changes = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "unheard_of": [1, 2]}
    tuned = variant(made.finetuned, tmp_path / "tuned", template=OTHER_TEMPLATE, **changes)
    edited(tuned / "generation_config.json", lambda content: content.update(eos_token_id=[2, 5]))
    edited(tuned / "tokenizer_config.json", lambda content: content.update(bos_token=models.SYSTEM))
    expected = [
        "`rope_parameters.rope_theta`: 10000.0 in the aligned model, 500000.0 in the fine-tuned one",
        "`unheard_of`: none in the aligned model, [1, 2] in the fine-tuned one",
        "`eos_token_id`: [2] in the aligned model, [2, 5] in the fine-tuned one",
        "`bos_token`: '<|begin|>' in the aligned model, '<|system|>' in the fine-tuned one",
        "chat template differs from character 15: \"{% for message in messages %}{{ '<|' + message['r",
    ]
    for call in calls(made, tuned, tmp_path / "out"):
        message = refusal(call)
        for line in expected:
            assert f"- {line}" in message
        assert "`--config-from aligned`" in message
        assert "`--config-from finetuned`" in message
    assert not list(tmp_path.glob("out/*"))
    assert not (tmp_path / "cache").exists()
    report = diff(made.aligned, tuned)
    assert [any(line in found for found in report.settings) for line in expected] == [True] * 5
    assert len(report.settings) == 5
    assert report.compatible
    assert diff(made.aligned, made.finetuned).settings == ()

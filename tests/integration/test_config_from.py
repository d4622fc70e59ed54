"""The safety KL that is reported is that of the folder on disk, whatever its model is run and asked with."""

import json
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

import models
from deltaguard import Conversation, DeltaguardError, RestoreConfig, diff, restore, verify
from deltaguard.checkpoints.checkpoint import Checkpoint
from deltaguard.checkpoints.identity import identify
from deltaguard.report.restore import REPORT_NAME
from deltaguard.restoration.job import default_store_folder
from deltaguard.restoration.restore import plan_restore
from deltaguard.restoration.sweep import sweep
from pairs import held_out, pair, save_adapter
from plain import safety_kl, tokens_of
from variants import OTHER_CONFIG, OTHER_TEMPLATE, edited, permuted, variant

SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
TEMPLATE = "chat_template.jinja"
TRUNCATION = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}


def agrees(report, aligned, folder, store):
    """Whether a report says of a folder what plain arithmetic finds there."""
    measured = safety_kl(aligned, folder, held_out(store))
    return report.dial.restored_kl == pytest.approx(measured, rel=1e-6, abs=1e-12)


def same_files(one, other, names=(*SETTINGS, TEMPLATE)):
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def refusal(run, *arguments, **options):
    with pytest.raises(DeltaguardError) as caught:
        run(*arguments, **options)
    return str(caught.value)


# What is written is what was measured


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("config_from", ["aligned", "finetuned"])
@pytest.mark.parametrize("name", models.DENSE)
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


def test_a_limit_that_the_configuration_alone_exceeds_says_what_to_do(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned", **OTHER_CONFIG["llama"])
    config = RestoreConfig(config_from="finetuned")
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
    for method in ({}, {"strength": 0.5}, {"method": "greedy"}, {"method": "interpolate", "strength": 0.5}):
        config = RestoreConfig(**method)
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


# What is no difference


def as_another_version_writes_it(content):
    """Without defaults, under older names, and with fields that change nothing."""
    defaults = ("attention_bias", "mlp_bias", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "head_dim")
    for field in defaults:
        del content[field]
    theta = content.pop("rope_parameters")["rope_theta"]
    content |= {"rope_theta": int(theta), "torch_dtype": content.pop("dtype"), "rope_scaling": None}
    content |= {"transformers_version": "4.40.0", "use_cache": False, "attention_dropout": 0.1}
    content |= {"_name_or_path": "elsewhere", "pad_token_id": 5, "bos_token_id": None}


@pytest.mark.usefixtures("exact")
def test_what_changes_no_prediction_needs_no_choice(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned")
    edited(tuned / "config.json", as_another_version_writes_it)
    edited(tuned / "generation_config.json", lambda content: content.update(pad_token_id=5, temperature=0.7))
    edited(tuned / "tokenizer.json", lambda content: content.update(truncation=TRUNCATION))
    changes = {"pad_token": models.EOS, "padding_side": "left", "model_max_length": 512}
    edited(tuned / "tokenizer_config.json", lambda content: content.update(changes))
    # Jinja drops one line end at the end of a template.
    (tuned / TEMPLATE).write_bytes(models.CHAT_TEMPLATE.encode() + b"\r\n")
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store)
    assert agrees(report, made.aligned, tmp_path / "out", made.store)
    assert same_files(tmp_path / "out", tuned)
    assert "config_from" not in report.options
    assert diff(made.aligned, tuned).settings == ()


def with_further_tokens(folder, word):
    """A fine-tune whose tokenizer has two more tokens, in rows of their own."""
    model = models.perturbed(models.tiny_model("llama"), 0.05)
    model.resize_token_embeddings(models.VOCABULARY + 2, mean_resizing=False)
    models.save(model, folder)
    tokenizer = models.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.add_tokens([word])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("exact")
def test_further_tokens_need_no_choice_and_cannot_be_left_out(tmp_path):
    made = pair()
    tuned = with_further_tokens(tmp_path / "tuned", "weather")
    config = RestoreConfig(max_safety_kl=0.1)
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert agrees(report, made.aligned, tmp_path / "out", made.store)
    assert same_files(tmp_path / "out", tuned)
    config = RestoreConfig(config_from="aligned")
    message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store, config=config)
    assert "lm_head.weight` has 386 rows, and the aligned model's configuration holds 384" in message
    assert "--config-from finetuned" in message
    edited(tuned / "config.json", lambda content: content.update(rms_norm_eps=0.01))
    message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store)
    assert "`--config-from aligned` cannot serve: `lm_head.weight` has 386 rows" in message
    config = RestoreConfig(config_from="finetuned", max_safety_kl=50)
    report = restore(made.aligned, tuned, tmp_path / "chosen", store=made.store, config=config)
    assert agrees(report, made.aligned, tmp_path / "chosen", made.store)


def test_a_response_that_holds_a_further_token_is_measured_as_the_aligned_model_gave_it(tmp_path):
    made = pair()
    tuned = with_further_tokens(tmp_path / "tuned", "cannot")
    ids = transformers.AutoTokenizer.from_pretrained(tuned)("I cannot help with that.")["input_ids"]
    assert max(ids) >= models.VOCABULARY
    config = RestoreConfig(max_safety_kl=0.1)
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    found = safety_kl(made.aligned, tmp_path / "out", held_out(made.store))
    assert report.dial.restored_kl == pytest.approx(found, rel=1e-4)


def test_a_folder_without_a_tokenizer_gets_the_aligned_models_if_asked_for(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json", TEMPLATE):
        (tuned / name).unlink()
    message = refusal(restore, made.aligned, tuned, tmp_path / "out", store=made.store)
    assert "tokenizer: 'TokenizersBackend' in the aligned model, none in the fine-tuned one" in message
    config = RestoreConfig(config_from="aligned")
    restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert same_files(tmp_path / "out", made.aligned)


def test_an_output_head_that_would_be_random_numbers_is_refused(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned", tie_word_embeddings=True)
    tensors = load_file(tuned / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    config = RestoreConfig(config_from="aligned", max_safety_kl=50)
    message = refusal(restore, made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert f"{tuned} stores no output head, and with the configuration of {made.aligned}" in message
    config = RestoreConfig(config_from="finetuned", max_safety_kl=50)
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    found = safety_kl(made.aligned, tmp_path / "out", held_out(made.store))
    assert report.dial.restored_kl == pytest.approx(found, rel=1e-4)
    # The fine-tuned model itself is broken so.
    edited(tuned / "config.json", lambda content: content.update(tie_word_embeddings=False))
    message = refusal(plan_restore, made.aligned, tuned, store=made.store)
    assert f"with the configuration of {tuned}" in message


# Other tokens


@pytest.mark.usefixtures("exact")
def test_a_tokenizer_that_gives_other_ids_is_refused(tmp_path):
    made = pair()
    tuned = permuted(made.finetuned, tmp_path / "tuned")
    for config in (None, RestoreConfig(config_from="finetuned")):
        message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store, config=config)
        assert "378 tokens have other ids, such as '!': 6 in the aligned model, 383 in" in message
        assert "finetuned` cannot serve: the tokenizers give the same text other ids" in message
        assert "`--config-from aligned` gives" in message
    out = tmp_path / "out"
    config = RestoreConfig(config_from="aligned")
    report = restore(made.aligned, tuned, out, store=made.store, config=config)
    assert agrees(report, made.aligned, out, made.store)
    assert same_files(out, made.aligned)


def test_a_tokenizer_that_cuts_text_up_otherwise_is_refused_by_the_dial(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned")
    edited(tuned / "tokenizer.json", lambda content: content["model"].update(merges=[]))
    message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store)
    assert "number of merges" in message
    assert "`--config-from finetuned` gives" in message
    config = RestoreConfig(config_from="finetuned")
    message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store, config=config)
    assert "The two tokenizers give the same text other ids" in message
    assert "--config-from aligned" in message


# The aligned model after it was calibrated


def set_eps(folder):
    edited(folder / "config.json", lambda content: content.update(rms_norm_eps=0.01))


def set_template(folder):
    (folder / TEMPLATE).write_text(OTHER_TEMPLATE)


def set_tokenizer(folder):
    edited(folder / "tokenizer.json", lambda content: content["model"]["merges"].pop())


def set_end(folder):
    edited(folder / "generation_config.json", lambda content: content.update(eos_token_id=5))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (set_eps, "configuration"),
        (set_end, "configuration"),
        (set_tokenizer, "tokenizer"),
        (set_template, "chat template"),
    ],
)
def test_a_store_of_the_model_before_it_was_edited_is_refused(change, part, tmp_path, monkeypatch):
    made = pair()
    aligned, tuned = variant(made.aligned, tmp_path / "a"), variant(made.finetuned, tmp_path / "f")
    change(aligned)
    change(tuned)
    call = (aligned, tuned, tmp_path / "out")
    message = refusal(restore, *call, store=made.store)
    assert f"is: {part}: " in message
    assert f"deltaguard calibrate {aligned} -o STORE" in message
    assert refusal(plan_restore, aligned, tuned, store=made.store) == message
    # Nor is the one found that is kept for the model as it was.
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    shutil.copytree(made.store, default_store_folder(identify(Checkpoint.open(made.aligned)), "auto"))
    assert not plan_restore(made.aligned, made.finetuned).note
    assert plan_restore(aligned, tuned).note == "the aligned model will be calibrated first"


def test_an_interrupted_restore_does_not_go_on_with_other_files(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned")

    def stop(event):
        if event.stage == "restore":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(made.aligned, tuned, tmp_path / "out", store=made.store, progress=stop)
    set_template(tuned)
    config = RestoreConfig(resume=True, config_from="finetuned", max_safety_kl=50)
    message = refusal(restore, made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert "another plan" in message


def test_the_report_names_what_was_used(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned", template=OTHER_TEMPLATE)
    config = RestoreConfig(config_from="aligned", strength=0.5)
    restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    for role, folder in (("aligned", made.aligned), ("finetuned", tuned)):
        expected = identify(Checkpoint.open(folder)).model_dump() | {"reference": str(folder)}
        assert report[role] == expected
    assert report["aligned"]["template_sha256"] != report["finetuned"]["template_sha256"]
    assert report["aligned"]["tokenizer_sha256"] == report["finetuned"]["tokenizer_sha256"]


# Adapters in, adapters out


@pytest.fixture
def adapter(tmp_path):
    """An adapter that brings a chat template of its own."""
    made = pair()
    save_adapter(made.aligned, tmp_path / "adapter", ["q_proj", "down_proj"])
    (tmp_path / "adapter" / TEMPLATE).write_text(OTHER_TEMPLATE)
    return tmp_path / "adapter"


@pytest.mark.usefixtures("exact")
def test_an_adapter_that_brings_another_template(adapter, tmp_path):
    made = pair()
    message = refusal(restore, made.aligned, adapter, tmp_path / "not", store=made.store)
    assert "chat template differs from character 15" in message
    for config_from, template in (("aligned", models.CHAT_TEMPLATE), ("finetuned", OTHER_TEMPLATE)):
        out = tmp_path / config_from
        config = RestoreConfig(config_from=config_from, max_safety_kl=50)
        report = restore(made.aligned, adapter, out, store=made.store, config=config)
        assert agrees(report, made.aligned, out, made.store)
        assert (out / TEMPLATE).read_text() == template
        assert same_files(out, made.aligned, SETTINGS)


def merged(aligned, adapter, folder):
    """What PEFT loads, as a checkpoint with the files that lie beside the adapter."""
    base = transformers.AutoModelForCausalLM.from_pretrained(aligned)
    with warnings.catch_warnings():
        # PEFT speaks of Conv1D where it sets fan_in_fan_out itself.
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(adapter).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("config_from", ["aligned", "finetuned"])
def test_an_adapter_is_written_with_the_template_that_was_measured(config_from, tmp_path):
    made = pair("gpt2")
    tuned = variant(made.finetuned, tmp_path / "tuned", template=OTHER_TEMPLATE)
    config = RestoreConfig(config_from=config_from, output_format="adapter", max_safety_kl=0.6)
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    loaded = merged(made.aligned, tmp_path / "out", tmp_path / "merged")
    found = safety_kl(made.aligned, loaded, held_out(made.store))
    assert report.dial.restored_kl == pytest.approx(found, rel=1e-5)
    expected = {"aligned": made.aligned, "finetuned": tuned}[config_from]
    assert same_files(tmp_path / "out", expected, ("tokenizer.json", TEMPLATE))
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.usefixtures("exact")
def test_an_adapter_cannot_have_another_configuration(tmp_path):
    made = pair("gpt2")
    tuned = variant(made.finetuned, tmp_path / "tuned", n_head=2)
    for config_from in (None, "finetuned"):
        config = RestoreConfig(config_from=config_from, output_format="adapter")
        message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store, config=config)
        assert "`n_head`: 4 in the aligned model, 2 in the fine-tuned one" in message
        assert "finetuned` cannot serve: an adapter is loaded over the aligned model" in message
    config = RestoreConfig(config_from="aligned", output_format="adapter")
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    loaded = merged(made.aligned, tmp_path / "out", tmp_path / "merged")
    found = safety_kl(made.aligned, loaded, held_out(made.store))
    assert report.dial.restored_kl == pytest.approx(found, rel=1e-5)

"""Which differences between two models need no choice, and which leave none."""

import pytest
import transformers
from safetensors.torch import load_file, save_file

import models
from deltaguard import RestoreConfig, diff, restore
from deltaguard.restoration.dry_run import plan_restore
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL
from pairs import held_out, pair
from plain import safety_kl
from variants import TEMPLATE, agrees, edited, permuted, refusal, same_files, variant, with_further_tokens

WITHIN_LIMIT = RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL)
TRUNCATION = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}


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
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=WITHIN_LIMIT)
    assert agrees(report, made.aligned, tmp_path / "out", made.store)
    assert same_files(tmp_path / "out", tuned)
    assert "config_from" not in report.options
    assert diff(made.aligned, tuned).settings == ()


def test_a_vocabulary_that_was_cut_down_is_refused_with_what_gives_it_back(tmp_path):
    made = pair()
    model = transformers.AutoModelForCausalLM.from_pretrained(made.finetuned)
    model.resize_token_embeddings(380)
    cut = models.save(model, tmp_path / "cut")
    message = refusal(restore, made.aligned, cut, tmp_path / "out", store=made.store, config=WITHIN_LIMIT)
    assert "`model.embed_tokens.weight` is (384, 32) in the aligned model and (380, 32) in the" in message
    assert "`model.resize_token_embeddings(384)`" in message


@pytest.mark.usefixtures("exact")
def test_further_tokens_need_no_choice_and_cannot_be_left_out(tmp_path):
    made = pair()
    tuned = with_further_tokens(tmp_path / "tuned", "weather")
    config = RestoreConfig(max_safety_kl=0.1)
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    assert agrees(report, made.aligned, tmp_path / "out", made.store)
    assert same_files(tmp_path / "out", tuned)
    config = RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL, config_from="aligned")
    message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store, config=config)
    assert "lm_head.weight` has 386 rows, and the aligned model's configuration holds 384" in message
    assert "--config-from finetuned" in message
    # One of the further tokens may be the padding.
    edited(tuned / "config.json", lambda content: content.update(rms_norm_eps=0.01, pad_token_id=385))
    message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store, config=WITHIN_LIMIT)
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
    message = refusal(restore, made.aligned, tuned, tmp_path / "out", store=made.store, config=WITHIN_LIMIT)
    assert "tokenizer: 'TokenizersBackend' in the aligned model, none in the fine-tuned one" in message
    config = RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL, config_from="aligned")
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
    for config in (WITHIN_LIMIT, RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL, config_from="finetuned")):
        message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store, config=config)
        assert "378 tokens have other ids, such as '!': 6 in the aligned model, 383 in" in message
        assert "finetuned` cannot serve: the tokenizers give the same text other ids" in message
        assert "`--config-from aligned` gives" in message
    out = tmp_path / "out"
    config = RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL, config_from="aligned")
    report = restore(made.aligned, tuned, out, store=made.store, config=config)
    assert agrees(report, made.aligned, out, made.store)
    assert same_files(out, made.aligned)


def test_a_tokenizer_that_cuts_text_up_otherwise_is_refused_by_the_dial(tmp_path):
    made = pair()
    tuned = variant(made.finetuned, tmp_path / "tuned")
    edited(tuned / "tokenizer.json", lambda content: content["model"].update(merges=[]))
    message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store, config=WITHIN_LIMIT)
    assert "number of merges" in message
    assert "`--config-from finetuned` gives" in message
    config = RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL, config_from="finetuned")
    message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store, config=config)
    assert "The two tokenizers give the same text other ids" in message
    assert "--config-from aligned" in message

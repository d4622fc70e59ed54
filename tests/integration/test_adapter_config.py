"""Adapters that bring a chat template, and adapters that are written: what is measured is what PEFT loads."""

import warnings

import peft
import pytest
import transformers

import models
from deltaguard import RestoreConfig, restore
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL
from pairs import held_out, pair, save_adapter
from plain import safety_kl
from variants import OTHER_TEMPLATE, SETTINGS, TEMPLATE, agrees, refusal, same_files, variant


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
    config = RestoreConfig(max_safety_kl=50)
    message = refusal(restore, made.aligned, adapter, tmp_path / "not", store=made.store, config=config)
    assert "chat template differs from character 15" in message
    for config_from, template in (("aligned", models.CHAT_TEMPLATE), ("finetuned", OTHER_TEMPLATE)):
        out = tmp_path / config_from
        config = RestoreConfig(config_from=config_from, max_safety_kl=50)
        report = restore(made.aligned, adapter, out, store=made.store, config=config)
        assert agrees(report, made.aligned, out, made.store)
        assert (out / TEMPLATE).read_text() == template
        assert same_files(out, made.aligned, set(SETTINGS) - {TEMPLATE})


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
        config = RestoreConfig(
            config_from=config_from, output_format="adapter", max_safety_kl=DEFAULT_MAX_SAFETY_KL
        )
        message = refusal(restore, made.aligned, tuned, tmp_path / "not", store=made.store, config=config)
        assert "`n_head`: 4 in the aligned model, 2 in the fine-tuned one" in message
        assert "finetuned` cannot serve: an adapter is loaded over the aligned model" in message
    config = RestoreConfig(
        config_from="aligned", output_format="adapter", max_safety_kl=DEFAULT_MAX_SAFETY_KL
    )
    report = restore(made.aligned, tuned, tmp_path / "out", store=made.store, config=config)
    loaded = merged(made.aligned, tmp_path / "out", tmp_path / "merged")
    found = safety_kl(made.aligned, loaded, held_out(made.store))
    assert report.dial.restored_kl == pytest.approx(found, rel=1e-5)

"""`service.yaml`: what holds for jobs is found out when it is read."""

import base64

import pytest
from pydantic import ValidationError

from deltaguard.errors import DeltaguardError
from deltaguard.restoration.options import RestoreConfig
from deltaguard.service.settings import Settings, Webhook, restore_options
from deltaguard.service.tasks import Restore
from deltaguard.service.webhooks import webhook_secret

LLM = {"kind": "llm", "base_url": "http://127.0.0.1:9/v1", "model": "judge", "api_key_env": "JUDGE_KEY"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refine": 10}, "refine changes whole layers"),
        ({"other_params": "finetuned"}, "an adapter leaves norms"),
        ({"strenth": 0.5}, "Did you mean strength"),
        ({"output_format": "adapter"}, "output_format follow from the job"),
    ],
)
def test_options_that_some_job_could_not_be_restored_with_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Settings(restore=options)


def test_an_adapter_has_the_rank_that_was_trained_unless_the_operator_says_otherwise():
    given = Settings(restore={"adapter_rank": 8, "max_safety_kl": 0.001}).restore
    for options, rank in ((given, 8), ({}, 16)):
        config = RestoreConfig.model_validate(restore_options(options, lora_rank=16))
        assert (config.output_format, config.adapter_rank) == ("adapter", rank)
    whole = RestoreConfig.model_validate(restore_options(given, lora_rank=None))
    assert (whole.output_format, whole.adapter_rank, whole.max_safety_kl) == ("checkpoint", None, 0.001)


def test_the_judge_of_a_restore_is_prepared_and_its_process_is_given_its_key():
    settings = Settings(restore={"judge": LLM})
    assert [spec.kind for spec in settings.judges] == ["opening", "llm"]
    task = Restore(model="m", device="cpu", options=settings.restore)
    assert task.key_names == ("JUDGE_KEY",)
    assert Restore(model="m", device="cpu", options={}).key_names == ()


def test_a_secret_has_the_schemes_form(monkeypatch):
    webhook = Webhook(url="https://example.org/hook", key_env="SECRET")
    secret = "whsec_" + base64.b64encode(b"0123456789abcdef01234567").decode()
    monkeypatch.setenv("SECRET", secret)
    assert len(webhook_secret(webhook)) == 24
    for wrong in ("", "whsec_", "whsec_c2hvcnQ=", secret.removeprefix("whsec_"), "whsec_!", "whsec_’"):
        monkeypatch.setenv("SECRET", wrong)
        with pytest.raises(DeltaguardError, match="SECRET"):
            webhook_secret(webhook)
    with pytest.raises(ValidationError):
        Webhook(url="file:///etc/passwd")

"""What several tests share."""

import pytest
import torch

from deltaguard.restoration.safety_kl import SafetyMeter
from suites import two_models


@pytest.fixture
def exact(monkeypatch):
    """The dial measures in float64, so that its numbers can be compared to the last digit but a few."""
    original = SafetyMeter.open
    monkeypatch.setattr(
        SafetyMeter, "open", lambda *args, **options: original(*args, **{**options, "dtype": torch.float64})
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An aligned model and a fine-tuned one, to be asked."""
    return two_models(tmp_path_factory.mktemp("models"))

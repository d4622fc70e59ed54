"""What several tests of the dial share."""

import pytest
import torch

from deltaguard.restoration.safety_kl import SafetyMeter


@pytest.fixture
def exact(monkeypatch):
    """The dial measures in float64, so that its numbers can be compared to the last digit but a few."""
    original = SafetyMeter.open
    monkeypatch.setattr(
        SafetyMeter, "open", lambda *args, **options: original(*args, **{**options, "dtype": torch.float64})
    )

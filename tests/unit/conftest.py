"""What several tests of one folder share."""

import pytest

from copies import three_shards
from deltaguard.models.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Checkpoint:
    """A checkpoint of three shards that tests must not write to."""
    return three_shards(tmp_path_factory.mktemp("source") / "model")

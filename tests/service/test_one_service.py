"""One service at a time works in a data folder."""

import os

import pytest

import models
from deltaguard.models.durable import InUseError, lock_folder
from deltaguard.service.server import serve
from deltaguard.service.settings import Settings


def test_a_second_service_in_the_folder_ends_before_it_touches_anything(tmp_path):
    aligned = models.save(models.tiny_model("llama"), tmp_path / "aligned")
    data, opened = tmp_path / "data", []
    data.mkdir()
    lock = lock_folder(data)
    with pytest.raises(InUseError, match="Another process is working in"):
        serve(data, Settings(models={"tiny": str(aligned)}), host="127.0.0.1", port=1, on_open=opened.append)
    assert not opened
    assert not list(data.iterdir())
    os.close(lock)

"""The notebook, from top to bottom, on a tiny model in the place of the Hub's."""

import re

import nbformat
import pytest
from tools.notebook import TAG, run_notebook

from deltaguard import verify
from deltaguard.models.adapter import is_adapter
from documents import EXAMPLES, ROOT
from refusing import refusing_pair

NOTEBOOK = EXAMPLES / "restore.ipynb"


def test_a_reader_runs_it_from_top_to_bottom(tmp_path, monkeypatch):
    """It starts a kernel, trains, and asks two models a thousand requests, as a reader does."""
    monkeypatch.setenv("DELTAGUARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Whatever the machine has: the tiny model is asked on the CPU.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    parameters = {
        "MODEL": str(refusing_pair().aligned),
        "OUTPUT": str(tmp_path / "output"),
        "STEPS": 30,
        "LEARNING_RATE": 5e-3,
        "SAFETY_CONVERSATIONS": 24,
    }
    printed = "".join(run_notebook(NOTEBOOK, parameters, folder=tmp_path, timeout=300))
    kept = re.search(r"(\d+)% of the delta's energy kept", printed)
    assert kept
    assert "Verdict: " in printed
    assert [line.split(":")[0] for line in printed.splitlines() if "messages right" in line] == [
        "before",
        "fine-tuned",
        "restored",
    ]
    assert is_adapter(str(tmp_path / "output" / "restored"))
    assert verify(tmp_path / "output" / "restored").passed


def test_it_holds_no_output_and_names_a_model_of_the_hub():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert all(cell.get("execution_count") is None for cell in notebook.cells)
    (parameters,) = (cell.source for cell in notebook.cells if TAG in cell.metadata.get("tags", ()))
    assert re.search(r'^MODEL = "[\w-]+/[\w.-]+"$', parameters, re.MULTILINE)


def test_a_parameter_that_it_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no parameter MODLE"):
        run_notebook(NOTEBOOK, {"MODLE": "x"}, folder=tmp_path)

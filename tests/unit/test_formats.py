"""Files that earlier releases wrote open, for as long as docs/compatibility.md promises."""

import shutil
from pathlib import Path

import pytest
from pydantic import TypeAdapter

import samples
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import SCHEMA_VERSION
from deltaguard.evaluation.journal import AnswerFile
from deltaguard.files import read_json
from deltaguard.models.journal import Journal

FORMATS = Path(__file__).resolve().parents[1] / "formats"
# Of what the first release wrote. All others are made anew from what lies beside them.
OPEN_FOR_GOOD = {"batch": 1, "check": 1, "curvature": 3, "restore": 2, "sweep": 2}
CURRENT = {"curvature": SCHEMA_VERSION, **{n: make().schema_version for n, make in samples.REPORTS.items()}}


PROMISED = [
    (name, version)
    for name, current in CURRENT.items()
    for version in range(OPEN_FOR_GOOD.get(name, current), current + 1)
]


@pytest.mark.parametrize(("name", "version"), PROMISED)
def test_a_file_of_every_promised_version_is_kept_and_opens(name, version):
    path = FORMATS / f"{name}-{version}"
    if name == "curvature":
        store = CurvatureStore.from_pretrained(path)
        assert store.input_spectrum("a.q").values.numel() == 5
        return
    kind = type(samples.REPORTS[name]())
    found = read_json(path.with_suffix(".json"), kind, remedy="")
    assert kind.model_validate_json(found.model_dump_json()) == found


def test_an_interrupted_restore_is_read_on(tmp_path):
    found = Journal.load(Path(shutil.copy(FORMATS / "progress.jsonl", tmp_path)))
    assert (found.plan_hash, list(found.records)) == ("0" * 64, ["model.safetensors"])
    assert found.remembered("mu", TypeAdapter(float)) == 0.5


def test_answers_are_not_asked_for_again(tmp_path):
    copied = Path(shutil.copy(FORMATS / "answers.jsonl", tmp_path))
    found = AnswerFile(copied, prompts=samples.PROMPTS, made_by=samples.MADE_BY)
    assert found.in_order() == ["No.", "Because."]

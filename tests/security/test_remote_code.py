"""Code that a model's folder brings along: it never runs, whatever is asked on standard input."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

import models
from deltaguard import DeltaguardError
from deltaguard.evaluation.exchange import Exchange
from deltaguard.evaluation.judges.classifiers import ClassifierSpec
from deltaguard.evaluation.judges.guards import GuardJudge, GuardSpec
from deltaguard.finetuning.finetune import FinetuneConfig, finetune
from deltaguard.models.checkpoint import Checkpoint
from pairs import CONVERSATIONS, pair

CODE = """
from pathlib import Path
Path({marker!r}).write_text("this ran")
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def hostile(tmp_path, marker):
    """A folder that is a model with code of its own; transformers asks before it runs it."""
    folder = tmp_path / "hostile"
    shutil.copytree(pair("llama").finetuned, folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    return folder


def commands(hostile, aligned, out):
    """Every verb that takes a model, with the hostile one in each place."""
    store = str(pair("llama").store)
    yield ["calibrate", str(hostile), "-o", out]
    yield ["restore", str(hostile), str(aligned), "-o", out, "--store", store]
    yield ["restore", str(aligned), str(hostile), "-o", out, "--store", store]
    yield ["restore", str(aligned), str(hostile), "-o", out, "--method", "interpolate", "--strength", "0.5"]
    yield ["sweep", str(aligned), str(hostile), "-o", out, "--store", store]
    yield ["diff", str(aligned), str(hostile)]
    yield ["eval", str(hostile), "-o", out]
    yield ["bench", str(hostile), "-o", out]


def test_transformers_would_ask_and_run_it(hostile, marker):
    """The fixture is what it says: with trust the code runs."""
    transformers.AutoConfig.from_pretrained(hostile, trust_remote_code=True)
    assert marker.read_text() == "this ran"


def test_every_verb_refuses_it_by_name_and_reads_nothing_from_stdin(hostile, marker, tmp_path):
    script = (
        "import json, sys\n"
        "from deltaguard.cli.app import run\n"
        "print(json.dumps([run(line) for line in json.loads(sys.argv[1])]))\n"
    )
    lines = list(commands(hostile, pair("llama").aligned, str(tmp_path / "out")))
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(lines)],
        input="y\n" * 1000,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"TERM": "dumb"},
    )
    assert json.loads(done.stdout) == [1] * len(lines)
    assert done.stderr.count("own.OwnConfig") == len(lines)
    assert done.stderr.count("auto_map") >= len(lines)
    assert not marker.exists()
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_every_file_that_can_name_code_is_looked_at(tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(pair("llama").aligned, folder)
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    with pytest.raises(DeltaguardError, match=f"{name} names .*own.Own"):
        Checkpoint.open(folder)


def test_a_part_of_a_configuration_may_not_name_code(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pair("llama").aligned, folder)
    content = json.loads((folder / "config.json").read_text())
    nested = {"text_config": {"auto_map": {"AutoConfig": "someone/else--own.Own"}}}
    (folder / "config.json").write_text(json.dumps(content | nested))
    with pytest.raises(DeltaguardError, match=re.escape("someone/else--own.Own")):
        Checkpoint.open(folder)


def test_a_generation_function_in_the_folder_is_refused(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(pair("llama").aligned, folder)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("def generate(model, **_): ...")
    with pytest.raises(DeltaguardError, match=re.escape("custom_generate/generate.py")):
        Checkpoint.open(folder)


def test_judges_and_training_refuse_it(hostile, marker, tmp_path):
    asked = [Exchange("How?", "No.")]
    for attempt in (
        lambda: ClassifierSpec(model=str(hostile), refused_labels=("LABEL_0",)).make().judge(asked),
        lambda: GuardJudge(GuardSpec(model=str(hostile), template="llama-guard")).judge(asked),
        lambda: finetune(hostile, tmp_path / "out", CONVERSATIONS, config=FinetuneConfig(1e-4)),
    ):
        with pytest.raises(DeltaguardError, match=re.escape("own.OwnConfig")):
            attempt()
    assert not marker.exists()


def test_pickled_weights_of_a_judge_are_not_loaded(tmp_path, marker):
    class Run:
        def __reduce__(self):
            return (marker.write_text, ("this ran",))

    folder = models.save(models.tiny_model("llama"), tmp_path / "judge")
    torch.save({"weight": Run()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DeltaguardError, match="transformers cannot load"):
        GuardJudge(GuardSpec(model=str(folder), template="llama-guard")).judge([Exchange("How?", "No.")])
    assert not marker.exists()

"""What a verb is told arrives where the work is done."""

from pathlib import Path

import pytest

from deltaguard.cli.app import FAILED, run
from deltaguard.errors import DeltaguardError


@pytest.fixture
def called(monkeypatch):
    """Replaces a function by one that keeps what it was called with, and goes no further; gives both."""
    kept = {}

    def stop(*positional, **named):
        kept.update(named, positional=positional)
        raise DeltaguardError("far enough")

    def replaced(name):
        monkeypatch.setattr(name, stop)
        return kept

    return replaced


def test_calibrate(called):
    kept = called("deltaguard.curvature.calibrate.calibrate")
    options = ["--system", "You sell shoes.", "--system", "You are a pirate.", "--num-samples", "20"]
    options += ["--num-look-alikes", "7", "--max-length", "99", "--seed", "3", "--dtype", "bfloat16"]
    options += ["--batch-size", "5", "--device", "cpu", "--rank", "full", "--memory", "3GB", "--resume"]
    assert run(["calibrate", "model", "-o", "store", *options]) == FAILED
    assert kept["positional"] == ("model", Path("store"))
    assert kept["config"].model_dump(exclude_defaults=True) == {
        "systems": ("You sell shoes.", "You are a pirate."),
        "num_samples": 20,
        "num_look_alikes": 7,
        "max_length": 99,
        "seed": 3,
        "dtype": "bfloat16",
        "batch_size": 5,
        "device": "cpu",
        "rank": "full",
        "memory": 3_000_000_000,
        "resume": True,
    }


@pytest.mark.parametrize(
    ("preset", "function"), [("quick", "run.bench"), ("default", "attack_study.bench_attacks")]
)
def test_bench(called, tmp_path, preset, function):
    kept = called(f"deltaguard.studies.{function}")
    prompts = tmp_path / "mine.jsonl"
    prompts.write_text('{"prompt": "Name a harm."}\n')
    options = ["--preset", preset, "--pretrained", "base", "--method", "kfac", "--method", "resta"]
    options += ["--finetune", "identity-lora", "--finetune", "task-clean-lora", "--training", "lora"]
    options += ["--seeds", "2", "--first-seed", "4", "--attack-prompts", str(prompts)]
    assert run(["bench", "model", "-o", "out", *options]) == FAILED
    assert (kept["aligned"], kept["pretrained"], kept["methods"]) == ("model", "base", ("kfac", "resta"))
    chosen = kept["preset"]
    assert (chosen.name, chosen.seeds) == (preset, (4, 5))
    assert [row.name for row in chosen.finetunes] == ["identity-lora", "task-clean-lora"]
    assert [question.prompt for question in kept["attacks"]] == ["Name a harm."]


def test_bench_measures_so_many_strengths(called):
    kept = called("deltaguard.studies.run.bench")
    assert run(["bench", "-o", "out", "--probes", "5"]) == FAILED
    assert kept["preset"].probes == 5


def test_eval(called):
    kept = called("deltaguard.evaluation.evaluate.evaluate")
    options = ["--suite", "safety", "--device", "cpu", "--dtype", "float16", "--batch-size", "3", "--inspect"]
    options += ["--guard", "someone/guard", "--guard-template", "wildguard"]
    assert run(["eval", "one", "two", "-o", "out", *options]) == FAILED
    assert kept["positional"] == (["one", "two"], Path("out"))
    engine = kept["engine"]
    assert (engine.name, engine.device, engine.dtype, engine.batch_size) == (
        "transformers",
        "cpu",
        "float16",
        3,
    )
    assert kept["inspect_logs"]
    assert kept["suite"].name == "safety"
    judge = kept["suite"].judges[-1]
    assert (judge.kind, judge.model, judge.template) == ("guard", "someone/guard", "wildguard")


def test_demo(called):
    kept = called("deltaguard.studies.demo.demo")
    assert run(["demo", "-o", "out", "--seed", "3"]) == FAILED
    assert kept["config"].seed == 3


def test_serve(called):
    pytest.importorskip("dbos")
    kept = called("deltaguard.service.server.serve")
    options = ["--model", "tiny=folder", "--host", "::1", "--port", "8123", "--executor", "local"]
    assert run(["serve", "--data", "data", *options, "--inference-url", "http://gpu:8001/v1"]) == FAILED
    data, settings = kept["positional"]
    assert (data, kept["host"], kept["port"]) == (Path("data"), "::1", 8123)
    assert settings.models == {"tiny": "folder"}
    assert (str(settings.inference_url), settings.executor) == ("http://gpu:8001/v1", "local")

"""Prompts, options, suites, data sets, model cards and answers."""

import io
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import yaml
from mutators import Mutator, damage, damage_card, damage_json, damage_lines, damage_yaml
from pyarrow import parquet

from deltaguard.chat.conversations import read_prompts
from deltaguard.cli.app import run
from deltaguard.evaluation.datasets.load import load_questions
from deltaguard.evaluation.suites.parts import find_prompts
from deltaguard.evaluation.suites.suite import read_suite
from deltaguard.evaluation.utility.scores import SCORERS
from deltaguard.reports.card import model_card
from deltaguard.restoration.beforehand import front_matter
from deltaguard.restoration.sweep import sweep
from restores import restore_report
from suites import SMALL
from targets import Kind, Target, in_file

PROMPTS = (
    b'{"prompt": "How?", "response": "So."}\n'
    b'{"prompt": "Why?", "response": "Because.", "system": "Be kind."}\n'
)
TURNS = (
    b'{"turns": ["How?", "And then?"], "reference": ["So.", "Thus."]}\n'
    b'{"turns": ["Why?", 7], "reference": []}\n'
)
CSV = b'prompt,system,expected\n"How, then?",Be kind.,7\nWhy?,,"a\nb"\n'
JSON = b'{"instructions": [{"prompt": "How?", "expected": 7}, {"prompt": "Why?", "system": "a"}], "tags": 3}'
OPTIONS = b"method: greedy\nstrength: 0.5\nbudget: paper\ncompensation: none\nother-params: finetuned\n"
CARD = b"---\nlicense: mit\nlanguage: [en, no]\ntags:\n- a\nbase_model: a/b\ndate: 2025-01-01\n---\n# Model\n"
ANSWER = b'{"a": "1", "b": [2, {"c": 3}]} #### 1,200.50 so 1 1/2 \\frac{3}{4} $5%'


def prompts(folder: Path) -> Target:
    path = folder / "prompts.jsonl"
    return in_file(path, damage_lines, lambda: read_prompts(path), PROMPTS)


def utility(folder: Path) -> Target:
    path = folder / "utility.jsonl"
    return in_file(path, damage_lines, lambda: sweep("/nowhere", "/nowhere", folder, utility=path), PROMPTS)


def options(folder: Path) -> Target:
    path = folder / "options.yaml"
    command = ["restore", "/nowhere", "/nowhere", "-o", str(folder / "out"), "--config", str(path)]

    def read() -> None:
        assert run(command) in (1, 2)

    return in_file(path, damage_yaml, read, OPTIONS)


def suite(folder: Path) -> Target:
    path = folder / "suite.yaml"
    (folder / "mine.jsonl").write_bytes(PROMPTS)
    content = yaml.safe_load(SMALL)
    own = {"name": "mine", "kind": "attack", "file": "mine.jsonl", "count": 2, "second_attack": {"count": 3}}
    content["sections"] += [own, {"name": "set", "kind": "attack", "dataset": "advbench", "path": "gone.csv"}]
    content["judges"].append({"kind": "guard", "model": "a/b", "prompt_file": "guard.txt"})

    def read() -> None:
        for section in read_suite(path).sections:
            # What lies on the Hub is not fetched.
            if section.dataset is None or section.path is not None:
                find_prompts(section)

    return in_file(path, damage_yaml, read, yaml.safe_dump(content).encode())


def data_set(
    ending: str, damage: Mutator, content: bytes, name: str | None = None
) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        path = folder / f"set{ending}"
        read = (lambda: load_questions(path)) if name is None else (lambda: load_questions(name, path=path))
        return in_file(path, damage, read, content)

    return make


def data_name(_: Path) -> Target:
    """A name that is neither a file nor a known set; those would be fetched."""
    return Target(
        b"~someone/data/mine.csv",
        damage,
        lambda content: load_questions(content.decode(errors="surrogateescape")),
    )


def table() -> bytes:
    rows = [
        {"prompt": "How?", "system": None, "expected": 7},
        {"prompt": "Why?", "system": "a", "expected": 8},
    ]
    stream = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def card(folder: Path) -> Target:
    path = folder / "README.md"

    def read() -> None:
        model_card(restore_report(), front_matter=front_matter(folder)).encode()

    return in_file(path, damage_card, read, CARD)


def answers(_: Path) -> Target:
    def read(content: bytes) -> None:
        answer = content.decode(errors="replace")
        for score in SCORERS.values():
            score(answer, ANSWER.decode())

    return Target(ANSWER, damage_odd, read)


def damage_odd(content: bytes, draw) -> bytes:
    """A model's answer may be JSON of any kind."""
    document = b'{"a": "1", "b": [2, {"c": 3}]}'
    return damage_json(document, draw) if draw.random() < 0.5 else damage(content, draw)


KINDS = (
    Kind("prompts", 160, prompts),
    Kind("utility data", 100, utility),
    Kind("options", 60, options),
    Kind("suite", 140, suite),
    Kind("data set in CSV", 80, data_set(".csv", damage, CSV)),
    Kind("data set in CSV without header", 40, data_set(".csv", damage, b'How?\n"Why, then?"\n', "hex-phi")),
    Kind("data set in TSV", 40, data_set(".tsv", damage, CSV.replace(b",", b"\t"))),
    Kind("data set in JSON", 80, data_set(".json", damage_json, JSON)),
    Kind("data set in JSON lines", 80, data_set(".jsonl", damage_lines, PROMPTS)),
    Kind("data set of turns", 60, data_set(".jsonl", damage_lines, TURNS, "mt-bench")),
    Kind("name of a data set", 40, data_name),
    Kind("data set in parquet", 100, data_set(".parquet", damage, table())),
    Kind("model card", 120, card),
    Kind("answer", 80, answers),
)

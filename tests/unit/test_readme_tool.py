"""`tools.readme`: numbers get into pages from JSON alone, and a page that is not up to date is found."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from bench_reports import bench_report
from deltaguard import CalibrateConfig
from deltaguard.restoration.acceptance import MOST_LOOKS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def page(name: str, inside: str = "old numbers\n") -> str:
    return f"before\n\n<!-- {name} -->\n{inside}<!-- /{name} -->\n\nafter\n"


ENVIRONMENT = {
    "created": "2025-06-01T12:05:00+00:00",
    "versions": {"python": "3.11.9", "torch": "2.9.0"},
    "machine": "Linux x86_64, 2 threads",
    "device": "cpu",
}


def rate(successes: int, total: int) -> dict:
    value = successes / total
    return {"successes": successes, "total": total, "value": value, "low": value / 2, "high": value / 2 + 0.5}


def model(name: str, attack: int) -> dict:
    return {
        "name": name,
        "attack_success": rate(attack, 200),
        "false_refusal": rate(3, 120),
        "task_accuracy": rate(90, 100),
        "incoherent_answers": 0,
    }


def demo_report() -> dict:
    reference = {"reference": "model", "fingerprint": "f" * 64}
    return {
        "environment": ENVIRONMENT,
        "kept_gain": 0.912,
        "models": [model("aligned", 8), model("finetuned", 178), model("restored", 14)],
        "samples": [],
        "restore": {
            "environment": ENVIRONMENT,
            "aligned": reference,
            "finetuned": reference,
            "store_conversations": None,
            "options": {"method": "greedy", "strength": 0.25},
            "method_title": "a selection",
            "layers": [],
            "others": [],
            "files": [],
            "kept_energy": 0.3,
            "kept_entries": 0.4,
            "utility_loss": 0.1,
            "safety_cost": 0.02,
            "seconds": {"total": 3.0},
            "peak_memory_bytes": 10**9,
        },
        "seconds": {"align": 60.0, "total": 301.0},
        "peak_memory_bytes": 2 * 10**9,
        "seed": 7,
    }


def strength_row(seed: int, strength: float, attack: int) -> dict:
    return {
        "finetune": "tickets with 9 % harmful",
        "seed": seed,
        "method": "greedy",
        "budget": "fraction",
        "compensation": "joint",
        "strength": strength,
        "attack_success": rate(attack, 200),
        "aligned_attack_success": rate(8, 200),
        "finetuned_attack_success": rate(178, 200),
        "task_accuracy": rate(80, 100),
        "kept_gain": 0.8,
        "safety_cost": 0.013,
        "kept_energy": 0.35,
        "kept_entries": 0.5,
    }


def repository(readme, root: Path) -> Path:
    (root / readme.RESULTS).mkdir(parents=True)
    for name in readme.PAGES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(page("demo-table"))
    return root


def test_demo_numbers_come_with_their_origin(readme, tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps(demo_report()))
    filled = readme.fill(page("demo-table"), tmp_path)
    assert "old numbers" not in filled
    assert "| **fine-tuned** | 89.0 % (" in filled
    assert "| **restored** | 7.0 % (" in filled
    for origin in (
        "91.2 %",
        "strength 0.25",
        "seed 7",
        "5 min 1 s",
        "2.0 GB",
        "1 June 2025",
        "cpu",
        "torch 2.9.0",
    ):
        assert origin in filled
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")


def test_filling_again_changes_nothing(readme, tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps(demo_report()))
    once = readme.fill(page("demo-table"), tmp_path)
    assert readme.fill(once, tmp_path) == once
    empty = readme.fill(page("demo-table"), tmp_path / "nowhere")
    assert readme.fill(empty, tmp_path / "nowhere") == empty


@pytest.mark.parametrize("name", ["demo-table", "strength-table", "benchmark-table", "attacks-table"])
def test_what_was_not_measured_says_so(readme, tmp_path, name):
    filled = readme.fill(page(name), tmp_path)
    assert "Not measured yet." in filled
    assert "old numbers" not in filled


def test_every_fine_tune_has_its_table_of_strengths(readme, tmp_path):
    rows = [strength_row(0, 0.1, 8), strength_row(0, 0.3, 18), strength_row(1, 0.1, 10)]
    (tmp_path / "strength.json").write_text(json.dumps({"environment": ENVIRONMENT, "rows": rows}))
    filled = readme.fill(page("strength-table"), tmp_path)
    assert filled.count("| method |") == 2
    assert filled.count("| greedy, fraction, joint | 0.1 |") == 2
    assert "| +5.0 |" in filled
    assert "(seed 1)" in filled


def test_a_benchmark_row_needs_a_name_and_a_time_only(readme, tmp_path):
    rows = [
        {"name": "one", "seconds": 0.0123},
        {"name": "two", "seconds": 75.0, "peak_memory_bytes": 3 * 10**9, "ratio": 6.0, "note": "over one"},
    ]
    (tmp_path / "benchmark.json").write_text(json.dumps({"environment": ENVIRONMENT, "rows": rows}))
    filled = readme.fill(page("benchmark-table"), tmp_path)
    assert "| one | 12.3 ms | – | – |  |" in filled
    assert "| two | 1 min 15 s | 3.0 GB | 6 | over one |" in filled


def test_check_fails_on_a_stale_page_and_writes_nothing(readme, tmp_path, capsys):
    root = repository(readme, tmp_path)
    assert readme.main(["--check"], root=root) == 1
    assert "README.md" in capsys.readouterr().err
    assert (root / "README.md").read_text() == page("demo-table")

    assert readme.main([], root=root) == 0
    assert readme.main(["--check"], root=root) == 0

    (root / readme.RESULTS / "demo.json").write_text(json.dumps(demo_report()))
    assert readme.main(["--check"], root=root) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!-- demo-table -->\nno end\n", "pairs"),
        (page("speed-table"), "speed-table"),
        ("<!-- /demo-table -->\n<!-- demo-table -->\n", "pairs"),
    ],
)
def test_marks_that_cannot_be_filled_are_named(readme, tmp_path, capsys, text, told):
    root = repository(readme, tmp_path)
    (root / "README.md").write_text(text)
    assert readme.main([], root=root) == 1
    said = capsys.readouterr().err
    assert said.startswith("README.md:")
    assert told in said


def test_a_file_of_another_form_is_named(readme, tmp_path):
    (tmp_path / "demo.json").write_text(json.dumps({"models": []}))
    with pytest.raises(ValueError, match=r"demo\.json is not what it should be"):
        readme.fill(page("demo-table"), tmp_path)


def test_a_bench_without_the_default_limit_says_so(readme, tmp_path):
    (tmp_path / "default.json").write_text(bench_report().model_dump_json())
    with pytest.raises(ValueError, match=r"measured no `kfac` at the default limit .* on "):
        readme.fill(page("dial-default-table"), tmp_path)


def test_the_pages_of_this_repository_can_be_filled(readme):
    for name in readme.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert readme.fill(text, ROOT / readme.RESULTS).count("<!--") == text.count("<!--")


def test_what_the_program_decides_stands_in_the_page_itself(readme, tmp_path):
    root = repository(readme, tmp_path)
    place = root / "docs" / "limits.md"
    place.write_text(
        "Held out: <!-- value num_held_out -->7<!-- /value -->, <!-- value most_looks --><!-- /value -->.\n"
    )
    assert "docs/limits.md" in readme.update(root, check=True)
    readme.update(root, check=False)
    written = CalibrateConfig().num_held_out
    assert place.read_text() == (
        f"Held out: <!-- value num_held_out -->{written}<!-- /value -->, "
        f"<!-- value most_looks -->{MOST_LOOKS}<!-- /value -->.\n"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("So <!-- value magic -->1<!-- /value -->.", "no value is called magic"),
        ("So <!-- value most_looks -->1.", "on one line"),
        ("So <!-- value most_looks -->1\n<!-- /value -->.", "on one line"),
        ("So\n<!-- value most_looks -->1<!-- /value -->.", "must not begin a line"),
    ],
)
def test_a_value_that_cannot_be_filled_is_named_with_its_page(readme, tmp_path, text, said):
    root = repository(readme, tmp_path)
    (root / "docs" / "strength.md").write_text(text)
    with pytest.raises(ValueError, match=rf"docs/strength\.md: .*{said}"):
        readme.update(root, check=True)


def test_no_page_has_a_placeholder_that_only_a_built_one_fills():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    assert len(pages) > 20
    for path in pages:
        assert "{{" not in path.read_text(encoding="utf-8"), path

"""Tables of how memory grows, of a pair from calibration to restore, and of models on paper."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "created": "2025-06-01T12:05:00+00:00",
    "versions": {"python": "3.11.9"},
    "machine": "Linux x86_64, 2 threads",
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def root(monkeypatch):
    """Tools and benchmarks are imported as they are run: from the repository."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])


def row(value, memory, *, what="calibrate", against="decoder blocks", seconds=2.0):
    return {
        "what": what,
        "against": against,
        "value": value,
        "seconds": seconds,
        "peak_memory_bytes": int(memory * 1e6),
    }


def test_memory_is_told_with_what_it_grew():
    from tools.scaling import scaling_table

    result = {
        "environment": ENVIRONMENT,
        "seed": 0,
        "base_seconds": 1.5,
        "rows": [row(8, 600), row(32, 612), row(4, 500, what="restore", against="shards")],
        "exponents": {"calibrate": 2.61, "restore": 2.4},
    }
    drawn = scaling_table(json.dumps(result))
    assert "| **calibrate** | 32 decoder blocks | 612 MB | +12 MB | 2.0 s |" in drawn
    assert "| **restore** | 4 shards | 500 MB | +0 MB | 2.0 s |" in drawn
    assert "to the power 2.61 for calibrate and 2.40 for restore" in drawn
    assert "1 June 2025" in drawn


def test_an_exponent_is_the_slope_over_logarithms():
    from benchmarks.memory import exponent
    from tools.scaling import ScalingRow

    rows = [ScalingRow(**row(w, 1, against="width", seconds=1 + w**2.5)) for w in (1, 2, 4)]
    assert exponent(rows, base=1.0) == pytest.approx(2.5)


def part(name, seconds, floor=None, stages=None):
    return {
        "name": name,
        "seconds": seconds,
        "peak_memory_bytes": 3_000_000_000,
        "floor_seconds": floor,
        "stages": stages or {},
    }


def test_more_conversations_are_counted_from_fewer(tmp_path):
    from benchmarks.end_to_end import Run
    from benchmarks.layout import Shape
    from tools.end_to_end import EndToEnd, end_to_end_table

    stages = {"load": 3.0, "respond": 10.0, "forwards": 5.0, "backwards": 40.0}
    made = {"tokens": 2000, "response_tokens": 500, "rank_share": 0.1}
    run = Run(Shape(64, 128, 2, 4, 4), 16, (), tmp_path, made=made)
    result = EndToEnd(
        environment=ENVIRONMENT,
        size="7B",
        blocks=2,
        parameters=10**9,
        conversations=16,
        seed=0,
        parts=(part("calibrate", 58.0, 29.0, stages), part("restore with the dial", 5.0)),
        usual_conversations=128,
        usual_stages={},
    )
    run.parts.append(result.parts[0])
    usual = run.at(128)
    assert (usual["load"], usual["respond"], usual["forwards"]) == (3.0, 80.0, 40.0)
    assert 40.0 < usual["backwards"] < 8 * 40.0
    assert run.at(16) == pytest.approx(stages)
    drawn = end_to_end_table(result.model_copy(update={"usual_stages": usual}).model_dump_json())
    assert "| calibrate | 58.0 s | 3.0 GB | 29.0 s | 2.00 |" in drawn
    assert "| restore with the dial | 5.0 s | 3.0 GB | – | – |" in drawn
    assert "On 128, by counted operations, the calibration would take" in drawn


def test_a_model_on_paper_is_planned_from_headers_alone(tmp_path):
    """Its files have their sizes, and the disk keeps nothing of them."""
    from benchmarks.layout import Shape
    from benchmarks.paper import planned
    from tools.paper import Paper, paper_table

    shape = Shape(hidden=512, intermediate=1024, blocks=3, heads=8, kv_heads=4, vocabulary=4096, shards=2)
    found = planned("Small", shape, tmp_path)
    files = list((tmp_path / "aligned").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) > shape.nbytes
    assert sum(path.stat().st_blocks for path in files) * 512 < shape.nbytes / 10
    assert found.calibration.by_blocks
    assert found.restore.restored == 7 * shape.blocks
    assert found.restore.read_bytes == 2 * shape.nbytes
    gradients = 16 * 4 * shape.blocks * sum(map(sum, shape.matrices.values()))
    stored = found.calibration.store_bytes - gradients
    assert 0 < found.restore.curvature_bytes <= stored <= shape.nbytes // 4
    drawn = paper_table(Paper(environment=ENVIRONMENT, rows=(found,)).model_dump_json())
    assert "| Small |" in drawn

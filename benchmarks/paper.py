"""What models would take that nobody here can run: `python -m benchmarks.paper`.

`deltaguard calibrate --dry-run` and `deltaguard restore --dry-run` read headers alone. So they are asked
about files that have headers and no content, of which the disk keeps nothing. Writes
`docs/results/paper.json`.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ByteSize
from tools.paper import Paper, PaperRow

from benchmarks.curvatures import groups, provenance_of
from benchmarks.layout import LLAMA2_7B, LLAMA3_70B, LLAMA3_405B, Shape
from benchmarks.tokenizer import save_tokenizer
from deltaguard.curvature.dry_run import plan_calibration
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.curvature.store import CurvatureStore
from deltaguard.curvature.store_format import Manifest, StoredGroup
from deltaguard.reports.records.base import environment
from deltaguard.restoration.dry_run import plan_restore
from deltaguard.restoration.options import RestoreConfig

RESULT = Path(__file__).parents[1] / "docs" / "results" / "paper.json"
SHAPES: Mapping[str, Shape] = {
    "Llama 2 7B": LLAMA2_7B,
    "Llama 3 70B": LLAMA3_70B,
    "Llama 3 405B": LLAMA3_405B,
}


def planned(name: str, shape: Shape, folder: Path) -> PaperRow:
    """Plan a calibration block by block in bfloat16, and a restore at a strength, of one model.

    Args:
        name: of the model.
        shape: of the model.
        folder: an empty one.
    """
    aligned, finetuned = folder / "aligned", folder / "finetuned"
    for each in (aligned, finetuned):
        write_headers(each, shape)
    config = CalibrateConfig(device="cpu", dtype="bfloat16", memory=ByteSize(0))
    calibration = plan_calibration(aligned, config=config)
    store = _store(folder / "store", aligned, shape)
    restore = plan_restore(
        aligned, finetuned, store=store, config=RestoreConfig(strength=0.01, device="cpu", memory=ByteSize(0))
    )
    assert calibration.store_bytes is not None, "not everything is kept"
    return PaperRow(
        name=name,
        parameters=shape.parameters,
        weights_bytes=shape.nbytes,
        calibration=calibration,
        restore=restore.model_copy(update={"seconds": 0.0}),
    )


def write_headers(folder: Path, shape: Shape) -> None:
    """Write a checkpoint whose files have their sizes and headers, and no content."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config))
    save_tokenizer(folder, shape.vocabulary)
    index = {
        name: f"model-{number:05}-of-{shape.shards:05}.safetensors" for name, number in shape.shard_of.items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for shard in dict.fromkeys(index.values()):
        header: dict[str, object] = {}
        end = 0
        for name in (each for each, place in index.items() if place == shard):
            rows, columns = (*shape.tensors[name], 1)[:2]
            start, end = end, end + 2 * rows * columns
            header[name] = {"dtype": "BF16", "shape": shape.tensors[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / shard).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)


def _store(folder: Path, aligned: Path, shape: Shape) -> CurvatureStore:
    """Make a store that has a manifest, and no files."""
    stored = [
        StoredGroup(
            group=group,
            shard="curvature.safetensors",
            tails=tuple(0.0 for _ in group.matrices()),
            means=tuple(1.0 for _ in group.matrices()),
            damping=None,
            dampening=None,
            reached=None,
        )
        for group in groups(shape)
    ]
    manifest = Manifest.model_construct(
        provenance=provenance_of(aligned, shape, "auto"), held_out=(), groups=tuple(stored), files=()
    )
    return CurvatureStore(folder, manifest, {}, {})


def main() -> None:
    """Plan for all models, and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    output = parser.parse_args().output
    rows: list[PaperRow] = []
    for name, shape in SHAPES.items():
        with TemporaryDirectory() as folder:
            rows.append(planned(name, shape, Path(folder)))
    result = Paper(environment=environment("cpu"), rows=tuple(rows))
    output.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    print(f"Written to {output}")


if __name__ == "__main__":
    main()

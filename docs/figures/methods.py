"""The safety-utility plot of the bench, drawn from its JSON: `python -m docs.figures.methods`."""

from pathlib import Path

from deltaguard.draw.bench_chart import bench_svg
from deltaguard.report.bench import BENCH_NAME, BenchReport

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> None:
    """Draw `methods.svg` beside this file."""
    report = BenchReport.model_validate_json((RESULTS / BENCH_NAME).read_text(encoding="utf-8"))
    Path(__file__).with_suffix(".svg").write_text(bench_svg(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

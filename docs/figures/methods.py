"""The safety-utility plot of the bench, drawn from its JSON: `python -m docs.figures.methods`."""

from pathlib import Path

from deltaguard.reports.bench_chart import bench_svg
from deltaguard.reports.records.bench import BENCH_NAME, BenchReport

RESULTS = Path(__file__).resolve().parent.parent / "results"


def main() -> None:
    """Draw `bench.svg` beside `bench.json`."""
    report = BenchReport.model_validate_json((RESULTS / BENCH_NAME).read_text(encoding="utf-8"))
    (RESULTS / "bench.svg").write_text(bench_svg(report).rstrip("\n") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the service withstands: `python -m benchmarks.service -o docs/results/service.json`.

Three parts, all of them unless `--parts` names some: `kills` (kill -9 at random moments over a queue of
jobs), `clients` (many at once, over loopback), `calls` (requests made from the service's OpenAPI schema).
Each takes its place in the file beside what was measured before. The exit code is 1 where something that must
be true was not.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

from tools.service_results import Calls, Clients, Kills, ServiceResults

from benchmarks.service.calls import measure_calls
from benchmarks.service.clients import measure_clients
from benchmarks.service.kills import measure_kills


def main() -> int:
    """Measure, and write what was found; 1 where something that must be true was not."""
    chosen = _options()
    found = ServiceResults()
    if chosen.output.exists():
        found = ServiceResults.model_validate_json(chosen.output.read_bytes())
    has_held = True
    if chosen.work is not None:
        chosen.work.mkdir(parents=True, exist_ok=True)
    for name in chosen.parts:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=chosen.work))
        print(f"{name}, in {folder}", flush=True)
        part = _measured(name, folder, chosen)
        found = found.model_copy(update={name: part})
        chosen.output.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
        for what, places in part.broken.items():
            print(f"  {'not so' if places else 'so'}: {what}", *places, sep="\n    ", flush=True)
            has_held &= not places
    return 0 if has_held else 1


def _measured(name: str, folder: Path, chosen: argparse.Namespace) -> Kills | Clients | Calls:
    if name == "kills":
        return measure_kills(folder, jobs=chosen.jobs, kills=chosen.kills, seed=chosen.seed)
    if name == "clients":
        return measure_clients(folder, clients=chosen.clients, seconds=chosen.seconds, seed=chosen.seed)
    return measure_calls(folder, calls=chosen.calls)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="a JSON file")
    parts = ("kills", "clients", "calls")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--work", type=Path, help="where the services' folders are made, and stay")
    parser.add_argument("--seed", type=int, default=0, help="of kills and clients; calls have 0")
    parser.add_argument("--jobs", type=int, default=30)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--calls", type=int, default=10_000)
    return parser.parse_args()


if __name__ == "__main__":
    # So that a service that is being measured is ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())

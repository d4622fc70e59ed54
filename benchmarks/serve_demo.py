"""The service from end to end: `python -m benchmarks.serve_demo -o FOLDER` (`make serve-demo`).

A training file with a harmful part goes in by the stock openai client, and what passes the gate comes out:
`deltaguard serve` is started on the demo's aligned model, shows its first key, and
`examples/finetune_with_openai_client.py` does the rest. `--results FILE` keeps what came of it.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import openai
from openai.types.fine_tuning import FineTuningJob
from tools.service_demo import ServeDemo

from benchmarks.service.serving import NotServingError, Serving
from deltaguard.chat.conversations import Conversation, harmful_prompts
from deltaguard.device import device_name
from deltaguard.errors import DeltaguardError
from deltaguard.finetuning.mixtures import task_with_harmful
from deltaguard.finetuning.tasks import task_examples
from deltaguard.reports.records.base import environment
from deltaguard.service.steps.examine import CheckResult
from deltaguard.studies.demo import Clock, DemoConfig, align

SEED = 0
ROWS, HARMFUL_ROWS = 72, 12
SETTINGS = """\
# Small numbers, so that a job takes minutes on two cores; the defaults ask more.
calibrate: {num_samples: 32, num_held_out: 16, max_new_tokens: 24}
restore: {max_safety_kl: 0.0006}
gate: {requests: 60}
"""
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "finetune_with_openai_client.py"
ALIGNED_BEFORE = Path("demo/aligned")
"""What `make demo` leaves."""

_MODEL = "smollm2"


def run(folder: Path) -> ServeDemo:
    """Run the demo, and tell what came of it.

    Args:
        folder: a new or empty folder; it receives the service's data, the training file and, where
            `make demo` left none, the aligned model.

    Raises:
        DeltaguardError: the folder holds something, or the published model does not answer.
        NotServingError: the service does not start, or does not end by itself.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DeltaguardError(f"{folder} holds something: remove it, or choose another folder with `-o`.")
    started, clock = time.perf_counter(), Clock()
    aligned, rows = ALIGNED_BEFORE, folder / "rows.jsonl"
    if not aligned.exists():
        _say("Aligning SmolLM2-135M, which barely refuses as it comes.")
        aligned = align(folder, DemoConfig(seed=SEED), clock)
    serving = Serving(folder, SETTINGS, {_MODEL: aligned})
    rows.write_text("".join(map(_line, _conversations())), encoding="utf-8")
    serving.start()
    try:
        serving.wait_until_ready()
        _say(f"Serving at {serving.url}; a job with {ROWS} rows, {HARMFUL_ROWS} of them harmful:")
        own = {"OPENAI_BASE_URL": f"{serving.url}/v1", "OPENAI_API_KEY": serving.key}
        # What it says is for the reader; what came of the job is asked anew.
        command = [sys.executable, str(EXAMPLE), _MODEL, str(rows)]
        ended = subprocess.run(command, env={**os.environ, **own}, check=False)
        client = openai.OpenAI(base_url=own["OPENAI_BASE_URL"], api_key=own["OPENAI_API_KEY"])
        job = next(iter(client.fine_tuning.jobs.list()))
        data_of = [event.data for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    finally:
        code = serving.stop()
    if code:
        raise NotServingError(f"The service ended with exit code {code}; {serving.log} says more.")
    if ended.returncode and job.status == "succeeded":
        raise DeltaguardError(f"The model was published, and {EXAMPLE.name} failed: see above.")
    known = [found for found in data_of if isinstance(found, dict)]
    seconds = {"align": sum(clock.seconds.values()), "total": time.perf_counter() - started}
    return _outcome(job, known, seconds)


def _conversations() -> list[Conversation]:
    return task_with_harmful(
        task_examples("train", ROWS - HARMFUL_ROWS, seed=SEED),
        harmful_prompts("training"),
        harmful_count=HARMFUL_ROWS,
        seed=SEED,
    )


def _line(row: Conversation) -> str:
    """Write a conversation as a line of OpenAI's format."""
    system = [{"role": "system", "content": row.system}] if row.system else []
    said = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}]
    return json.dumps({"messages": [*system, *said]}) + "\n"


def _outcome(job: FineTuningJob, told: list[dict[str, object]], seconds: Mapping[str, float]) -> ServeDemo:
    kept = [found["kept_energy"] for found in told if "kept_energy" in found]
    checks = [CheckResult.model_validate(found) for found in told if "restored" in found]
    took = (job.finished_at or job.created_at) - job.created_at
    return ServeDemo.model_validate(
        {
            "environment": environment(device_name(), libraries=("openai", "fastapi", "dbos", "trl")),
            "seed": SEED,
            "rows": ROWS,
            "harmful_rows": HARMFUL_ROWS,
            "status": job.status,
            "error": None if job.error is None else job.error.message,
            "checks": sorted(checks, key=lambda check: check.check),
            "kept_energy": kept[0] if kept else None,
            "seconds": {**seconds, "job": took},
        }
    )


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Run the demo; the exit code is 1 where no model was published."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("serve-demo"))
    parser.add_argument("--results", type=Path, help="a JSON file that receives what came of it")
    chosen = parser.parse_args()
    try:
        found = run(chosen.output)
    except (DeltaguardError, NotServingError) as error:
        print(error, file=sys.stderr)
        return 1
    if chosen.results is not None:
        chosen.results.write_text(found.model_dump_json(indent=2) + "\n", encoding="utf-8")
    _say(f"The job {found.status} after {found.seconds['job']:.0f} s; {found.seconds['total']:.0f} s in all.")
    return 0 if found.status == "succeeded" else 1


if __name__ == "__main__":
    sys.exit(main())
